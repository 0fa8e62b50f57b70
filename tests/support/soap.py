"""A server that speaks a vSphere server's protocol and answers what a test says: for what the simulator never does."""

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sidecar.vsphere.connection import Server
from sidecar.vsphere.credentials import Credentials
from tests.support.processes import run

_ENVELOPE = (
    '<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"'
    ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xmlns:xsd="http://www.w3.org/2001/XMLSchema">'
    "<soapenv:Body>{}</soapenv:Body></soapenv:Envelope>"
)
_CONTENT = (
    '<rootFolder type="Folder">root</rootFolder><propertyCollector type="PropertyCollector">collector'
    "</propertyCollector><about><name>fake</name><fullName>fake</fullName><vendor>v</vendor><version>8</version>"
    "<build>b</build><osType>l</osType><productLineId>vpx</productLineId><apiType>VirtualCenter</apiType>"
    '<apiVersion>8</apiVersion></about><sessionManager type="SessionManager">sessions</sessionManager>'
    '<virtualDiskManager type="VirtualDiskManager">disks</virtualDiskManager>'
)
LOGGED_IN = (
    "<key>k</key><userName>u</userName><fullName>u</fullName><loginTime>2020-01-01T00:00:00Z</loginTime>"
    "<lastActiveTime>2020-01-01T00:00:00Z</lastActiveTime><locale>en</locale><messageLocale>en</messageLocale>"
)


@dataclass(frozen=True)
class Call:
    """A request: the method, its body, the session that its cookie names, and how many its connection had before."""

    method: str
    body: str
    session: str
    earlier: int


@dataclass(frozen=True)
class Answer:
    """`cookie`: the session that the client is given. `pause`: seconds after each byte. `raw`: bytes instead of HTTP.

    `ended`: the connection is ended after it, though nothing in it says so, and this is set then.
    """

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cookie: str | None = None
    pause: float = 0
    raw: bytes = b""
    ended: threading.Event | None = None


Behavior = Callable[[Call], Answer | None]
"""None: the connection is ended without an answer."""


def returned(call: Call, value: str = "", *, cookie: str | None = None) -> Answer:
    """What the method returns, as XML; nothing for one that returns nothing."""
    value = f"<returnval>{value}</returnval>" if value else ""
    body = f'<{call.method}Response xmlns="urn:vim25">{value}</{call.method}Response>'
    return Answer(_ENVELOPE.format(body).encode(), cookie=cookie)


def content(call: Call) -> Answer:
    """Of RetrieveServiceContent, as a vCenter's."""
    return returned(call, _CONTENT)


def content_of_a_host(call: Call) -> Answer:
    return returned(call, _CONTENT.replace("VirtualCenter", "HostAgent"))


def fault(name: str, *, cookie: str | None = None) -> Answer:
    detail = f'<{name}Fault xmlns="urn:vim25" xsi:type="{name}"/>'
    text = f"<faultcode>x</faultcode><faultstring>y</faultstring><detail>{detail}</detail>"
    return Answer(_ENVELOPE.format(f"<soapenv:Fault>{text}</soapenv:Fault>").encode(), 500, cookie=cookie)


def found(call: Call, *things: str) -> Answer:
    """Of RetrievePropertiesEx: what `thing` makes, in a list."""
    return returned(call, "".join(f"<objects>{thing}</objects>" for thing in things))


def thing(kind: str, key: str, *values: str, missing: tuple[str, str] | None = None) -> str:
    """One of `found`, with what `value` makes; `missing`: a property, and the fault that is told instead of it."""
    made = f'<obj type="{kind}">{key}</obj>' + "".join(f"<propSet>{each}</propSet>" for each in values)
    if missing is not None:
        made += f'<missingSet><path>{missing[0]}</path><fault><fault xsi:type="{missing[1]}"/>'
        made += "<localizedMessage>it is missing</localizedMessage></fault></missingSet>"
    return made


def value(name: str, xml: str, kind: str = "xsd:string") -> str:
    return f'<name>{name}</name><val xsi:type="{kind}">{xml}</val>'


def reference(name: str, kind: str, key: str) -> str:
    return f'<name>{name}</name><val xsi:type="ManagedObjectReference" type="{kind}">{key}</val>'


@contextmanager
def soap_server(directory: Path, behaviors: Mapping[str, Behavior]) -> Iterator[Server]:
    """Behaviors by method, for those that need one; logging in and out does not."""
    known: dict[str, Behavior] = {
        "RetrieveServiceContent": content,
        "Login": lambda call: returned(call, LOGGED_IN, cookie="the-session"),
        "Logout": returned,
        **behaviors,
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        earlier = -1

        def do_POST(self) -> None:
            self.earlier += 1
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            method = re.search(r"Body><(\w+)", body)
            session = re.search(r'vmware_soap_session="?([^";]+)', self.headers.get("Cookie") or "")
            assert method is not None
            answer = known[method[1]](Call(method[1], body, session[1] if session else "", self.earlier))
            if answer is None or answer.raw:
                self.wfile.write(b"" if answer is None else answer.raw)
                self._end()
                return
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.body)))
            if answer.cookie is not None:
                self.send_header("Set-Cookie", f'vmware_soap_session="{answer.cookie}"; Path=/; HttpOnly; Secure')
            for name, text in answer.headers.items():
                self.send_header(name, text)
            self.end_headers()
            for piece in (bytes([byte]) for byte in answer.body) if answer.pause else (answer.body,):
                self.wfile.write(piece)
                time.sleep(answer.pause)
            if answer.ended is not None:
                self._end()
                answer.ended.set()

        def _end(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(directory / "soap.pem"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False  # a client may keep its connections
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            port = server.server_address[1]
            yield Server("fake", "127.0.0.1", port, lambda: Credentials("u", "p"), insecure=True, timeout=5.0)
        finally:
            server.shutdown()
            thread.join()


def make_certificate(file: Path) -> Path:
    """Of 127.0.0.1, with its key in the same file."""
    key = file.with_suffix(".key")
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", file),
    )
    with file.open("a") as both:
        both.write(key.read_text())
    return file
