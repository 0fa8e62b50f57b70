"""Going into the background, and coming to an end: what every daemon needs, and the start's result for who waits."""

import os
import signal
import sys
import threading
from collections.abc import Callable

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_OK = b"ok"


class Parent:
    """The process that started this one, which waits to hear whether the mount answers."""

    def __init__(self, write_fd: int | None) -> None:
        self._write_fd = write_fd

    def ready(self) -> None:
        """Lets the parent go, with success."""
        self._tell(_OK)
        if self._write_fd is not None:
            null = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(null, standard)
            os.close(null)
        self._write_fd = None

    def failed(self, reason: str) -> bool:
        """Lets the parent go, with the reason; False when there is none that waits."""
        told = self._write_fd is not None
        self._tell(reason.encode())
        self._write_fd = None
        return told

    def _tell(self, message: bytes) -> None:
        if self._write_fd is not None:
            os.write(self._write_fd, message)
            os.close(self._write_fd)


def into_background() -> Parent:
    """Returns in a child that has no terminal. The parent waits for it, prints why it failed, and exits.

    To be called before the first thread starts.
    """
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_fd)
        os.setsid()
        os.chdir("/")
        return Parent(write_fd)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        message = pipe.read()
    if message == _OK:
        os._exit(0)
    if not message:
        _, status = os.waitpid(child, 0)
        message = f"the mount ended at once, with status {os.waitstatus_to_exitcode(status)}".encode()
    sys.stderr.write(f"image-mount: {message.decode(errors='replace')}\n")
    sys.stderr.flush()
    os._exit(1)


class EndSignals:
    """Takes SIGTERM, SIGINT and SIGHUP, in a thread: the main one is in libfuse, where Python handles no signals."""

    def __init__(self) -> None:
        """To be made before the first thread starts, so that all threads leave these signals to ours."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
        self._thread: threading.Thread | None = None

    def call(self, end: Callable[[], None]) -> None:
        """Calls `end` at the first signal, and again at each further one."""

        def wait() -> None:
            while True:
                signal.sigwait(_END_SIGNALS)
                end()

        # A daemon thread: it waits for a signal when the mount ends without one.
        self._thread = threading.Thread(target=wait, name="signals", daemon=True)
        self._thread.start()
