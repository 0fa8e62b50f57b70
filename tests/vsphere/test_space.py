"""Datastores by their server's API alone that have too little space: holes are sent there, and take it as zeroes do."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from sidecar.datastores.vsphere_api import VsphereApiDatastore
from sidecar.errors import DatastoreUnavailable, NoSpace
from sidecar.images.committing import StagedDisk, commit
from sidecar.images.layouts import LAYOUTS
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from sidecar.vsphere.faults import ServerUnreachable
from sidecar.vsphere.folder import Folder
from tests.support.disks import MIB, make_disk
from tests.support.processes import Mount, imagectl, loop_mount, run
from tests.vsphere.conftest import MakeSite, Served, Site

Serve = Callable[..., Served]
EXT4 = ("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal")
DATA = ((0, 2 * MIB),)
NO_SPACE = 7


@pytest.fixture
def kind() -> str:
    return "host"


@pytest.fixture
def small(tmp_path: Path, stack: ExitStack) -> Path:
    """What the datastore two is on: there is room for the data of a disk of 64 MiB, and not for its holes."""
    small = stack.enter_context(loop_mount(tmp_path / "small", 32 * MIB, EXT4))
    (small / "lost+found").rmdir()
    (tmp_path / "two").symlink_to(small)
    return small


@pytest.fixture
def served(serve: Serve, small: Path) -> Iterator[Served]:
    served = serve(path=False, reserve="1MiB")
    yield served
    served.sidecar.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "source", size=64 * MIB, data=DATA)


def uploads(served: Served) -> int:
    return served.site.simulator.requests()["PUT /folder"]


def test_the_holes_of_a_disk_that_do_not_fit_are_refused_before_its_import_begins(served: Served, disk: Path) -> None:
    before = uploads(served)
    result = imagectl(served.sidecar.address, "import", str(disk), "two/b", check=False)
    assert result.returncode == NO_SPACE
    assert "two is full: 671" in result.stderr  # 64 MiB, and the descriptor
    assert uploads(served) == before
    served.places["two"].assert_holds({})


def test_a_disk_that_fits_only_into_the_reserve_is_refused_before_its_import_begins(
    serve: Serve, small: Path, tmp_path: Path
) -> None:
    free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
    served = serve(path=False, reserve=str(free - 4 * MIB))
    disk = make_disk(tmp_path / "source", data=DATA)
    assert imagectl(served.sidecar.address, "import", str(disk), "two/b", check=False).returncode == NO_SPACE
    assert served.imagectl("import", str(disk), "one/a")[0] == 0
    assert imagectl(served.sidecar.address, "cp", "one/a", "two/b", check=False).returncode == NO_SPACE
    served.places["two"].assert_holds({})
    served.sidecar.stop()


def test_holes_that_are_written_by_a_client_are_refused_before_anything_is_sent(served: Served, disk: Path) -> None:
    """It did not tell what would come."""
    with served.client.create_staging("two/b") as staging:
        before = uploads(served)
        staging.write_file(disk.name, [(0, disk.read_bytes())])
        staging.write_file("disk-flat.vmdk", [(0, bytes(MIB))], size=64 * MIB)
        with pytest.raises(NoSpace, match="two is full: 671"):
            staging.commit()
        assert uploads(served) == before
    served.places["two"].assert_holds({})


def test_a_copy_of_holes_from_a_datastore_of_this_host_is_refused_before_anything_is_sent(
    served: Served, disk: Path
) -> None:
    served.imagectl("import", str(disk), "three/a")
    before = uploads(served)
    result = imagectl(served.sidecar.address, "cp", "three/a", "two/b", check=False)
    assert (result.returncode, uploads(served)) == (NO_SPACE, before), result.stderr
    with served.client.create_staging("two/b") as staging, pytest.raises(NoSpace, match="two is full: 671"):
        staging.clone_range("three/a", "a-flat.vmdk", 0, "disk-flat.vmdk", 0, 64 * MIB)


def test_a_sync_of_what_does_not_fit_says_in_a_mount_that_there_is_no_space(
    served: Served, disk: Path, tmp_path: Path, stack: ExitStack
) -> None:
    mount = stack.enter_context(Mount(tmp_path / "mnt", served.sidecar.address)).path
    run("cp", "-r", "--sparse=always", disk.parent, mount / "two" / "b")
    before = uploads(served)
    result = run("sync", mount / "two" / "b", check=False)
    assert "No space left on device" in result.stderr
    assert "two is full" in (mount / "two" / "b" / ".image.json").read_text()
    assert uploads(served) == before
    run("rm", "-r", mount / "two" / "b")


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_site(kind="host")


@pytest.fixture
def datastore(small: Path, site: Site) -> Iterator[VsphereApiDatastore]:
    with closing(VsphereApiDatastore("two", site.address(site.connection(), "two"))) as datastore:
        yield datastore


def stage(datastore: VsphereApiDatastore, path: str, size: int) -> None:
    with closing(datastore.open_writable(path)) as file:
        file.resize(size)


def test_an_upload_that_breaks_off_as_the_datastore_got_full_is_no_fault_of_the_network(
    datastore: VsphereApiDatastore,
) -> None:
    datastore.make_directory("d")
    stage(datastore, "d/file", 256 * MIB)
    with pytest.raises(NoSpace, match=r"two.* of 268435456 bytes of d/file it has"):
        datastore.sync_file("d/file")


def test_an_upload_that_breaks_off_with_room_for_the_rest_is_no_lack_of_space(
    datastore: VsphereApiDatastore, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datastore.make_directory("d")
    stage(datastore, "d/file", 24 * MIB)

    def break_off(folder: Folder, path: str, size: int, pieces: object) -> None:
        (small / path).write_bytes(bytes(16 * MIB))
        raise ServerUnreachable("it hung up")

    monkeypatch.setattr(Folder, "write", break_off)
    with pytest.raises(DatastoreUnavailable, match="hung up"):
        datastore.sync_file("d/file")


def test_the_space_is_looked_at_once_for_all_files_of_an_import(
    datastore: VsphereApiDatastore, site: Site, tmp_path: Path
) -> None:
    store = ImageStore(datastore, LAYOUTS["compound"])
    disk = make_disk(tmp_path / "source")
    with StagingDirectory(store, "b", "import") as staging:
        for path in sorted(disk.parent.iterdir()):
            with closing(staging.open_writable(path.name)) as file:
                file.write(0, path.read_bytes())
        for number in range(8):
            with closing(staging.open_writable(f"disk.{number}.json")) as file:
                file.write(0, b"{}")
        before = site.simulator.requests()
        commit(staging, StagedDisk(staging))
    assert (site.simulator.requests() - before)["RefreshDatastore"] == 1
