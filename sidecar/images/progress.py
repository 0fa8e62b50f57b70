"""How far an operation is, and whether anybody still wants it."""

import threading
from dataclasses import dataclass

from sidecar.errors import OperationCancelled


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes of the image's files, holes included; `cloned` of them share the source's extents."""

    done: int
    total: int
    cloned: int


class Progress:
    """Counts bytes and carries the wish to cancel, between the thread that works and those that look on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the three numbers
        self._done = self._total = self._cloned = 0
        self._cancelled = threading.Event()

    def expect(self, total: int) -> None:
        with self._lock:
            self._total = total

    def advance(self, done: int, *, cloned: int = 0) -> None:
        """Counts bytes that are done; raises OperationCancelled when nobody wants them any more."""
        with self._lock:
            self._done += done
            self._cloned += cloned
        self.check()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        if self._cancelled.is_set():
            raise OperationCancelled("the operation was cancelled; nothing was published")

    @property
    def amount(self) -> Amount:
        with self._lock:
            return Amount(self._done, self._total, self._cloned)
