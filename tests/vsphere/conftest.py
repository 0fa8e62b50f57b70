"""Fixtures: a simulated vCenter and a simulated single host, and connections to them."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyVmomi import vim

from sidecar.vsphere.connection import Connection, Server
from sidecar.vsphere.credentials import from_file
from sidecar.vsphere.disks import DatastoreAddress
from tests.support.vcsim import Vcsim

TIMEOUT = 2.0  # where the server does not answer
PATIENCE = 30.0  # where it does, on a busy machine too


@dataclass(frozen=True)
class Site:
    """A server with the datastores one and two. `connect` makes a connection that is closed with the test."""

    simulator: Vcsim
    roots: dict[str, Path]
    server: Server
    connect: Callable[[Server], Connection]

    def connection(self, **changes: object) -> Connection:
        return self.connect(dataclasses.replace(self.server, **changes))  # type: ignore[arg-type]

    def address(self, connection: Connection, name: str) -> DatastoreAddress:
        return DatastoreAddress(connection, name)


MakeSite = Callable[..., Site]


@pytest.fixture(params=["vcenter", "host"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[MakeSite]:
    """Starts a server; keywords as those of Vcsim."""
    with ExitStack() as stack:

        def connect(server: Server) -> Connection:
            connection = Connection(server)
            stack.callback(connection.close)
            return connection

        def make(**options: object) -> Site:
            roots = {name: tmp_path / name for name in ("one", "two")}
            for root in roots.values():
                root.mkdir(exist_ok=True)
            simulator = stack.enter_context(Vcsim(tmp_path / "vcsim", roots, **options))  # type: ignore[arg-type]
            credentials = from_file(str(simulator.credentials))
            server = Server("sim", "127.0.0.1", simulator.port, credentials, insecure=True, timeout=PATIENCE)
            return Site(simulator, roots, server, connect)

        yield make


@pytest.fixture
def site(make_site: MakeSite, kind: str) -> Site:
    return make_site(kind=kind)


def end_sessions(site: Site) -> None:
    """As an administrator does, or the server by itself when a session was idle for long."""

    def terminate(content: vim.ServiceInstanceContent) -> None:
        manager = content.sessionManager
        assert manager is not None and manager.currentSession is not None
        own = manager.currentSession.key
        manager.TerminateSession([session.key for session in manager.sessionList if session.key != own])

    site.connection().call("end the sessions", terminate)
