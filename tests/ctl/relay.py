"""A socket between imagectl and a real sidecar that holds answers back: so that a call is in its middle for certain."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


class Relay:
    """Passes on what clients send, and the first bytes of what they are sent; the rest after `release`."""

    def __init__(self, path: Path, target: str, answer_bytes: int) -> None:
        self.address = f"unix:{path}"
        self._target = target.removeprefix("unix:")
        self._left = answer_bytes
        self.holding = threading.Event()
        """Set when it holds something back, or has."""
        self._released = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._run(self._serve)

    def release(self) -> None:
        self._released.set()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._sockets += [client, server]
                server.connect(self._target)
                self._run(self._pass_on, client, server, False)
                self._run(self._pass_on, server, client, True)

    def _pass_on(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers:
                    self._left -= len(data)
                    if self._left < 0:
                        self.holding.set()
                        self._released.wait(60)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        self.release()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(10)


@contextlib.contextmanager
def holding_back(path: Path, target: str, answer_bytes: int) -> Iterator[Relay]:
    """A relay at the socket `path` that passes `answer_bytes` of all answers before it is released."""
    relay = Relay(path, target, answer_bytes)
    relay.start()
    try:
        yield relay
    finally:
        relay.close()
