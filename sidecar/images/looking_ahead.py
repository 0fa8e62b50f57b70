"""Has a datastore fetch what will be read next, so that a cold disk is waited for by several threads at a time.

Reading 10,000 images for the first time is 20,000 waits for the disk, one after the other. Several readers would take
turns at the interpreter and gain nothing once the files are in memory; these threads hardly touch it. On ext4, cold:
1.5 s instead of 2.4 s; with everything in memory: 0.1 s more.
"""

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from sidecar.datastores.interface import Datastore

_THREADS = 4


class LookAhead:
    """For the length of a block, in which these files are read in this order. Owns its threads."""

    def __init__(self, datastore: Datastore, paths: Iterable[str]) -> None:
        self._datastore = datastore
        self._paths = list(paths)
        self._taking = threading.Lock()  # guards the position
        self._position = 0
        self._ended = threading.Event()
        name = f"look-ahead-{datastore.name}"
        self._threads = [threading.Thread(target=self._run, name=name) for _ in range(min(_THREADS, len(self._paths)))]

    def _run(self) -> None:
        while not self._ended.is_set() and (path := self._take()) is not None:
            self._datastore.look_ahead(path)

    def _take(self) -> str | None:
        with self._taking:
            if self._position == len(self._paths):
                return None
            self._position += 1
            return self._paths[self._position - 1]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
