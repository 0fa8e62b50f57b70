"""What SIGINT, SIGTERM and SIGHUP do to a run of imagectl.

No signal handler raises: that exception may come out in a callback or a finaliser of a library, which swallows it, and
the signal is lost. The kernel's byte in a pipe wakes a thread instead, whatever the main thread is busy with or blocked
in. As a rule the thread ends the process. Where there is something to take back it notes the signal and cancels what
the main thread may be waiting for, and the main thread looks at the note and takes back.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn, Self

from sidecar import errors

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What taking back may need. A signal after that ends the process, whatever it leaves.
PATIENCE_SECONDS = 10.0

_log = logging.getLogger(__name__)


class Signals:
    """The signals of one run, from the start of the `with` block to its end. Entered by the main thread.

    `end` gets the signal's number and a message, and ends the process; it is called by the thread.
    """

    def __init__(self, end: Callable[[int, str], NoReturn]) -> None:
        self._end = end
        self._lock = threading.Lock()  # guards what follows
        self._cancel: Callable[[], object] | None = None
        self._number = 0
        self._noted = 0.0

    @property
    def number(self) -> int:
        """The signal because of which everything is to be taken back; 0: there was none."""
        return self._number

    def check(self) -> None:
        """Raises OperationCancelled once there was a signal: for what takes long and is not a call."""
        if self._number:
            raise errors.OperationCancelled("interrupted")

    @contextlib.contextmanager
    def held(self, cancel: Callable[[], object]) -> Iterator[None]:
        """In the block, a signal is noted, and `cancel` called by the thread, once.

        Without a signal, they end the process again afterwards; with one, whoever reads `number` is taking back, and
        a second signal, which impatient people send, does not end that for the next seconds.
        """
        with self._lock:
            self._cancel = cancel
        try:
            yield
        finally:
            with self._lock:
                if not self._number:
                    self._cancel = None

    def __enter__(self) -> Self:
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._thread = threading.Thread(target=self._watch, args=(reading,), name="signals")
        self._thread.start()
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        # What is ignored stays ignored: nohup, and the jobs that a script starts in the background.
        heeded = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers_before = {number: signal.signal(number, _handle) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)
        self._thread.join()

    def _watch(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as numbers:
            while received := numbers.read(1):
                self._received(received[0])

    def _received(self, number: int) -> None:
        with self._lock:
            if self._cancel is None:
                self._end(number, "interrupted")
            if self._number:
                if time.monotonic() - self._noted > PATIENCE_SECONDS:
                    self._end(number, "ended before all was taken back: something that was half made may be left")
                return
            self._number, self._noted = number, time.monotonic()
            cancel = self._cancel
        try:
            cancel()
        except Exception as error:
            # Without this thread, no signal would end anything any more.
            _log.warning("what runs could not be cancelled: %s", error)


def _handle(number: int, frame: object) -> None:
    """Nothing: it has to be there, or the kernel would end the process."""
