"""A datastore by its server's API alone, below the images: bytes that come and go, and what is staged meanwhile."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sidecar.datastores.vsphere_api import VsphereApiDatastore
from sidecar.errors import DatastoreUnavailable, InvalidRequest
from sidecar.vsphere.disks import DatastoreAddress
from sidecar.vsphere.folder import Folder
from tests.vsphere.conftest import PATIENCE, MakeSite, Site

PIECE = bytes(range(256)) * 4096


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_site(kind="host")


@pytest.fixture
def root(site: Site) -> Path:
    return site.roots["one"]


@pytest.fixture
def open_datastore(site: Site) -> Iterator[Callable[..., VsphereApiDatastore]]:
    opened: list[VsphereApiDatastore] = []

    def open_datastore(timeout: float = PATIENCE) -> VsphereApiDatastore:
        opened.append(VsphereApiDatastore("one", DatastoreAddress(site.connection(timeout=timeout), "one")))
        return opened[-1]

    yield open_datastore
    for each in opened:
        each.close()


@pytest.fixture
def datastore(open_datastore: Callable[..., VsphereApiDatastore]) -> VsphereApiDatastore:
    return open_datastore()


def test_a_file_is_read_for_longer_than_the_timeout_of_a_request(
    open_datastore: Callable[..., VsphereApiDatastore], root: Path
) -> None:
    (root / "file").write_bytes(8 * PIECE)
    datastore = open_datastore(timeout=1.0)
    with closing(datastore.open_readable("file")) as file:
        read = file.read(0, 1000)
        while data := file.read(len(read), 2 << 20):
            read += data
            time.sleep(0.6)
    assert read == 8 * PIECE


def test_a_file_is_written_for_longer_than_the_timeout_of_a_request(site: Site, root: Path) -> None:
    connection = site.connection(timeout=1.0)

    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            time.sleep(0.6)
            yield PIECE

    Folder(connection, DatastoreAddress(connection, "one").find).write("file", 3 * len(PIECE), pieces)
    assert (root / "file").read_bytes() == 3 * PIECE


def test_a_download_that_the_server_has_ended_goes_on_where_it_was(
    datastore: VsphereApiDatastore, site: Site, root: Path
) -> None:
    (root / "file").write_bytes(8 * PIECE)
    with closing(datastore.open_readable("file")) as file:
        read = file.read(0, 1000) + file.read(1000, 1000)
        site.simulator.kill()
        site.simulator.start()
        while data := file.read(len(read), 1 << 20):
            read += data
    assert read == 8 * PIECE


def test_a_path_that_leads_out_of_the_datastore_is_never_sent(datastore: VsphereApiDatastore, site: Site) -> None:
    (site.roots["two"] / "file").write_bytes(b"x")
    folder = Folder(datastore.address.connection, datastore.known)
    for path in ("../two/file", "a/../../two/file", "a//b", ""):
        for act in (folder.size, lambda path: folder.read(path, 0, 1), lambda path: folder.write(path, 0, list)):
            with pytest.raises(InvalidRequest):
                act(path)


def test_what_is_read_from_behind_the_end_is_an_error_and_no_content(
    datastore: VsphereApiDatastore, root: Path
) -> None:
    (root / "file").write_bytes(b"12345")
    with pytest.raises(DatastoreUnavailable, match="has ended before 7"):
        datastore.download("file", 7)
    (root / "file").write_bytes(b"")
    with closing(datastore.open_writable("file")) as file:
        assert file.size() == 0
