"""pyvmomi's calls over HTTPS, with one session for several threads, and where what answers is no vSphere API."""

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyVmomi import vmodl
from pyVmomi.SoapAdapter import SoapStubAdapter
from pyVmomi.VmomiSupport import CheckField, Object

from sidecar.vsphere.bounded import BoundedConnection
from sidecar.vsphere.faults import UNREACHABLE, NoConnectionError, NoVsphereAnswer

# Servers, and what is between, end connections that are idle for longer: some after half a minute.
IDLE_SECONDS = 20.0


class SessionStub(SoapStubAdapter):
    """Sends the cookie of the last login, and takes none but a login's. Each call ends within `timeout` seconds.

    pyvmomi takes the cookie of every answer: a late one to an expired session would replace that of a new login.
    """

    _context: ssl.SSLContext  # of the last login

    def __init__(self, host: str, port: int, timeout: float, connections: type[BoundedConnection]) -> None:
        self.timeout = timeout
        self._session = ""
        self._login = threading.local()  # in the thread that logs in: its cookie, and until when
        self._call = threading.local()  # until when, once it is about to be sent
        super().__init__(  # type: ignore[no-untyped-call]
            host=host,
            port=port,
            connectionPoolTimeout=IDLE_SECONDS,
            # What is no API may send anything as compressed, and answers are small.
            acceptCompressedResponses=False,
        )
        self.scheme: Any = lambda host, port: connections(host, port, self._call.until, self._context)

    @contextmanager
    def logging_in(self, until: float, context: ssl.SSLContext) -> Iterator[None]:
        """This thread's calls begin a session, which all calls use when the block has ended without an error.

        They have ended by `until`, of time.monotonic, all together: others wait for the session. What is trusted from
        here on is in `context`.
        """
        self._context = context
        self.DropConnections()
        self._login.cookie, self._login.until = "", until
        try:
            yield
            self._session = self._login.cookie
        finally:
            del self._login.cookie, self._login.until

    @property
    def cookie(self) -> str:
        return str(getattr(self._login, "cookie", self._session))

    @cookie.setter
    def cookie(self, value: str) -> None:
        if hasattr(self._login, "cookie"):
            self._login.cookie = value

    def InvokeMethod(self, mo: Any, info: Any, args: Any, outerStub: Any = None) -> Any:  # noqa: N802, N803
        """As pyvmomi's. What it raises is a MethodFault or one of UNREACHABLE, or of a call that cannot be sent."""
        self._call.until = None
        try:
            result = super().InvokeMethod(mo, info, args, outerStub)  # type: ignore[no-untyped-call]
            if info.result is not type(None):
                CheckField(Object(name=info.name, type=info.result, flags=info.resultFlags), result)
            return result
        except (vmodl.MethodFault, *UNREACHABLE):
            raise
        except Exception as error:  # of the many ways to fail at an answer that is none
            if self._call.until is None:
                raise
            raise NoVsphereAnswer(f"{type(error).__name__}: {error}") from error

    def GetConnection(self) -> BoundedConnection:  # noqa: N802
        """Once for each call, and connected; NoConnectionError."""
        self._call.until = getattr(self._login, "until", time.monotonic() + self.timeout)
        self._drop_ended()
        try:
            connection: BoundedConnection = super().GetConnection()  # type: ignore[no-untyped-call]
        except UnicodeError as error:
            raise NoConnectionError(OSError(f"{self.host} is no address: {error}")) from error
        except OSError as error:
            raise NoConnectionError(error) from error
        connection.bound(self._call.until)
        return connection

    def _drop_ended(self) -> None:
        """Takes the idle connections that the server has ended out of the pool: no call has to find out."""
        with self.lock:
            ended = [pooled for pooled in self.pool if pooled[0].was_ended_by_the_server()]
            self.pool = [pooled for pooled in self.pool if pooled not in ended]
        for connection, _ in ended:
            connection.close()
