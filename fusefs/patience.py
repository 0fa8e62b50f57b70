"""How long the mount lets a change wait for its image's lock, which another process may hold for long.

A tool that waits for a mount is deaf to Ctrl-C, so no request may take long. It is told "Device or resource busy" then;
what the mount does by itself, it tries again.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from fusefs.doubts import Key
from sidecar.errors import LockTimeout

LOCK_SECONDS = 1.0
# A lock that was not got is hardly waited for at every further file of the same rm -r.
_REMEMBERED_SECONDS = 3.0
_SECOND_LOOK_SECONDS = 0.1


class Patience:
    """For changes of which one command asks for many. `clock` is monotonic. Safe to share between threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards the dictionary
        self._refused: dict[Key, float] = {}  # until when that is remembered; the first to end comes first

    @contextlib.contextmanager
    def waiting(self, key: Key) -> Iterator[float]:
        """For one change of the image: gives the seconds to wait for its lock, and notes when it was not got."""
        with self._lock:
            refused = self._clock() < self._refused.get(key, 0.0)
        try:
            yield _SECOND_LOOK_SECONDS if refused else LOCK_SECONDS
        except LockTimeout:
            now = self._clock()
            with self._lock:
                self._refused.pop(key, None)
                self._refused[key] = now + _REMEMBERED_SECONDS
                while self._refused[first := next(iter(self._refused))] <= now:
                    del self._refused[first]
            raise
