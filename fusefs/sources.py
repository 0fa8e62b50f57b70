"""The files of images that somebody reads, or read a moment ago: what a write elsewhere in the mount may be a copy of.

A copier that reads in one process and writes in another (`tar | tar`, rsync) writes when the source may be closed
already. It is found by the file's name, and opened again; whether it is the source, the bytes tell.
"""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from fusefs.provenance import SourceFile
from fusefs.reading import Reader

# How long a pipe and its buffers may hold the end of a file whose reader is through with it.
REMEMBERED_SECONDS = 10.0
_MOST_REMEMBERED = 256
# Of one name; each costs a comparison until one of them is the source.
_MOST_CANDIDATES = 3
_RSYNC_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[A-Za-z0-9]{6}")

OpenSource = Callable[[SourceFile], Reader]


class Sources:
    """Safe to share between threads. `clock` is monotonic."""

    def __init__(self, open_source: OpenSource, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`open_source` opens a file of an image; OSError when it is not the same file any more."""
        self.open = open_source
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: OrderedDict[SourceFile, float] = OrderedDict()  # until when; the last that was seen comes last

    def seen(self, source: SourceFile) -> None:
        """Somebody opened or closed the file."""
        with self._lock:
            self._seen[source] = self._clock() + REMEMBERED_SECONDS
            self._seen.move_to_end(source)
            while len(self._seen) > _MOST_REMEMBERED:
                self._seen.popitem(last=False)

    def named(self, staged_name: str) -> list[SourceFile]:
        """The files that one of this name may be a copy of, the last seen first."""
        temporary = _RSYNC_TEMPORARY.fullmatch(staged_name)
        names = {staged_name, temporary["name"]} if temporary else {staged_name}
        now = self._clock()
        with self._lock:
            found = [source for source, until in reversed(self._seen.items()) if source.name in names and until > now]
        return found[:_MOST_CANDIDATES]
