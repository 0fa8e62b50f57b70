"""Images on datastores of a vSphere server that this host sees, too: all works, and the server copies the disks."""

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.errors import DatastoreUnavailable, DiskFileFault, ImageInUse, NoSpace
from tests.support.disks import assert_same_disk, digest, make_disk
from tests.support.places import TIMESTAMP, flat_files
from tests.support.processes import BIN, Mount, background, loop_mount, run, wait_until
from tests.vsphere.conftest import TIMEOUT, Served

UNAVAILABLE = 6


def is_copying(served: Served) -> bool:
    """The server has begun with a copy, whose staging directory is there."""
    return any(place.staging_directories() for place in served.places.values()) and served.copies() > 0


@pytest.mark.parametrize("layout", ["compound", "sharded", "vsan"])
def test_the_server_copies_whole_disks_within_a_datastore_and_to_another(
    serve: Callable[..., Served], tmp_path: Path, layout: str
) -> None:
    served = serve(layout=layout)
    source = served.import_image("one/ab", tmp_path)
    # Names that begin with another's, both ways.
    served.imagectl("cp", "one/ab", "two/a")
    served.imagectl("cp", "two/a", "two/abc")
    assert served.copies() == 2
    for name in ("a", "abc"):
        descriptor = served.places["two"].descriptor(name)
        assert_same_disk(source, descriptor)
        flat = descriptor.with_name(f"{name}-flat.vmdk")
        assert digest(flat) == digest(source.with_name("disk-flat.vmdk"))
        assert f'"{name}-flat.vmdk"' in descriptor.read_text()
        assert f'"filename": "{flat}"' in run("qemu-img", "info", "-U", "--output=json", descriptor).stdout
        served.imagectl("validate", f"two/{name}")
    served.places["two"].assert_holds({name: flat_files(name, f"{name}.ecv") for name in ("a", "abc")})


def test_a_copy_tells_how_far_the_server_is(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve(copy_seconds=1.5)
    served.import_image("one/a", tmp_path)
    told = [(progress.done_bytes, progress.total_bytes) for progress in served.client.copy("one/a", "two/b")]
    total = sum(file.stat().st_size for file in served.places["one"].directory("a").iterdir())
    assert told == sorted(told)
    assert told[-1] == (total, total)
    assert any(0 < done < total / 2 for done, _ in told)


def test_the_life_of_an_image_at_the_shell(serve: Callable[..., Served], tmp_path: Path, stack: ExitStack) -> None:
    served = serve()
    source = make_disk(tmp_path / "source", "a.vmdk")
    mount = stack.enter_context(Mount(tmp_path / "mnt", served.sidecar.address)).path
    run("cp", "-r", source.parent, mount / "one" / "a")
    run("sync", mount / "one" / "a")
    run("cp", "-r", mount / "one" / "a", mount / "two" / "b")
    assert_same_disk(source, mount / "two" / "b" / "b.vmdk")
    assert_same_disk(source, served.places["two"].descriptor("b"))
    run("rm", "-r", mount / "one" / "a")
    assert list((mount / "one").iterdir()) == []
    run("mv", mount / "one" / ".deleted" / "a", mount / "one" / "a")
    assert_same_disk(source, mount / "one" / "a" / "a.vmdk")
    run("rm", "-r", mount / "one" / "a", mount / "two" / "b")
    run("rm", "-r", mount / "one" / ".deleted" / "a", mount / "two" / ".deleted" / "b")
    for name in ("one", "two"):
        served.places[name].assert_holds({})


def test_delete_restore_and_purge(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve()
    served.import_image("one/a", tmp_path)
    served.imagectl("rm", "one/a")
    served.imagectl("restore", "one/a")
    served.imagectl("cp", "one/a", "one/b")
    served.imagectl("rm", "one/a")
    served.imagectl("purge", "one/a")
    served.imagectl("rm", "--force", "one/b")
    served.places["one"].assert_holds({})


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized", "twoGbMaxExtentFlat"])
def test_disks_that_the_server_does_not_make_are_copied_by_this_host(
    serve: Callable[..., Served], tmp_path: Path, subformat: str
) -> None:
    served = serve()
    source = served.import_image("one/a", tmp_path, subformat=subformat)
    served.imagectl("cp", "one/a", "two/b")
    assert served.copies() == 0
    assert_same_disk(source, served.places["two"].descriptor("b"))


def test_between_a_server_and_a_directory_this_host_copies(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve()
    source = served.import_image("three/a", tmp_path)
    served.imagectl("cp", "three/a", "one/b")
    served.imagectl("cp", "one/b", "three/c")
    assert served.copies() == 0
    assert_same_disk(source, served.places["three"].descriptor("c"))


@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_server_that_goes_away_in_a_copy_makes_it_unavailable_in_bounded_time(
    serve: Callable[..., Served], tmp_path: Path, how: str
) -> None:
    served = serve(copy_seconds=60, timeout=TIMEOUT)
    served.import_image("one/a", tmp_path)
    with background(BIN / "imagectl", "--sidecar", served.sidecar.address, "cp", "one/a", "two/b") as copy:
        wait_until(lambda: is_copying(served), "the server copies")
        with ExitStack() as stack:
            if how == "killed":
                served.site.simulator.kill()
            else:
                stack.enter_context(served.site.simulator.hanging())
            start = time.monotonic()
            said = copy.communicate(timeout=30)[1].decode()
            assert time.monotonic() - start < 3 * TIMEOUT + 3
            assert copy.returncode == UNAVAILABLE, said
            assert "server sim: cannot copy the disk [one] image_a/a.vmdk" in said
            # Nothing but copies of disks needs the server.
            for command in ("ls", "rm one/a", "restore one/a", "touch one/a", "validate one/a"):
                served.imagectl(*command.split())
            served.imagectl("cp", "one/a", "three/c")
            code, stderr = served.imagectl("cp", "one/a", "one/d", check=False)
            assert code == UNAVAILABLE, stderr
    served.assert_tidy()
    served.places["two"].assert_holds({})


def test_when_the_server_is_back_copies_work_again(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve()
    served.import_image("one/a", tmp_path)
    served.imagectl("cp", "one/a", "two/b")
    served.site.simulator.kill()
    assert served.imagectl("cp", "one/a", "two/c", check=False)[0] == UNAVAILABLE
    served.site.simulator.start()
    served.imagectl("cp", "one/a", "two/c")
    served.places["two"].assert_holds({name: flat_files(name, f"{name}.ecv") for name in ("b", "c")})


def test_a_sidecar_that_is_killed_in_a_copy_leaves_a_staging_directory_that_is_reaped(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(copy_seconds=2)
    served.import_image("one/a", tmp_path)
    with background(BIN / "imagectl", "--sidecar", served.sidecar.address, "cp", "one/a", "two/b"):
        wait_until(lambda: is_copying(served), "the server copies")
        served.sidecar.kill()
    # The server knows nothing of that, and goes on.
    wait_until(lambda: any(served.places["two"].root.glob("tmp_image_*/b.vmdk")), "the server has copied")
    assert not served.places["two"].directory("b").exists()
    served.sidecar.start()
    served.imagectl("reap", "two", "--grace", "0")
    served.assert_tidy()
    served.imagectl("cp", "one/a", "two/b")


def test_an_interrupted_copy_is_cancelled_on_the_server(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve(copy_seconds=6)
    served.import_image("one/a", tmp_path)
    with background(BIN / "imagectl", "--sidecar", served.sidecar.address, "cp", "one/a", "two/b") as copy:
        wait_until(lambda: is_copying(served), "the server copies")
        copy.send_signal(signal.SIGINT)
        copy.communicate(timeout=5)
        assert copy.returncode == 130
    served.assert_tidy()
    time.sleep(6)  # until it would have been done
    served.places["two"].assert_holds({})


def test_the_end_of_a_sidecar_does_not_wait_for_a_server_that_hangs(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve()
    served.import_image("one/a", tmp_path)
    served.imagectl("cp", "one/a", "two/b")
    with served.site.simulator.hanging():
        start = time.monotonic()
        assert served.sidecar.stop() == 0
        assert time.monotonic() - start < 5


def test_a_server_that_fills_the_datastore_leaves_nothing(
    serve: Callable[..., Served], tmp_path: Path, kind: str
) -> None:
    """This one writes what was a hole, too. A host is told not to, so that space was asked for what it should need."""
    with loop_mount(tmp_path / "small", 7 << 20, ("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal")) as small:
        (small / "lost+found").rmdir()
        (tmp_path / "two").symlink_to(small)
        served = serve()
        try:
            served.places["one"].plant("a", size=8 << 20)
            expected = {
                "vcenter": (NoSpace, "8[0-9]{6} bytes are needed"),
                "host": (DiskFileFault, r"CannotCreateFile .*look at the file, and at the space"),
            }
            error, message = expected[kind]
            with pytest.raises(error, match=message):
                served.client.copy("one/a", "two/b").wait()
            served.places["two"].assert_holds({})
        finally:
            served.sidecar.stop()


@pytest.mark.parametrize("layout", ["compound", "sharded", "vsan"])
def test_a_path_that_is_not_where_the_server_has_its_datastore_is_told(
    serve: Callable[..., Served], tmp_path: Path, layout: str
) -> None:
    """Though the server has an image of the same name there, which would be copied instead."""
    served = serve(layout=layout, more='datastore = "one"')  # both: so two has its images in another directory
    served.places["one"].plant("a", seed=7)
    served.places["two"].plant("a")
    with pytest.raises(DatastoreUnavailable, match="is not where the server has its datastore"):
        served.client.copy("two/a", "one/b").wait()
    assert served.copies() == 0
    served.assert_tidy()


def test_a_destination_that_is_not_where_the_server_has_its_datastore_is_told(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(more='datastore = "one"')
    served.import_image("one/a", tmp_path)
    with pytest.raises(DatastoreUnavailable, match="is not where the server has its datastore"):
        served.client.copy("one/a", "two/b").wait()
    served.assert_tidy()


def test_a_datastore_is_proved_and_told_of_once(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve()
    served.import_image("one/a", tmp_path)
    for name in ("b", "c"):
        served.imagectl("cp", "one/a", f"two/{name}")
    assert served.sidecar.log.read_text().count("datastore found name=one server=sim") == 1


def test_what_a_crash_leaves_of_that_proof_is_reaped(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve(layout="vsan")
    served.import_image("one/a", tmp_path)
    left = served.places["one"].directory("a") / f".{'0a' * 16}"
    left.touch()
    served.imagectl("reap", "one", "--grace", "0")
    assert not left.exists()


def test_a_vm_that_names_its_disk_as_the_server_does_keeps_the_image(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    """Also when another datastore has that name here."""
    served = serve(more='datastore = "two"', paths={"one": "two", "two": "one"})
    served.import_image("one/a", tmp_path)
    overlay = served.places["three"].root / "vm_1" / "disk.vmdk"
    overlay.parent.mkdir()
    run("qemu-img", "create", "-q", "-f", "vmdk", "-b", served.places["one"].descriptor("a"), "-F", "vmdk", overlay)
    hint = str(served.places["one"].root).encode()
    overlay.write_bytes(overlay.read_bytes().replace(hint, b"/vmfs/volumes/two".ljust(len(hint), b"/")))
    with pytest.raises(ImageInUse):
        served.client.delete("one/a", force=True)
    assert (served.places["one"].directory("a") / TIMESTAMP).exists()
