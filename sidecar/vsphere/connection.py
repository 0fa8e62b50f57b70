"""A session with a vCenter or a single ESXi host: begun when it is needed, and again when the server has ended it."""

import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pyVmomi import vim, vmodl

from sidecar.errors import DatastoreDenied, ImagesError
from sidecar.vsphere.bounded import BoundedConnection
from sidecar.vsphere.certificates import pinned, trusted_context
from sidecar.vsphere.credentials import Credentials
from sidecar.vsphere.faults import (
    UNREACHABLE,
    NoConnectionError,
    NoVsphereAnswer,
    ServerUnreachable,
    described,
    translated,
)
from sidecar.vsphere.stub import SessionStub

_LOGOUT_SECONDS = 2.0
# A login that ends at the last moment is still seen by who waited for it.
_LOGIN_GRACE_SECONDS = 1.0
# What a server refused is not sent again for so long: after a few such tries it locks the account.
_REFUSED_SECONDS = 600.0
# That an idle connection had been ended, as by a restart of the server: no other says so.
_CONNECTION_LOST = (ConnectionError, ssl.SSLEOFError)

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is, and how it is known to be that. `timeout`: seconds for each request, and for a login."""

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
        # By the last login: with what, when that may be tried again, and what was said.
        self._refused: tuple[Credentials, float, str] | None = None
        if server.insecure:
            _log.warning("certificate not checked server=%s host=%s see=insecure", server.name, server.host)

    def call(
        self, what: str, operation: Callable[[vim.ServiceInstanceContent], Result], *, repeatable: bool = False
    ) -> Result:
        """What `operation` returns, called with a session; `what` names it in errors, as in "cannot list the VMs".

        It is called again after a new login when the server had ended the session and, when it is `repeatable`, when
        the connection was lost, as an idle one is in a restart of the server. Each of its calls is bounded by the
        timeout, and so is the wait for a login. ServerUnreachable, or another ImagesError; FileNotFoundError and
        FileExistsError are answers.
        """
        may_log_in, may_reconnect = True, repeatable
        expired: vim.ServiceInstanceContent | None = None
        with translated(self.server.name, what):
            while True:
                content = self._session(expired)
                try:
                    return operation(content)
                except vim.fault.NotAuthenticated:
                    if not may_log_in:
                        raise
                    may_log_in, expired = False, content
                except (FileNotFoundError, FileExistsError):
                    raise  # answers, which are OSErrors, too
                except UNREACHABLE as error:
                    if not may_reconnect or isinstance(error, TimeoutError | NoConnectionError):
                        raise
                    may_reconnect = False

    def close(self) -> None:
        """Ends the session, when the server is there to do so, in a few seconds at most. Called when no call runs."""
        content, stub, self._content = self._content, self._stub, None
        if content is None or stub is None or content.sessionManager is None:
            return
        stub.timeout = _LOGOUT_SECONDS
        with contextlib.suppress(vmodl.MethodFault, *UNREACHABLE):
            content.sessionManager.Logout()
        stub.DropConnections()

    def _session(self, expired: vim.ServiceInstanceContent | None) -> vim.ServiceInstanceContent:
        """What a login gave, and not the one that has `expired`: that of another thread since then, or a new one."""
        seen = self._failures
        with self._locked():
            if self._content is expired:
                self._content = None
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

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """A login has the timeout; only one that waits for something else, as for its credentials, is longer."""
        if not self._lock.acquire(timeout=self.server.timeout + _LOGIN_GRACE_SECONDS):
            raise ServerUnreachable(f"server {self.server.name}: cannot log in: another call does so, and does not end")
        try:
            yield
        finally:
            self._lock.release()

    def _login(self) -> vim.ServiceInstanceContent:
        server = self.server
        now = time.monotonic()
        until = now + server.timeout
        if self._refused is not None and now < self._refused[1] and self._credentials() == self._refused[0]:
            raise self._wrong_credentials(self._refused[2])
        with self._naming_the_server():
            context = trusted_context(server.ca_file, verify=not server.insecure and server.thumbprint is None)
        if self._stub is None:
            # Not SmartConnect: it asks for versions without a timeout, and trusts whoever answers as localhost.
            connections = BoundedConnection if server.thumbprint is None else pinned(server.thumbprint)
            self._stub = SessionStub(server.host, server.port, server.timeout, connections)
        with self._stub.logging_in(until, context):
            try:
                content = self._begin_session(self._stub)
            except _CONNECTION_LOST:
                # Nothing is done twice by that: what the server began has no user.
                content = self._begin_session(self._stub)
        _log.info("logged in server=%s host=%s product=%r", server.name, server.host, content.about.fullName)
        return content

    def _begin_session(self, stub: SessionStub) -> vim.ServiceInstanceContent:
        content = vim.ServiceInstance("ServiceInstance", stub).RetrieveContent()
        needed = (content.about, content.rootFolder, content.propertyCollector)
        if content.sessionManager is None or any(each is None for each in needed):
            raise NoVsphereAnswer("it does not tell what it has")
        credentials = self._credentials()
        try:
            content.sessionManager.Login(credentials.user, credentials.password, None)
        except vim.fault.InvalidLogin as fault:
            said = described(fault)
            self._refused = credentials, time.monotonic() + _REFUSED_SECONDS, said
            raise self._wrong_credentials(said) from None
        self._refused = None
        return content

    def _credentials(self) -> Credentials:
        with self._naming_the_server():
            return self.server.credentials()

    @contextmanager
    def _naming_the_server(self) -> Iterator[None]:
        try:
            yield
        except DatastoreDenied as error:
            raise DatastoreDenied(f"server {self.server.name}: cannot log in: {error.message}") from error

    def _wrong_credentials(self, said: str) -> DatastoreDenied:
        return DatastoreDenied(
            f"server {self.server.name}: cannot log in: wrong user or password, it says {said}; put right the "
            "configured credentials, which is seen at once: the same are tried again every "
            f"{_REFUSED_SECONDS / 60:g} minutes only, since servers lock an account after a few tries"
        )
