"""In use: what somebody has open is never taken away, and the refusal says who it is."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar import errors
from tests.support.disks import assert_same_disk
from tests.support.places import MIB, TOMBSTONE, Place, flat_files
from tests.support.processes import background, wait_until
from tests.support.world import World
from tests.usage.conftest import delta

Use = Callable[[Path], contextlib.AbstractContextManager[subprocess.Popen[bytes]]]


@contextlib.contextmanager
def qemu_nbd(path: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU that serves the disk, as one that a VM runs in would open it."""
    with tempfile.TemporaryDirectory() as name:  # a short path: a socket's has at most 107 bytes
        directory = Path(name)
        served = ("--pid-file", directory / "pid", "--socket", directory / "socket", "--persistent")
        with background("qemu-nbd", *served, *options, path) as process:
            wait_until((directory / "pid").exists, "qemu-nbd has opened the disk")
            yield process


@contextlib.contextmanager
def qemu_io(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        ["qemu-io", "-r", "-f", "raw", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # Answers only after it has opened the file.
            process.stdin.write(b"length\n")
            process.stdin.flush()
            process.stdout.readline()
            yield process
        finally:
            process.kill()


USES: dict[str, tuple[str, str, Use]] = {
    "a reader of the disk": ("a.vmdk", "qemu-nbd", lambda path: qemu_nbd(path, "--read-only", "--format", "vmdk")),
    "a writer of the disk": ("a.vmdk", "qemu-nbd", lambda path: qemu_nbd(path, "--format", "vmdk")),
    "a reader of the extent": ("a-flat.vmdk", "qemu-io", qemu_io),
    "a writer of the extent": ("a-flat.vmdk", "qemu-nbd", lambda path: qemu_nbd(path, "--format", "raw")),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_disk_that_qemu_has_open_is_never_taken_away(world: World, place: Place, use: tuple[str, str, Use]) -> None:
    name, program, opened = use
    ref = f"{place.name}/a"
    place.plant("a")
    with opened(place.file("a", name)) as process:
        who = f"{program} (pid {process.pid})"
        assert world.client.image(ref).users == [who]
        before = place.snapshot()
        with pytest.raises(errors.ImageInUse) as refused:
            world.client.delete(ref, force=True)
        assert who in refused.value.message
        assert ref in refused.value.message
        assert place.snapshot() == before
        world.client.delete(ref)  # a tombstone takes nothing away
        before = place.snapshot()
        with pytest.raises(errors.ImageInUse) as refused:
            world.client.purge(ref)
        assert who in refused.value.message
        assert place.snapshot() == before
        world.client.restore(ref)
        world.client.delete(ref)
    assert world.client.image(ref).users == []
    world.client.purge(ref)
    place.assert_holds({})


def test_an_overlay_on_an_image_keeps_it(world: World, place: Place, scratch: Path) -> None:
    ref = f"{place.name}/a"
    descriptor = place.plant("a")
    overlay = scratch / "overlay.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "vmdk", "-b", str(descriptor), str(overlay)], check=True
    )
    with (
        qemu_nbd(overlay, "--format", "qcow2") as process,
        pytest.raises(errors.ImageInUse, match=rf"qemu-nbd \(pid {process.pid}\)"),
    ):
        world.client.delete(ref, force=True)
    world.client.delete(ref, force=True)
    place.assert_holds({})


def test_every_user_is_named(world: World, place: Place) -> None:
    place.plant("a")
    with qemu_io(place.descriptor("a")) as first, qemu_io(place.file("a", "a-flat.vmdk")) as second:
        users = sorted(f"qemu-io (pid {process.pid})" for process in (first, second))
        assert sorted(world.client.image(f"{place.name}/a").users) == users
        with pytest.raises(errors.ImageInUse) as refused:
            world.client.delete(f"{place.name}/a", force=True)
        # The first file that is in use decides: the message names at least who has that one open.
        assert any(user in refused.value.message for user in users)


def test_an_image_that_somebody_reads_through_the_sidecar_is_kept(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a", size=32 * MIB, data=[(0, 32 * MIB)])
    reading = world.client.read_file(ref, "a-flat.vmdk")
    next(reading)
    world.client.delete(ref)
    with pytest.raises(errors.ImageInUse, match=rf"image-sidecar \(pid {world.sidecar.pid}\)"):
        world.client.purge(ref)
    assert sum(len(answer.data) for answer in reading) == 32 * MIB  # the stream that was begun goes on to its end
    wait_until(lambda: not world.client.image(ref).users, "the reader's file is closed")
    world.client.purge(ref)
    place.assert_holds({})


def test_a_reader_that_goes_away_lets_go_of_the_image(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a", size=32 * MIB, data=[(0, 32 * MIB)])
    reading = world.client.read_file(ref, "a-flat.vmdk")
    next(reading)
    assert world.client.image(ref).users
    reading.close()  # type: ignore[attr-defined]
    wait_until(lambda: not world.client.image(ref).users, "the reader's file is closed")
    world.client.delete(ref, force=True)
    place.assert_holds({})


def test_the_source_of_a_running_copy_is_kept(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    source = place.plant("a", companions={"a.ecv": b"{}"})
    with place.locked("b"):
        copy = world.client.copy(ref, f"{place.name}/b")
        wait_until(lambda: bool(place.complete_staging_directories()), "the copy only has to be published")
        world.client.delete(ref)
        with pytest.raises(errors.ImageInUse, match=rf"image-sidecar \(pid {world.sidecar.pid}\)"):
            world.client.purge(ref)
    copy.wait()
    assert_same_disk(source, place.descriptor("b"))
    world.client.purge(ref)
    place.assert_holds({"b": flat_files("b", "b.ecv")})


def test_a_wreck_that_somebody_has_open_is_not_replaced(world: World, place: Place) -> None:
    place.plant("a")
    place.plant("b", timestamp=False)
    place.descriptor("b").unlink()
    before = place.snapshot()
    with qemu_io(place.file("b", "b-flat.vmdk")) as process:
        with pytest.raises(errors.ImageInUse, match=rf"qemu-io \(pid {process.pid}\)"):
            world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
        assert place.snapshot() == before
    world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    place.assert_holds({"a": flat_files("a"), "b": flat_files("b")})


def test_a_wreck_that_a_vm_has_a_disk_on_is_not_replaced(world: World, place: Place) -> None:
    """Its disk would be on another image's bytes, and what is left of its own gone."""
    place.plant("a")
    place.plant("b", timestamp=False)
    descriptor = place.descriptor("b")
    place.file("b", "b-flat.vmdk").unlink()
    vm = world.places["one"].root / "vm_web"
    vm.mkdir()
    (vm / "disk.vmdk").write_text(delta(str(descriptor)))
    before = place.snapshot()
    with pytest.raises(errors.ImageInUse, match="VM web"):
        world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    assert place.snapshot() == before
    shutil.rmtree(vm)
    world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    place.assert_holds({"a": flat_files("a"), "b": flat_files("b")})


def test_reading_and_copying_an_image_that_is_in_use_is_no_fault(world: World, place: Place) -> None:
    source = place.plant("a")
    with qemu_nbd(source, "--read-only", "--format", "vmdk"):
        world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
        assert sum(len(answer.data) for answer in world.client.read_file(f"{place.name}/a", "a.vmdk")) > 0
        world.client.validate(f"{place.name}/a")
        world.client.touch(f"{place.name}/a")
    assert_same_disk(source, place.descriptor("b"))


def test_a_companion_file_that_is_open_does_not_keep_an_image_from_being_deleted(world: World, place: Place) -> None:
    place.plant("a", companions={"a.ecv": b"{}"})
    with place.file("a", "a.ecv").open("rb"):  # a plain reader, such as a backup, holds no lock
        world.client.delete(f"{place.name}/a", force=True)
    place.assert_holds({})


def test_a_tombstone_needs_no_end_of_the_use(world: World, place: Place) -> None:
    place.plant("a")
    with qemu_io(place.file("a", "a-flat.vmdk")):
        world.client.delete(f"{place.name}/a")
        assert place.file("a", TOMBSTONE).exists()
