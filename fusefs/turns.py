"""One at a time for each key."""

import contextlib
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Turn:
    lock: threading.Lock = field(default_factory=threading.Lock)
    callers: int = 0  # that hold it or wait for it: until the last one has left, the next one must find this lock


class Turns:
    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the dictionary and the counts
        self._turns: dict[Hashable, _Turn] = {}

    def is_taken(self, key: Hashable) -> bool:
        return key in self._turns

    @contextlib.contextmanager
    def take(self, key: Hashable) -> Iterator[None]:
        """Waits for those who came before with the same key."""
        with self._lock:
            turn = self._turns.setdefault(key, _Turn())
            turn.callers += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                turn.callers -= 1
                if turn.callers == 0:
                    del self._turns[key]
