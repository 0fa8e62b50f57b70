"""A session with a vCenter or a single ESXi host: begun when it is needed, and again when the server has ended it."""

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pyVmomi import vim, vmodl

from sidecar.errors import ImagesError
from sidecar.vsphere.certificates import pinned, trusted_context
from sidecar.vsphere.credentials import Credentials
from sidecar.vsphere.faults import UNREACHABLE, NoVsphereAnswer, translated
from sidecar.vsphere.stub import SessionStub

_LOGOUT_SECONDS = 2.0

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is, and how it is known to be that. `timeout`: seconds without a byte until a call is given up."""

    name: str
    host: str
    port: int
    credentials: Callable[[], Credentials]
    ca_file: str | None = None
    thumbprint: str | None = None
    insecure: bool = False
    timeout: float = 30.0


class Connection:
    """The calls to one server. Safe for several threads, which share the session. Opens nothing before a call."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._lock = threading.Lock()  # guards all of these
        # One for as long as this lives: the references that calls gave keep working over a new login.
        self._stub: SessionStub | None = None
        self._content: vim.ServiceInstanceContent | None = None  # None: not logged in
        self._failure: tuple[type[ImagesError], str] | None = None  # of the last login, and its message
        self._failures = 0
        if server.insecure:
            _log.warning("certificate not checked server=%s host=%s see=insecure", server.name, server.host)

    def call(
        self, what: str, operation: Callable[[vim.ServiceInstanceContent], Result], *, repeatable: bool = False
    ) -> Result:
        """What `operation` returns, called with a session; `what` names it in errors, as in "cannot list the VMs".

        It is called again after a new login when the server had ended the session and, when it is `repeatable`, when
        the connection was lost, as an idle one is in a restart of the server. Each of its calls is bounded by the
        timeout. ServerUnreachable, or another ImagesError; FileNotFoundError and FileExistsError are answers.
        """
        may_log_in, may_reconnect = True, repeatable
        with translated(self.server.name, what):
            while True:
                content = self._session()
                try:
                    return operation(content)
                except vim.fault.NotAuthenticated:
                    if not may_log_in:
                        raise
                    may_log_in = False
                    self._forget(content)
                except UNREACHABLE as error:
                    if not may_reconnect or isinstance(error, TimeoutError):
                        raise
                    may_reconnect = False

    def close(self) -> None:
        """Ends the session, when the server is there to do so, in a few seconds at most. Called when no call runs."""
        content, stub, self._content = self._content, self._stub, None
        if content is None or stub is None or content.sessionManager is None:
            return
        stub.DropConnections()  # they have the long timeout
        stub.schemeArgs["timeout"] = _LOGOUT_SECONDS
        with contextlib.suppress(vmodl.MethodFault, *UNREACHABLE):
            content.sessionManager.Logout()
        stub.DropConnections()

    def _forget(self, content: vim.ServiceInstanceContent) -> None:
        """The next call logs in, unless another thread has done so since."""
        with self._lock:
            if self._content is content:
                self._content = None

    def _session(self) -> vim.ServiceInstanceContent:
        seen = self._failures
        with self._lock:
            if self._content is None:
                if self._failure is not None and self._failures != seen:
                    # It was tried while this thread waited: or each of them would wait for a timeout more.
                    error_class, message = self._failure
                    raise error_class(message)
                try:
                    with translated(self.server.name, "log in"):
                        self._content = self._login()
                except ImagesError as error:
                    self._failure, self._failures = (type(error), error.message), self._failures + 1
                    raise
            return self._content

    def _login(self) -> vim.ServiceInstanceContent:
        if self._stub is None:
            self._stub = self._make_stub()
        with self._stub.logging_in():
            content = vim.ServiceInstance("ServiceInstance", self._stub).RetrieveContent()
            needed = (content.about, content.rootFolder, content.propertyCollector)
            if content.sessionManager is None or any(each is None for each in needed):
                raise NoVsphereAnswer("it does not tell what it has")
            credentials = self.server.credentials()
            content.sessionManager.Login(credentials.user, credentials.password, None)
        _log.info("logged in server=%s host=%s product=%r", self.server.name, self.server.host, content.about.fullName)
        return content

    def _make_stub(self) -> SessionStub:
        # Not SmartConnect: it asks for versions without a timeout, and trusts whoever answers as localhost.
        server = self.server
        context = trusted_context(server.ca_file, verify=not server.insecure and server.thumbprint is None)
        stub = SessionStub(host=server.host, port=server.port, sslContext=context, httpConnectionTimeout=server.timeout)
        if server.thumbprint is not None:
            stub.scheme = cast(Any, pinned(server.thumbprint))
        return stub
