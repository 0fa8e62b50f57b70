"""Stands between a client and a sidecar: a connection that a test can cut, as a network does."""

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self


class Relay:
    """Passes bytes on between its socket and the sidecar's, from threads of its own."""

    def __init__(self, sidecar: str, path: Path) -> None:
        self.address = f"unix:{path}"
        self._sidecar = sidecar.removeprefix("unix:")
        self._path = path
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # guards _sockets
        self._sockets: list[socket.socket] = []

    def join_again(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._path))
        listener.listen()
        self._sockets.append(listener)
        self._start(self._accept, listener)

    def cut(self) -> None:
        """Ends every connection; there is none until `join_again`."""
        self._path.unlink(missing_ok=True)
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            _end(each)

    def __enter__(self) -> Self:
        self.join_again()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            near, _ = listener.accept()
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._sidecar)
            with self._lock:
                self._sockets += [near, far]
            self._start(_pass_on, near, far)
            self._start(_pass_on, far, near)

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):
                work(*arguments)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(1 << 16):
        target.sendall(data)
    _end(target)


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for it
    one.close()
