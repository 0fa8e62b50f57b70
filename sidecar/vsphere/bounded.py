"""HTTPS connections on which a request has an end, however the server behaves.

A socket's timeout is for one read: a server that sends a byte now and then would hold a request for ever. Here what is
left until the request's end is the timeout of each step: names, connections, TLS, what is sent and what is read.
"""

import select
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from http.client import HTTPSConnection
from typing import Any

_AddressInfo = tuple[Any, ...]  # one of socket.getaddrinfo


class _BoundedSocket(ssl.SSLSocket):
    """Its reads and writes end at `until`, of time.monotonic, with TimeoutError."""

    until: float

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(_left(self.until))
        return super().recv_into(*arguments)

    def send(self, *arguments: Any) -> int:  # sendall's, too
        self.settimeout(_left(self.until))
        return super().send(*arguments)


class BoundedConnection(HTTPSConnection):
    """What is done on it has to have ended by `until`, of time.monotonic, or by what `bound` said since."""

    def __init__(self, host: str, port: int, until: float, context: ssl.SSLContext) -> None:
        super().__init__(host, port, context=context)
        self._until = until
        self._trust = context
        self._trust.sslsocket_class = _BoundedSocket

    def bound(self, until: float) -> None:
        self._until = until
        opened: Any = self.sock
        if opened is not None:
            opened.until = until

    def connect(self) -> None:
        plain = _connected(self.host, self.port, self._until)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.settimeout(_left(self._until))  # of the whole handshake
            wrapped: Any = self._trust.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise
        wrapped.until = self._until
        self.sock = wrapped

    def was_ended_by_the_server(self) -> bool:
        """Of an idle one: nothing comes unasked but the end, or what is said before it."""
        if self.sock is None:
            return True
        look = select.poll()
        look.register(self.sock, select.POLLIN)
        return bool(look.poll(0))


def _left(until: float) -> float:
    """Seconds; TimeoutError when there are none."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def _connected(host: str, port: int, until: float) -> socket.socket:
    """To the first of its addresses that takes the connection; each gets its share of the time that is left."""
    addresses = _addresses(host, port, until)
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        connecting = socket.socket(family, kind, protocol)
        try:
            connecting.settimeout(_left(until) / (len(addresses) - index))
            connecting.connect(address)
            return connecting
        except OSError:
            connecting.close()
            if index == len(addresses) - 1:
                raise
    raise OSError(f"{host} has no address")


def _addresses(host: str, port: int, until: float) -> list[_AddressInfo]:
    """Asked for by a thread of its own: only the system ends that, and where no name server answers that takes long."""
    answer: Future[list[_AddressInfo]] = Future()

    def ask() -> None:
        try:
            answer.set_result(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        return answer.result(_left(until))
    except TimeoutError:
        raise TimeoutError(f"the address of {host} is not told in time") from None
