"""What is done on this host before the server copies a disk."""

import contextlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from pyVmomi import vim

from sidecar.datastores import server_copy, vsphere
from sidecar.datastores.vsphere import VsphereDatastore
from sidecar.datastores.writers import Writers
from sidecar.errors import DatastoreUnavailable, DiskFileFault
from sidecar.images.progress import Progress
from sidecar.locks.flock import Flock
from sidecar.vsphere.connection import Connection, Server
from sidecar.vsphere.credentials import Credentials
from sidecar.vsphere.disks import DatastoreAddress
from sidecar.vsphere.inventory import ServerDatastore


class Recording(VsphereDatastore):
    """Notes what is removed."""

    def remove_tree(self, path: str) -> int:
        self.removed.append(path)
        return super().remove_tree(path)

    removed: list[str]


@pytest.fixture
def datastore(tmp_path: Path, stack: ExitStack) -> Recording:
    connection = Connection(Server("none", "127.0.0.1", 1, lambda: Credentials("u", "p")))
    address = DatastoreAddress(connection, "one")
    found = stack.enter_context(contextlib.closing(Recording("one", str(tmp_path), Flock(), Writers(), address)))
    found.removed = []
    (tmp_path / "new").mkdir()
    return found


@dataclass
class Task:
    """In the place of the server's."""

    error: Exception | None = None

    def run(self, follow: object) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    task = Task()
    monkeypatch.setattr(server_copy, "find_all", lambda *addresses: addresses)
    monkeypatch.setattr(server_copy, "copy_task", lambda *arguments, **more: task)
    monkeypatch.setattr(VsphereDatastore, "require_same", lambda *arguments: None)
    return task


def copy(datastore: Recording) -> None:
    copier = datastore.disk_copier(datastore)
    assert copier is not None
    copier.copy("image_a/a.vmdk", "new/b.vmdk", 10, None, Progress())


@pytest.mark.parametrize("there", [[], ["b.vmdk"], ["b-flat.vmdk"], ["b.vmdk", "b-flat.vmdk"]])
def test_only_what_is_there_is_removed(datastore: Recording, tmp_path: Path, task: Task, there: list[str]) -> None:
    for name in (*there, "b.ecv", "ab.vmdk"):
        (tmp_path / "new" / name).touch()
    copy(datastore)
    assert sorted(datastore.removed) == sorted(f"new/{name}" for name in there)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["ab.vmdk", "b.ecv"]


def test_what_the_server_finds_in_the_way_is_told(datastore: Recording, task: Task) -> None:
    task.error = FileExistsError("server none: FileAlreadyExists [one] new/b.vmdk")
    with pytest.raises(DiskFileFault, match="it was not there for this host before: look whether another program"):
        copy(datastore)


def test_what_was_not_even_tried_removes_nothing(datastore: Recording, tmp_path: Path) -> None:
    """The server is away."""
    (tmp_path / "new" / "b.vmdk").touch()
    with pytest.raises(DatastoreUnavailable, match="cannot log in"):
        copy(datastore)
    assert datastore.removed == []


ONE = ServerDatastore(
    vim.Datastore("datastore-1"),
    vim.Datacenter("dc"),
    "one",
    "/DC/one",
    *("NFS", 10, 10, True),
)


def test_that_the_server_has_the_same_datastore_is_asked_once_and_again_when_it_has_another(
    datastore: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def is_seen(connection: object, found: ServerDatastore, directory: str, name: str, follow: object) -> bool:
        assert (tmp_path / directory / name).exists()
        asked.append(name)
        return len(asked) % 2 == 0  # an NFS client sees it late

    monkeypatch.setattr(vsphere, "is_seen", is_seen)
    for found in (ONE, ONE, replace(ONE, url="other"), replace(ONE, datastore=vim.Datastore("datastore-2"))):
        datastore.require_same(found, "new", lambda percent: None)
    assert len(asked) == len(set(asked)) * 2 == 6
    assert list((tmp_path / "new").iterdir()) == []


def test_another_datastore_is_not_copied_from(
    datastore: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsphere, "is_seen", lambda *arguments: False)
    monkeypatch.setattr(vsphere, "_APPEARING_SECONDS", 0.0)
    for _ in range(2):
        with pytest.raises(DatastoreUnavailable, match="is not where the server has its datastore; put right the path"):
            datastore.require_same(ONE, "new", lambda percent: None)
    assert list((tmp_path / "new").iterdir()) == []
