"""Fixtures: a simulated vCenter and a single host, connections to them, and sidecars with their datastores."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyVmomi import vim

from sidecar.client import SidecarClient
from sidecar.vsphere import properties
from sidecar.vsphere.connection import Connection, Server
from sidecar.vsphere.credentials import from_file
from sidecar.vsphere.disks import DatastoreAddress
from tests.support.disks import import_image, make_disk
from tests.support.places import Place
from tests.support.processes import Sidecar, imagectl, wait_until
from tests.support.vcsim import PASSWORD, USER, Vcsim

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


@dataclass
class Served:
    """A sidecar with the datastores one and two of a server, and three on a directory of this host alone."""

    site: Site
    sidecar: Sidecar
    client: SidecarClient
    places: dict[str, Place]

    def imagectl(self, *arguments: str, check: bool = True) -> tuple[int, str]:
        result = imagectl(self.sidecar.address, *arguments, check=check)
        return result.returncode, result.stderr

    def import_image(self, ref: str, directory: Path, *, subformat: str = "monolithicFlat") -> Path:
        source = make_disk(directory / "source", subformat=subformat)
        import_image(self.client, ref, source, companions={"disk.ecv": b"{}"})
        return source

    def copies(self) -> int:
        """How many disks the server has begun to copy."""

        def count(content: vim.ServiceInstanceContent) -> int:
            assert content.taskManager is not None
            tasks = properties.read(content, content.taskManager, ["recentTask"]).get("recentTask", [])
            names = [properties.read(content, task, ["info.descriptionId"])["info.descriptionId"] for task in tasks]
            return names.count("VirtualDiskManager.copyVirtualDisk")

        return self.site.connection().call("count the copies", count)

    def assert_tidy(self) -> None:
        wait_until(lambda: not any(place.leftovers() for place in self.places.values()), "nothing is left", 5)


@pytest.fixture
def serve(make_site: MakeSite, kind: str, tmp_path: Path, stack: ExitStack) -> Iterator[Callable[..., Served]]:
    """Starts both; `layout` and `reserve` of all datastores, "" for what follows from the type, `more` TOML in each
    of the server's, `maintenance` in the table of that name, other keywords as of Vcsim.

    Without `path`, those of the server are reached by its API alone. `paths`: of which one each has the path, as it is
    misconfigured.
    """
    started: list[Sidecar] = []

    def start(
        *,
        layout: str = "compound",
        more: str = "",
        maintenance: str = "",
        reserve: str = "0",
        timeout: float = PATIENCE,
        path: bool = True,
        paths: Mapping[str, str] | None = None,
        **options: object,
    ) -> Served:
        site = make_site(kind=kind, **options)
        roots = {**site.roots, "three": tmp_path / "three"}
        roots["three"].mkdir()
        config = site.simulator.configuration(timeout) + f"[maintenance]\n{maintenance}\n"
        roots.update({name: site.roots[other] for name, other in (paths or {}).items()})
        for name, root in roots.items():
            told = layout or ("" if name in site.roots else "compound")
            config += f'[datastore.{name}]\nreserve = "{reserve}"\n' + (f'layout = "{told}"\n' if told else "")
            if path or name not in site.roots:
                config += f'path = "{root}"\nlocks = "flock"\n'
            if name in site.roots:
                config += f'type = "vsphere"\nserver = "sim"\n{more}\n'
        sidecar = stack.enter_context(Sidecar(tmp_path / "run", config=config))
        started.append(sidecar)
        types = options.get("types", {})
        assert isinstance(types, dict)
        layouts = {name: layout or ("vsan" if types.get(name) == "vsan" else "compound") for name in roots}
        places = {name: Place(name, layouts[name], root) for name, root in roots.items()}
        return Served(site, sidecar, stack.enter_context(sidecar.client()), places)

    yield start
    for sidecar in started:
        log = sidecar.log.read_text()
        assert USER not in log and PASSWORD not in log
        assert "Traceback" not in log


def end_sessions(site: Site) -> None:
    """As an administrator does, or the server by itself when a session was idle for long."""

    def terminate(content: vim.ServiceInstanceContent) -> None:
        manager = content.sessionManager
        assert manager is not None and manager.currentSession is not None
        own = manager.currentSession.key
        manager.TerminateSession([session.key for session in manager.sessionList if session.key != own])

    site.connection().call("end the sessions", terminate)
