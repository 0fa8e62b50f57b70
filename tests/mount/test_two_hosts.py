"""Two hosts on one datastore, each with a sidecar and a mount of its own; and a mount that dies with work in it."""

import errno
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fusefs.errors import operation
from sidecar.client import SidecarClient
from tests.conftest import LAYOUTS
from tests.crash.support import staging_directories
from tests.mount.harness import log_of, names, wait_listed
from tests.support.disks import assert_same_disk, import_image, make_disk
from tests.support.processes import Mount, Sidecar, run, wait_until

SEEN_SECONDS = 10.0  # what the mount promises is 5 s


class Host:
    """A sidecar and a mount on a datastore that others have too."""

    def __init__(self, name: str, datastore: Path, layout: str, directory: Path, stack: ExitStack) -> None:
        self.sidecar = stack.enter_context(Sidecar(directory / name, f"shared={datastore},layout={layout}"))
        self.mount = stack.enter_context(Mount(directory / f"mnt-{name}", self.sidecar.address))
        self.images = self.mount.path / "shared"


@pytest.fixture(params=LAYOUTS)
def hosts(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> tuple[Host, Host]:
    datastore = tmp_path / "shared"
    datastore.mkdir()
    first, second = (Host(name, datastore, request.param, tmp_path, stack) for name in ("first", "second"))
    with first.sidecar.client() as client:
        import_image(client, "shared/a", make_disk(tmp_path / "source"))
    for host in (first, second):
        wait_listed(host.mount, "shared/a")
    return first, second


def test_each_sees_what_the_other_one_does_within_seconds(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    run("cp", "-r", first.images / "a", first.images / "b")
    wait_until(lambda: names(second.images) == {"a", "b"}, "the copy is seen", SEEN_SECONDS)
    assert_same_disk(first.images / "a" / "a.vmdk", second.images / "b" / "b.vmdk")
    run("rm", "-r", second.images / "b")
    wait_until(lambda: names(first.images) == {"a"}, "the deletion is seen", SEEN_SECONDS)
    wait_until(lambda: names(first.images / ".deleted") == {"b"}, "the tombstone is seen", SEEN_SECONDS)
    run("mv", first.images / ".deleted" / "b", first.images)
    wait_until(lambda: names(second.images) == {"a", "b"}, "the restored image is seen", SEEN_SECONDS)


def test_the_same_new_name_from_both_is_one_image_and_one_file_exists(hosts: tuple[Host, Host]) -> None:
    for number in range(4):  # how they meet is chance
        name = f"b{number}"
        copies = [
            subprocess.Popen(["cp", "-r", host.images / "a", host.images / name], stderr=subprocess.PIPE, text=True)
            for host in hosts
        ]
        results = [(copy.communicate(timeout=60)[1], copy.returncode) for copy in copies]
        assert sorted(code for _, code in results) == [0, 1], results
        assert [message.rstrip().endswith(": File exists") for message, code in results if code] == [True], results
        for host in hosts:
            wait_until((host.images / name).exists, f"{name} is seen", SEEN_SECONDS)
            assert_same_disk(host.images / "a" / "a.vmdk", host.images / name / f"{name}.vmdk")


def test_what_one_does_not_complete_hides_no_image_of_the_other_one(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    (first.images / "b").mkdir()
    (first.images / "b" / "notes.txt").write_text("the disk never came")
    run("cp", "-r", second.images / "a", second.images / "b")
    wait_until((first.images / "b" / "b.vmdk").exists, "the image is seen", SEEN_SECONDS)
    assert_same_disk(first.images / "a" / "a.vmdk", first.images / "b" / "b.vmdk")


def test_what_one_has_open_the_other_one_does_not_free(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    with (first.images / "a" / "a-flat.vmdk").open("rb") as file:
        run("rm", "-r", second.images / "a")
        refused = run("rm", "-r", second.images / ".deleted" / "a", check=False)
        assert "Device or resource busy" in refused.stderr
        assert file.read(16)
    run("rm", "-r", second.images / ".deleted" / "a")


def test_a_mount_that_died_publishes_nothing_when_it_is_back(
    sidecar: Sidecar, client: SidecarClient, tmp_path: Path, stack: ExitStack
) -> None:
    """Killed between two files of an import, and in the middle of one."""
    outside = make_disk(tmp_path / "outside", "new.vmdk").parent
    mount = Mount(tmp_path / "mnt", sidecar.address)
    stack.callback(mount.stop)
    mount.start()
    for datastore in ("one", "two", "three"):
        (mount.path / datastore / "new").mkdir()
        run("cp", outside / "new.vmdk", mount.path / datastore / "new")
    with suppress(OSError), (mount.path / "one" / "new" / "new-flat.vmdk").open("wb", buffering=0) as file:
        file.write(b"x" * 4096)  # and the close fails: nobody answers it
        assert mount.process is not None
        mount.process.kill()
        mount.process.wait(10)
    mount.start()
    for datastore in ("one", "two", "three"):
        assert names(mount.path / datastore) == set()
        # The name is free: what is left is nobody's, and in nobody's way.
        run("cp", "-r", outside, mount.path / datastore / "new")
        run("sync", mount.path / datastore / "new")
        assert_same_disk(outside / "new.vmdk", mount.path / datastore / "new" / "new.vmdk")
    assert "published image=one/new" in log_of(mount)


def test_the_work_that_a_dead_mount_left_goes_when_its_lease_ends(tmp_path: Path, stack: ExitStack) -> None:
    datastore = tmp_path / "one"
    datastore.mkdir()
    short = "[limits]\nstaging_lease_seconds = 2\n"
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={datastore}", config=short))
    mount = Mount(tmp_path / "mnt", sidecar.address)
    stack.callback(mount.stop)
    mount.start()
    (mount.path / "one" / "new").mkdir()
    assert len(staging_directories(datastore)) == 1
    assert mount.process is not None
    mount.process.kill()
    mount.process.wait(10)
    wait_until(lambda: staging_directories(datastore) == [], "the sidecar has dropped it", 20)


class Failing:
    """As the file system of the mount: its callbacks are operations."""

    def path_of(self, *arguments: object) -> str:
        return str(arguments[0])

    @operation
    def getattr(self, path: str) -> None:
        raise LookupError("no such thing")


def test_no_failure_of_our_own_is_an_input_output_error_that_nobody_can_explain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(OSError, match="no such thing") as caught:
        Failing().getattr("/one/a")
    assert caught.value.errno == errno.EIO
    [record] = caplog.records
    assert record.getMessage() == "getattr failed path=/one/a cause=LookupError('no such thing')"
    assert record.exc_info is not None
