"""Which file the kernel takes a path for.

It has one size and one set of pages for a path. When another host replaces an image, the index has the new files first,
and the kernel is told a moment later. Whoever opened the new file in between would read it with the old one's size, cut
off or filled with zeroes, and see no error. So a file of an image that changed is opened only when the kernel was told
of the change, and has asked what is at the path since; and while a file is open, its path stands for no other one.
"""

import errno
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fusefs.attributes import Attributes
from fusefs.doubts import Key
from fusefs.errors import AskAgain, fail
from fusefs.provenance import Generation

_TOLD_SECONDS = 1.0  # that an open waits for the kernel to be told
# That a doubt lasts longer than any name that the kernel learned with an answer of before.
_ANSWER_SECONDS = 60.0
_MOST_PATHS = 65536


class _Open(NamedTuple):
    generation: Generation
    attributes: Attributes


@dataclass(slots=True)
class _Doubt:
    """An image that changed a moment ago: what the kernel knows of its files may be older."""

    untold: int = 0  # changes that the kernel has not been told of
    told_at: int = 0  # the request before which it was told of the last one
    until: float = 0.0
    shown: dict[str, Generation] = field(default_factory=dict)  # what was at its paths in answers to requests since


class Generations:
    """`name_seconds`: for how long the kernel keeps a name without asking. `clock` is monotonic."""

    def __init__(self, name_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._doubt_seconds = name_seconds + _ANSWER_SECONDS
        self._requests = itertools.count(1)
        self._told = threading.Condition()  # guards what follows
        self._doubts: OrderedDict[Key, _Doubt] = OrderedDict()
        self._open: dict[str, list[_Open]] = {}
        self._last: OrderedDict[str, Generation] = OrderedDict()  # whose pages the kernel may have

    def changing(self, key: Key) -> None:
        """The index is about to show the image otherwise than before; `told` follows, once for each."""
        with self._told:
            self._doubt(key).untold += 1

    def told(self, key: Key) -> None:
        """The kernel was told that what it knows of the image's files is old."""
        with self._told:
            doubt = self._doubt(key)
            doubt.untold -= 1
            doubt.told_at = next(self._requests)
            doubt.shown.clear()
            self._told.notify_all()

    def begin(self) -> int:
        """A request that asks what is at a path begins: its number."""
        return next(self._requests)

    def shown(self, key: Key, path: str, generation: Generation, attributes: Attributes, request: int) -> Attributes:
        """What the request is answered for a file that the index has at the path: the older one, while that is open."""
        if not self._open and not self._doubts:
            return attributes
        with self._told:
            if opened := self._open.get(path):
                generation, attributes = opened[0]
            doubt = self._doubts.get(key)
            if doubt is not None and not doubt.untold and request > doubt.told_at:
                doubt.shown[path] = generation
            return attributes

    def is_open_below(self, directory: str) -> bool:
        """Whether a file in the directory is open: a listing must not say of it what is at its path now."""
        if not self._open:
            return False
        with self._told:
            return any(path.startswith(f"{directory}/") for path in self._open)

    def opened(self, key: Key, path: str, generation: Generation, attributes: Attributes) -> bool:
        """A file is opened; whether the pages that the kernel has of the path are this file's.

        Raises ESTALE when the kernel has to look the path up first, which it then does by itself, once; or when an
        older file is open under the path.
        """
        with self._told:
            doubt = self._doubts.get(key)
            if doubt is not None:
                self._told.wait_for(lambda: not doubt.untold, _TOLD_SECONDS)
            others = self._open.get(path, [])
            if others and others[0].generation != generation:
                fail(errno.ESTALE, f"{path} was replaced, and the file that it was is still open")
            if doubt is not None and (doubt.untold or doubt.shown.get(path) != generation):
                raise AskAgain(path)
            self._open[path] = [*others, _Open(generation, attributes)]
            keep = self._last.get(path) == generation
            self._last[path] = generation
            self._last.move_to_end(path)
            while len(self._last) > _MOST_PATHS:
                self._last.popitem(last=False)
            return keep

    def closed(self, key: Key, path: str, generation: Generation, *, is_there: bool) -> None:
        """A file is closed; `is_there`: whether it is still the one at its path."""
        with self._told:
            self._remove(path, generation)
            if not is_there:
                self._doubt(key).shown.pop(path, None)

    def require_free(self, path: str) -> None:
        """ESTALE while a file of an image is open that was at the path: the kernel would take a new one for it."""
        with self._told:
            if path in self._open:
                fail(errno.ESTALE, f"{path} is gone, and still open")

    def removed(self, path: str) -> None:
        """What is at the path was removed or renamed here: what comes there next is another file to the kernel, too."""
        with self._told:
            for each in [each for each in self._open if each == path or each.startswith(f"{path}/")]:
                del self._open[each]

    def _doubt(self, key: Key) -> _Doubt:
        now = self._clock()
        doubt = self._doubts.setdefault(key, _Doubt())
        doubt.until = now + self._doubt_seconds
        self._doubts.move_to_end(key)
        # The oldest ones come first.
        for old in [
            key for key, each in itertools.islice(self._doubts.items(), 8) if each.until <= now and not each.untold
        ]:
            del self._doubts[old]
        return doubt

    def _remove(self, path: str, generation: Generation) -> None:
        opened = self._open.get(path, [])
        same = next((each for each in opened if each.generation == generation), None)
        if same is not None:
            opened.remove(same)
        if not opened:
            self._open.pop(path, None)
