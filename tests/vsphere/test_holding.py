"""By the API alone nobody sees who reads: what is open through a mount is in use because the sidecar holds it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from sidecar.errors import DatastoreUnavailable, HolderNotFound, ImageInUse, ImageNotFound, OperationCancelled
from tests.mount.harness import log_of, wait_listed
from tests.support.places import MARKER, MIB, TIMESTAMP, TOMBSTONE, Place
from tests.support.processes import Mount, imagectl, run, wait_until
from tests.support.vcsim import STATUS_REQUESTS
from tests.vsphere.conftest import Served

Serve = Callable[..., Served]
IN_USE = 5
LOOK = {"SearchDatastore_Task": 1, "RetrievePropertiesEx Task": 1}


@pytest.fixture
def kind() -> str:
    return "vcenter"


@pytest.fixture
def served(serve: Serve) -> Served:
    served = serve(path=False)
    served.places["one"].plant("a", size=4 * MIB)
    served.client.image("one/a")  # it is listed now
    return served


@pytest.fixture
def mount(served: Served, tmp_path: Path, stack: ExitStack) -> Mount:
    mount = Mount(tmp_path / "mnt", served.sidecar.address)
    stack.callback(mount.stop)
    mount.start()
    wait_listed(mount, "one/a")
    return mount


@contextmanager
def reading(mount: Mount) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has the disk of one/a open, until the end of the block; it has read the start of it."""
    program = "import sys; file = open(sys.argv[1], 'rb'); file.read(1); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, mount.path / "one" / "a" / "a-flat.vmdk"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n", log_of(mount)
        yield process
    finally:
        process.communicate(timeout=30)


def is_kept(client: SidecarClient) -> bool:
    try:
        client.purge("one/a")
    except ImageInUse:
        return True
    return False


def is_kept_by_force(client: SidecarClient) -> bool:
    try:
        client.delete("one/a", force=True)
    except (ImageInUse, DatastoreUnavailable):
        return True
    return False


def assert_kept(served: Served) -> None:
    with pytest.raises(ImageInUse, match=r"one/a is in use by image-sidecar"):
        served.client.purge("one/a")


def test_what_somebody_reads_through_a_mount_is_not_freed(served: Served, mount: Mount) -> None:
    with reading(mount):
        code, said = served.imagectl("rm", "--force", "one/a", check=False)
        assert code == IN_USE
        assert "one/a is in use by image-sidecar" in said
        assert [user.split(" ")[0] for user in served.client.image("one/a").users] == ["image-sidecar"]
        served.client.delete("one/a")
        assert_kept(served)
        refused = run("rm", "-r", mount.path / "one" / ".deleted" / "a", check=False)
        assert "Device or resource busy" in refused.stderr
        assert served.places["one"].directory("a").exists()
    # The mount hears of the close after it: one purge, at once.
    served.client.purge("one/a")
    assert not served.places["one"].directory("a").exists()


def test_what_somebody_reads_through_a_mount_is_not_swept(served: Served, mount: Mount) -> None:
    place: Place = served.places["one"]
    os.utime(place.file("a", TIMESTAMP), (1e9, 1e9))
    place.file("a", MARKER).write_text(str(int(time.time())))
    sweep = ("sweep", "one", "--rate", "100000")
    with reading(mount):
        said = imagectl(served.sidecar.address, *sweep).stdout
        assert "in use by image-sidecar" in said
        assert place.file("a", TIMESTAMP).exists()
    assert not place.file("a", MARKER).exists()
    place.file("a", MARKER).write_text(str(int(time.time())))
    said = imagectl(served.sidecar.address, *sweep).stdout
    assert not place.directory("a").exists(), said


def test_a_mount_that_is_killed_keeps_nothing_in_use(served: Served, mount: Mount) -> None:
    with reading(mount):
        served.client.delete("one/a")
        assert_kept(served)
        assert mount.process is not None
        mount.process.kill()
        mount.process.wait(10)
        wait_until(lambda: not is_kept(served.client), "it is purged")


def test_what_is_open_while_the_sidecar_is_killed_is_in_use_by_the_next_one(served: Served, mount: Mount) -> None:
    with reading(mount):
        served.client.delete("one/a")
        assert_kept(served)
        served.sidecar.kill()
        served.sidecar.start()
        wait_until(lambda: "file held again file=one/a/a-flat.vmdk" in log_of(mount), "it is held again")
        assert_kept(served)
    served.client.purge("one/a")


@pytest.mark.slow
def test_a_sidecar_that_is_restarted_does_not_purge_by_itself_what_is_open(
    serve: Serve, tmp_path: Path, stack: ExitStack
) -> None:
    served = serve(path=False, maintenance="tombstone_grace_seconds = 1")
    one = served.places["one"]
    for image_id in ("a", "b"):
        one.plant(image_id, size=4 * MIB)
        served.client.image(f"one/{image_id}")
    mount = stack.enter_context(Mount(tmp_path / "mnt", served.sidecar.address))
    wait_listed(mount, "one/a")
    with reading(mount):
        served.sidecar.kill()
        for number, image_id in enumerate(("a", "b")):
            one.file(image_id, TOMBSTONE).touch()
            os.utime(one.file(image_id, TOMBSTONE), (1e9 + number, 1e9 + number))
        served.sidecar.start()
        wait_until(lambda: not one.directory("b").exists(), "all that is not open is purged, the oldest first", 40)
        assert one.directory("a").exists()


def test_a_file_whose_image_went_while_there_was_no_sidecar_is_said_to_be_gone(served: Served, mount: Mount) -> None:
    with reading(mount):
        served.sidecar.kill()
        run("rm", "-r", served.places["one"].directory("a"))
        served.sidecar.start()
        gone = "open file not held any more: it is gone file=one/a/a-flat.vmdk"
        wait_until(lambda: gone in log_of(mount), "it is known to be gone")
    assert mount.stop() == 0


def test_a_sidecar_that_ends_waits_for_nobody_who_reads(served: Served, mount: Mount) -> None:
    with reading(mount):
        # Less than what running calls have, which is 10 s.
        assert served.sidecar.stop(timeout=8) == 0
        served.sidecar.start()
        served.client.delete("one/a")
        wait_until(lambda: "file held again file=one/a/a-flat.vmdk" in log_of(mount), "it is held again")
        assert_kept(served)


def test_a_mount_that_ends_while_somebody_reads_ends_at_once(served: Served, mount: Mount) -> None:
    with reading(mount):
        served.client.delete("one/a")
        assert mount.process is not None
        run("umount", "--lazy", mount.path)
    assert mount.process.wait(20) == 0
    served.client.purge("one/a")


def test_a_datastore_that_hangs_holds_up_no_file_of_another_one(served: Served, tmp_path: Path) -> None:
    served.import_image("three/b", tmp_path)
    with served.client.open_holder() as holder, ThreadPoolExecutor() as pool:
        with served.site.simulator.hanging():
            waiting = [pool.submit(holder.hold, number, "one/a", "a-flat.vmdk", timeout=30) for number in range(4)]
            holder.hold(10, "three/b", "b-flat.vmdk", timeout=5)
            assert [user.split(" ")[0] for user in served.client.image("three/b").users] == ["image-sidecar"]
            holder.release(10)
            assert served.client.image("three/b").users == []
            # What is being opened is let go of when it is open.
            for number in range(4):
                holder.release(number)
            assert not any(future.done() for future in waiting)
        assert all(isinstance(future.exception(), OperationCancelled | DatastoreUnavailable) for future in waiting)
        wait_until(lambda: not is_kept_by_force(served.client), "it is free")


def test_each_file_that_was_held_is_in_use_until_it_is_released(served: Served) -> None:
    served.client.delete("one/a")
    with served.client.open_holder() as holder:
        for number in (1, 2):
            holder.hold(number, "one/a", "a-flat.vmdk")
        for number in (1, 2):
            assert_kept(served)
            holder.release(number)
        served.client.purge("one/a")
        with pytest.raises(ImageNotFound):
            holder.hold(3, "one/a", "a-flat.vmdk")


def test_a_client_that_ends_holds_nothing(served: Served) -> None:
    served.client.delete("one/a")
    with served.client.open_holder() as holder:
        holder.hold(1, "one/a", "a-flat.vmdk")
        assert_kept(served)
    wait_until(lambda: not is_kept(served.client), "it is purged")
    with pytest.raises(HolderNotFound):
        holder.release(1)


def test_a_file_that_is_opened_through_a_mount_costs_the_server_one_look(served: Served, mount: Mount) -> None:
    with reading(mount):
        before = served.site.simulator.requests()
        (mount.path / "one" / "a" / "a.vmdk").open("rb").close()
        after = served.site.simulator.requests()
    assert {what: n for what, n in (after - before).items() if what not in STATUS_REQUESTS} == LOOK
