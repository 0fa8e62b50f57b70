"""In use: what this process alone has open, of a datastore that holds no file for whoever reads it."""

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from sidecar.errors import ImageInUse
from sidecar.locks.identity import process_name

# A mount hears of a close after it, and its sidecar after that.
_CLOSING_SECONDS = 1.0


class OpenHere:
    """What this process has open of a datastore. Safe for use by several threads."""

    def __init__(self, datastore: str) -> None:
        self._datastore = datastore
        self._changed = threading.Condition()  # guards the two
        self._open: Counter[str] = Counter()
        self._excluded: set[str] = set()

    def add(self, path: str) -> None:
        """Once more, until it is closed as often; ImageInUse while nobody may open it."""
        with self._changed:
            if path in self._excluded:
                raise ImageInUse(f"{self._datastore}: {path} is being removed")
            self._open[path] += 1

    def remove(self, path: str) -> None:
        with self._changed:
            self._open[path] -= 1
            if not self._open[path]:
                del self._open[path]
                self._changed.notify_all()

    def users(self, paths: Sequence[str]) -> list[str]:
        with self._changed:
            return [self._own_use] if self._has_open(paths) else []

    @contextmanager
    def excluded(self, paths: Sequence[str]) -> Iterator[None]:
        """Nobody opens one of the files in the block; ImageInUse when somebody has one open, and goes on to."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._has_open(paths), _CLOSING_SECONDS):
                raise ImageInUse(self._own_use)
            excluded = set(paths) - self._excluded
            self._excluded |= excluded
        try:
            yield
        finally:
            with self._changed:
                self._excluded -= excluded

    def _has_open(self, paths: Sequence[str]) -> bool:
        return any(path in self._open for path in paths)

    @cached_property
    def _own_use(self) -> str:
        return f"{process_name()} (pid {os.getpid()})"
