"""What a server says went wrong, as errors that tell what to do: provoked where the simulator can be made to say so."""

from pathlib import Path

import pytest
from pyVmomi import vim, vmodl

from sidecar.errors import (
    DatastoreDenied,
    DatastoreUnavailable,
    DiskFileFault,
    ImageInUse,
    ImagesError,
    InvalidRequest,
    NoSpace,
    OperationCancelled,
)
from sidecar.vsphere.disks import copy_task, find_all
from sidecar.vsphere.faults import error_of
from sidecar.vsphere.inventory import find_datastore
from sidecar.vsphere.tasks import run_task
from tests.support.places import write_flat_disk
from tests.support.processes import loop_mount
from tests.vsphere.conftest import Site


@pytest.fixture
def one(site: Site) -> Path:
    """The directory of datastore one, with a disk a in it."""
    write_flat_disk(site.roots["one"], "a")
    return site.roots["one"]


def copy(site: Site, source: str, destination: str, *, to: str = "one") -> None:
    connection = site.connection()
    here, there = find_all(site.address(connection, "one"), site.address(connection, to))
    copy_task(connection, here, source, there, destination).run(lambda percent: None)


def copy_by_names(site: Site, source: str, destination: str) -> None:
    """With datastore paths as they are sent."""
    connection = site.connection()
    datacenter = find_datastore(connection, "one").datacenter

    def start(content: vim.ServiceInstanceContent) -> vim.Task:
        assert content.virtualDiskManager is not None
        task: vim.Task = content.virtualDiskManager.CopyVirtualDisk_Task(
            source, datacenter, destination, datacenter, None, None
        )
        return task

    run_task(connection, "copy", start, lambda percent: None)


def test_a_copy_onto_a_disk_that_is_there(site: Site, one: Path) -> None:
    write_flat_disk(one, "b", seed=7)
    before = (one / "b-flat.vmdk").read_bytes()
    with pytest.raises(FileExistsError, match="FileAlreadyExists"):
        copy(site, "a.vmdk", "b.vmdk")
    assert (one / "b-flat.vmdk").read_bytes() == before


def test_a_copy_of_what_is_not_there(site: Site, one: Path) -> None:
    with pytest.raises(FileNotFoundError, match="FileNotFound"):
        copy(site, "missing.vmdk", "b.vmdk")


def test_a_copy_into_a_directory_that_is_not_there(site: Site, one: Path) -> None:
    with pytest.raises(FileNotFoundError, match="FileNotFound"):
        copy(site, "a.vmdk", "nowhere/b.vmdk")


def test_a_source_that_cannot_be_opened(site: Site, one: Path) -> None:
    (one / "a-flat.vmdk").unlink()
    (one / "a-flat.vmdk").symlink_to("a-flat.vmdk")
    with pytest.raises(DatastoreUnavailable, match=r"CannotAccessFile .*; look at the datastore"):
        copy(site, "a.vmdk", "b.vmdk")


def test_a_disk_that_cannot_be_created(site: Site, one: Path) -> None:
    (one / "b-flat.vmdk").symlink_to("b-flat.vmdk")
    with pytest.raises(DiskFileFault, match=r"CannotCreateFile .*; look at the file"):
        copy(site, "a.vmdk", "b.vmdk")


def test_a_full_datastore(site: Site, one: Path, tmp_path: Path) -> None:
    """The simulator has no NoDiskSpace of its own."""
    with loop_mount(tmp_path / "small", 1 << 20, ("mkfs.ext4", "-q", "-m", "0")) as small:
        (site.roots["two"] / "small").symlink_to(small)
        with pytest.raises(DiskFileFault, match=r"CannotCreateFile .*the space on the datastore"):
            copy(site, "a.vmdk", "small/b.vmdk", to="two")


def test_a_datastore_that_the_server_does_not_have(site: Site, one: Path) -> None:
    with pytest.raises(DatastoreUnavailable, match=r"InvalidDatastore none .*; look at the datastore in the server's"):
        copy_by_names(site, "[none] a.vmdk", "[one] b.vmdk")


def test_a_datastore_path_that_cannot_be_read(site: Site, one: Path) -> None:
    with pytest.raises(DatastoreUnavailable, match="InvalidDatastorePath"):
        copy_by_names(site, "[one a.vmdk", "[one] b.vmdk")


@pytest.mark.parametrize("path", ["../two/a.vmdk", "x/../../two/a.vmdk", "/etc/a.vmdk", "x//a.vmdk", "./a.vmdk", ""])
def test_a_path_that_could_lead_out_of_the_datastore_is_never_sent(site: Site, one: Path, path: str) -> None:
    write_flat_disk(site.roots["two"], "a")
    for names in ((path, "b.vmdk"), ("a.vmdk", path)):
        with pytest.raises(InvalidRequest, match="not a path within the datastore one"):
            copy(site, *names)
    assert sorted(file.name for file in one.iterdir()) == ["a-flat.vmdk", "a.vmdk"]


def test_a_method_that_a_server_does_not_have(site: Site, one: Path) -> None:
    connection = site.connection()
    with pytest.raises(DatastoreUnavailable, match="cannot defragment: "):
        connection.call(
            "defragment",
            lambda content: content.virtualDiskManager.DefragmentVirtualDisk_Task("[one] a.vmdk"),  # type: ignore
        )


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (vim.fault.FileNotFound(file="[one] a"), FileNotFoundError),
        (vim.fault.FileAlreadyExists(file="[one] a"), FileExistsError),
        (vim.fault.NoDiskSpace(file="[one] a", datastore="one"), NoSpace),
        (vim.fault.FileTooLarge(file="[one] a", datastore="one"), NoSpace),
        (vim.fault.FileLocked(file="[one] a"), ImageInUse),
        (vim.fault.FileNotWritable(file="[one] a"), DatastoreDenied),
        (vim.fault.CannotAccessFile(file="[one] a"), DatastoreUnavailable),
        (vim.fault.CannotDeleteFile(file="[one] a"), DiskFileFault),
        (vim.fault.InaccessibleDatastore(name="one"), DatastoreUnavailable),
        (vim.fault.NoPermission(privilegeId="Datastore.FileManagement"), DatastoreDenied),
        (vim.fault.NotAuthenticated(), DatastoreUnavailable),
        (vim.fault.InvalidLogin(), DatastoreDenied),
        (vmodl.fault.HostNotConnected(), DatastoreUnavailable),
        (vmodl.fault.HostNotReachable(), DatastoreUnavailable),
        (vmodl.fault.ManagedObjectNotFound(), DatastoreUnavailable),
        (vmodl.fault.RequestCanceled(), OperationCancelled),
        (vmodl.fault.SystemError(reason="x"), DatastoreUnavailable),
        (vmodl.fault.NotSupported(), DatastoreUnavailable),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_what_the_simulator_never_says_is_told_apart_too(fault: Exception, error: type[Exception]) -> None:
    """The library's own faults, as a server sends them."""
    found = error_of(fault, "sim", "copy a.vmdk")
    assert type(found) is error
    text = found.message if isinstance(found, ImagesError) else str(found)
    assert text.startswith(f"server sim: cannot copy a.vmdk: {type(fault).__name__.rpartition('.')[2]}")


@pytest.mark.parametrize(
    "fault",
    [
        vim.fault.CannotAccessFile(file="[one] a\n2020-01-01 ERROR forged", msg="\x1b[31mred"),
        vim.fault.CannotAccessFile(file="[one] a", msg="long " * 10_000),
    ],
)
def test_what_a_server_says_cannot_forge_a_log_or_fill_it(fault: Exception) -> None:
    text = str(error_of(fault, "sim", "copy a.vmdk"))
    assert text.isprintable()
    assert len(text) < 1_000
