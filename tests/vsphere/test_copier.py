"""What is done on this host before the server copies a disk."""

import contextlib
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.datastores import vsphere
from sidecar.datastores.vsphere import VsphereDatastore
from sidecar.datastores.writers import Writers
from sidecar.errors import DiskFileFault
from sidecar.images.progress import Progress
from sidecar.locks.flock import Flock
from sidecar.vsphere.connection import Connection, Server
from sidecar.vsphere.credentials import Credentials
from sidecar.vsphere.disks import DatastoreAddress


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


def copy(datastore: Recording) -> None:
    copier = datastore.disk_copier(datastore)
    assert copier is not None
    copier.copy("image_a/a.vmdk", "new/b.vmdk", 10, Progress())


@pytest.mark.parametrize("there", [[], ["b.vmdk"], ["b-flat.vmdk"], ["b.vmdk", "b-flat.vmdk"]])
def test_only_what_is_there_is_removed(
    datastore: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str]
) -> None:
    monkeypatch.setattr(vsphere, "copy_disk", lambda *arguments: None)
    for name in (*there, "b.ecv", "ab.vmdk"):
        (tmp_path / "new" / name).touch()
    copy(datastore)
    assert sorted(datastore.removed) == sorted(f"new/{name}" for name in there)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["ab.vmdk", "b.ecv"]


def test_what_the_server_finds_in_the_way_is_told(
    datastore: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise FileExistsError("server none: FileAlreadyExists [one] new/b.vmdk")

    monkeypatch.setattr(vsphere, "copy_disk", refuse)
    with pytest.raises(DiskFileFault, match="it was not there on this host before: look whether another program"):
        copy(datastore)
