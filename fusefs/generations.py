"""Which file the kernel takes a path for.

It has one size and one set of pages for a path. When another host replaces an image, the index has the new files first,
and the kernel is told a moment later. Whoever opened the new file in between would read it with the old one's size, cut
off or filled with zeroes, and see no error. So a file of an image that changed is opened only when the kernel was told
of the change, and has asked what is at the path since; and while a file is open, its path stands for no other one.
"""

import contextlib
import errno
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from fusefs.attributes import Attributes
from fusefs.doubts import Key
from fusefs.errors import AskAgain, fail
from fusefs.processes import described
from fusefs.provenance import Generation

_TOLD_SECONDS = 1.0  # that an open waits for the kernel to be told
# That an open waits for the older file: the kernel says that it is closed when the close is over already.
_CLOSED_SECONDS = 0.3
_MOST_WAITING = 8  # for that: the threads that answer the kernel are few, and one of them has to hear of the close
# That a doubt lasts longer than any name that the kernel learned with an answer of before.
_ANSWER_SECONDS = 60.0
_MOST_PATHS = 65536
_MOST_NAMED = 3


@dataclass(slots=True, eq=False)
class OpenFile:
    """A file that is open, from `opened` to `closed`."""

    key: Key
    path: str  # where the kernel has it, or had it until it was removed
    generation: Generation
    attributes: Attributes  # as they were when it was opened
    process: int  # who opened it; 0: not known
    keep_pages: bool  # whether the pages that the kernel has of the path are this file's


@dataclass(slots=True)
class _Doubt:
    """An image that changed a moment ago: what the kernel knows of its files may be older."""

    untold: int = 0  # changes that the kernel has not been told of
    told_at: int = 0  # the request before which it was told of the last one
    until: float = 0.0
    shown: dict[str, Generation] = field(default_factory=dict)  # what was at its paths in answers to requests since


class Generations:
    """`name_seconds`: for how long the kernel keeps a name without asking. `clock` is monotonic.

    `tell` has the kernel told that what it knows of a directory and of paths in it is old, and calls `told` then.
    """

    def __init__(
        self,
        name_seconds: float,
        *,
        tell: Callable[[str, Iterable[str], Callable[[], None]], None] = lambda directory, paths, told: told(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._doubt_seconds = name_seconds + _ANSWER_SECONDS
        self._requests = itertools.count(1)
        self._told = threading.Condition()  # guards what follows
        self._doubts: OrderedDict[Key, _Doubt] = OrderedDict()  # the first to end comes first
        self._waiting = 0  # for an older file to be closed
        self._open: dict[str, list[OpenFile]] = {}  # by path, all of one generation
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

    @contextlib.contextmanager
    def change(self, key: Key) -> Iterator[None]:
        """For who changes what is shown, and tells the kernel before leaving."""
        self.changing(key)
        try:
            yield
        finally:
            self.told(key)

    def begin(self) -> int:
        """A request that asks what is at a path begins: its number."""
        return next(self._requests)

    def shown(self, key: Key, path: str, generation: Generation, attributes: Attributes, request: int) -> Attributes:
        """What the request is answered for a file that the index has at the path: the older one, while that is open."""
        with self._told:
            if opened := self._open.get(path):
                generation, attributes = opened[0].generation, opened[0].attributes
            doubt = self._doubts.get(key)
            if doubt is not None and not doubt.untold and request > doubt.told_at:
                doubt.shown[path] = generation
            return attributes

    def is_open_below(self, directory: str) -> bool:
        """Whether a file in the directory is open: a listing must not say of it what is at its path now."""
        with self._told:
            return bool(self._paths_at(f"{directory}/"))

    def opened(self, key: Key, path: str, generation: Generation, attributes: Attributes, process: int) -> OpenFile:
        """A file is opened.

        Raises ESTALE when the kernel has to look the path up first, which it then does by itself, once; or when an
        older file is open under the path.
        """

        def older() -> list[OpenFile]:
            return [file for file in self._open.get(path, ()) if file.generation != generation]

        with self._told:
            self._wait_closed(lambda: not older())
            doubt = self._doubts.get(key)
            if doubt is not None:
                self._told.wait_for(lambda: not doubt.untold, _TOLD_SECONDS)
            if others := older():
                fail(errno.ESTALE, f"{path} was replaced, and the file that it was is still open in {_users(others)}")
            if doubt is not None and (doubt.untold or doubt.shown.get(path) != generation):
                raise AskAgain(path)
            file = OpenFile(key, path, generation, attributes, process, self._last.get(path) == generation)
            self._open.setdefault(path, []).append(file)
            self._last[path] = generation
            self._last.move_to_end(path)
            while len(self._last) > _MOST_PATHS:
                self._last.popitem(last=False)
            return file

    def closed(self, file: OpenFile, is_there: Callable[[], bool]) -> None:
        """A file is closed; `is_there` says, without waiting, whether the index has it at its path.

        Where another one is by now, the kernel is told once more: it was answered with this file's size until now, and
        such an answer may still be on its way.
        """
        with self._told:
            files = self._open.get(file.path, [])
            if file not in files:  # removed here
                return
            files.remove(file)
            if files:
                return
            del self._open[file.path]
            self._told.notify_all()
            # Not before: of a change that comes after this the kernel is told after all of those answers.
            if is_there():
                return
            self.changing(file.key)
        self._tell(file.path.rpartition("/")[0], [file.path], partial(self.told, file.key))

    def require_free(self, path: str) -> None:
        """ESTALE while a file of an image is open that was at the path: the kernel would take a new one for it."""
        with self._told:
            self._wait_closed(lambda: path not in self._open)
            if files := self._open.get(path):
                fail(errno.ESTALE, f"{path} is gone, and still open in {_users(files)}")

    def removed(self, path: str) -> None:
        """What is at the path was removed here: what comes there next is another file to the kernel, too."""
        with self._told:
            for each in self._paths_at(path):
                del self._open[each]

    def renamed(self, old: str, new: str) -> None:
        """What was at `old` was renamed here, over what was at `new`: to the kernel, what is open goes with it."""
        with self._told:
            self.removed(new)
            for path in self._paths_at(old):
                files = self._open.pop(path)
                moved = new + path.removeprefix(old)
                self._open[moved] = files
                for file in files:
                    file.path = moved

    def _wait_closed(self, is_closed: Callable[[], bool]) -> None:
        if self._waiting == _MOST_WAITING:
            return
        self._waiting += 1
        try:
            self._told.wait_for(is_closed, _CLOSED_SECONDS)
        finally:
            self._waiting -= 1

    def _paths_at(self, path: str) -> list[str]:
        """Of open files: the path itself, and what is below it; of one with a slash at its end, the latter alone."""
        below = path if path.endswith("/") else f"{path}/"
        return [each for each in self._open if each == path or each.startswith(below)]

    def _doubt(self, key: Key) -> _Doubt:
        now = self._clock()
        doubt = self._doubts.setdefault(key, _Doubt())
        doubt.until = now + self._doubt_seconds
        self._doubts.move_to_end(key)
        # One that the kernel is still to be told of begins anew then, and holds up the ones behind it until then.
        while (first := next(iter(self._doubts.values()))).until <= now and not first.untold:
            self._doubts.popitem(last=False)
        return doubt


def _users(files: Iterable[OpenFile]) -> str:
    """Who opened the files, or the first few of them, for the log."""
    processes = dict.fromkeys(file.process for file in files)
    return ", ".join(described(process) for process in itertools.islice(processes, _MOST_NAMED))
