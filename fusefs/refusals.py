"""Who was just refused to write into an image's file.

`cp -f` and editors unlink such a file then, to make a new one in its place; of an image that would be its end.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

_REMEMBERED_SECONDS = 2.0
_MOST = 256


class Refusals:
    """`clock` is monotonic. Safe to share between threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards the dictionary
        self._until: OrderedDict[tuple[int, str], float] = OrderedDict()

    def note(self, process: int, path: str) -> None:
        with self._lock:
            self._until[process, path] = self._clock() + _REMEMBERED_SECONDS
            while len(self._until) > _MOST:
                self._until.popitem(last=False)

    def has(self, process: int, path: str) -> bool:
        with self._lock:
            return self._until.get((process, path), 0.0) > self._clock()
