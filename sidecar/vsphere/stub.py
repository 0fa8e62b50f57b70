"""pyvmomi's calls over HTTPS, with one session for several threads, and where what answers is no vSphere API."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyVmomi import vmodl
from pyVmomi.SoapAdapter import SoapStubAdapter
from pyVmomi.VmomiSupport import CheckField, Object

from sidecar.vsphere.faults import UNREACHABLE, NoVsphereAnswer


class SessionStub(SoapStubAdapter):
    """Sends the cookie of the last login, and takes none but a login's.

    pyvmomi takes that of every answer: a late one to an expired session would replace the cookie of a new login.
    """

    def __init__(self, **arguments: Any) -> None:
        self._session = ""
        self._login = threading.local()  # its cookie, in the thread that logs in
        # What is no API may send anything as compressed, and answers are small.
        super().__init__(acceptCompressedResponses=False, **arguments)  # type: ignore[no-untyped-call]

    @contextmanager
    def logging_in(self) -> Iterator[None]:
        """This thread's calls begin a session, which all calls use when the block has ended without an error."""
        self._login.cookie = ""
        try:
            yield
            self._session = self._login.cookie
        finally:
            del self._login.cookie

    @property
    def cookie(self) -> str:
        return str(getattr(self._login, "cookie", self._session))

    @cookie.setter
    def cookie(self, value: str) -> None:
        if hasattr(self._login, "cookie"):
            self._login.cookie = value

    def InvokeMethod(self, mo: Any, info: Any, args: Any, outerStub: Any = None) -> Any:  # noqa: N802, N803
        """As pyvmomi's. What it raises is a MethodFault or one of UNREACHABLE."""
        try:
            result = super().InvokeMethod(mo, info, args, outerStub)  # type: ignore[no-untyped-call]
            if info.result is not type(None):
                CheckField(Object(name=info.name, type=info.result, flags=info.resultFlags), result)
            return result
        except (vmodl.MethodFault, *UNREACHABLE):
            raise
        except Exception as error:  # of the many ways to fail at an answer that is none
            text = " ".join(str(error).split())[:200]
            raise NoVsphereAnswer(f"{type(error).__name__}: {text}") from error

    def GetConnection(self) -> Any:  # noqa: N802
        try:
            return super().GetConnection()  # type: ignore[no-untyped-call]
        except UnicodeError as error:
            raise OSError(f"{self.host} is no address: {error}") from error
