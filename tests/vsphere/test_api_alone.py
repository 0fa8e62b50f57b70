"""Images on datastores that this host does not see: everything is asked of the server, which may fail at any time."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from sidecar.errors import DatastoreUnavailable, FileChanged, ImagesError, NoSpace
from tests.support.disks import assert_same_disk, digest, import_image, make_disk
from tests.support.places import MARKER, MIB, TIMESTAMP, flat_files
from tests.support.processes import BIN, Mount, Sidecar, background, imagectl, loop_mount, run, wait_until
from tests.vsphere.conftest import TIMEOUT, Served, end_sessions

Serve = Callable[..., Served]
CHANGED, UNAVAILABLE = 5, 6


def is_copying(served: Served) -> bool:
    return any(served.places["two"].staging_directories()) and served.copies() > 0


@pytest.mark.parametrize("layout", ["compound", "sharded", "vsan"])
def test_the_life_of_an_image_at_the_shell(serve: Serve, tmp_path: Path, stack: ExitStack, layout: str) -> None:
    served = serve(path=False, layout=layout)
    source = make_disk(tmp_path / "source", "a.vmdk")
    (source.parent / "a.ecv").write_text("{}")
    mount = stack.enter_context(Mount(tmp_path / "mnt", served.sidecar.address)).path
    run("cp", "-r", source.parent, mount / "one" / "a")
    run("sync", mount / "one" / "a")
    assert sorted(path.name for path in (mount / "one" / "a").iterdir()) == ["a-flat.vmdk", "a.ecv", "a.vmdk"]
    run("cp", "-r", mount / "one" / "a", mount / "two" / "b")
    wait_until(served.places["two"].descriptor("b").exists, "it is published")
    assert served.copies() == 1
    assert_same_disk(source, mount / "two" / "b" / "b.vmdk")
    assert_same_disk(source, served.places["two"].descriptor("b"))
    run("cp", "-r", mount / "two" / "b", mount / "three" / "c")
    assert_same_disk(source, served.places["three"].descriptor("c"))
    run("rm", "-r", mount / "one" / "a")
    assert list((mount / "one").iterdir()) == []
    run("mv", mount / "one" / ".deleted" / "a", mount / "one" / "a")
    assert_same_disk(source, mount / "one" / "a" / "a.vmdk")
    run("rm", "-r", mount / "one" / "a", mount / "two" / "b")
    run("rm", "-r", mount / "one" / ".deleted" / "a", mount / "two" / ".deleted" / "b")
    for name in ("one", "two"):
        served.places[name].assert_holds({})


@pytest.mark.parametrize("layout", ["compound", "sharded", "vsan"])
def test_the_server_copies_whole_disks_within_a_datastore_and_to_another(
    serve: Serve, tmp_path: Path, layout: str
) -> None:
    served = serve(path=False, layout=layout)
    source = served.import_image("one/ab", tmp_path)
    served.imagectl("cp", "one/ab", "two/a")
    served.imagectl("cp", "two/a", "two/abc")
    assert served.copies() == 2
    for name in ("a", "abc"):
        descriptor = served.places["two"].descriptor(name)
        assert_same_disk(source, descriptor)
        flat = descriptor.with_name(f"{name}-flat.vmdk")
        assert digest(flat) == digest(source.with_name("disk-flat.vmdk"))
        assert f'"filename": "{flat}"' in run("qemu-img", "info", "-U", "--output=json", descriptor).stdout
        served.imagectl("validate", f"two/{name}")
    served.places["two"].assert_holds({name: flat_files(name, f"{name}.ecv") for name in ("a", "abc")})


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized", "twoGbMaxExtentFlat"])
def test_disks_that_the_server_does_not_make_are_copied_by_this_host(
    serve: Serve, tmp_path: Path, subformat: str
) -> None:
    served = serve(path=False)
    source = served.import_image("one/a", tmp_path, subformat=subformat)
    served.imagectl("cp", "one/a", "two/b")
    served.imagectl("cp", "two/b", "three/c")
    assert served.copies() == 0
    for name, image in (("two", "b"), ("three", "c")):
        assert_same_disk(source, served.places[name].descriptor(image))


def test_scan_sweep_and_reap(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False)
    served.places["one"].plant("a")
    os.utime(served.places["one"].file("a", TIMESTAMP), (1e9, 1e9))
    served.import_image("one/b", tmp_path)
    served.imagectl("scan", "one", "--rate", "100000")
    served.imagectl("sweep", "one", "--rate", "100000")
    wait_until(lambda: not served.places["one"].directory("a").exists(), "it is swept")
    served.imagectl("reap", "one", "--grace", "0")
    served.places["one"].assert_holds({"b": flat_files("b", "b.ecv")})


@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_server_that_goes_away_in_a_copy_makes_it_unavailable_in_bounded_time(
    serve: Serve, tmp_path: Path, how: str
) -> None:
    """The other datastores do not notice, and when it is back there is nothing but what a reap frees."""
    served = serve(path=False, copy_seconds=60, timeout=TIMEOUT)
    served.import_image("one/a", tmp_path)
    with background(BIN / "imagectl", "--sidecar", served.sidecar.address, "cp", "one/a", "two/b") as copy:
        wait_until(lambda: is_copying(served), "the server copies")
        with ExitStack() as stack:
            if how == "killed":
                served.site.simulator.kill()
            else:
                stack.enter_context(served.site.simulator.hanging())
            start = time.monotonic()
            said = copy.communicate(timeout=60)[1].decode()
            assert copy.returncode == UNAVAILABLE, said
            assert "server sim: cannot" in said
            assert time.monotonic() - start < 10 * TIMEOUT
            served.places["three"].plant("c")
            wait_until(lambda: "c" in images(served, "three"), "the other datastore goes on")
            served.imagectl("touch", "three/c")
            assert served.imagectl("touch", "one/a", check=False)[0] == UNAVAILABLE
        if how == "killed":
            served.site.simulator.start()
    assert not served.places["two"].directory("b").exists()
    wait_until(lambda: served.imagectl("touch", "one/a", check=False)[0] == 0, "the datastore is back")
    wait_until(lambda: reaped(served, "two"), "nothing is left but images", 60)


def images(served: Served, datastore: str) -> set[str]:
    return {image.ref.image_id for image in served.client.images(datastore)}


def reaped(served: Served, datastore: str) -> bool:
    served.imagectl("reap", datastore, "--grace", "0", check=False)
    return not served.places[datastore].leftovers()


@pytest.mark.parametrize("size", [2 * MIB, 8 * MIB], ids=["another size", "the same size"])
def test_a_copy_of_an_image_that_another_host_replaces_meanwhile_is_not_made(
    serve: Serve, tmp_path: Path, size: int
) -> None:
    """It does not know who has it open here; the server copies what is there when it comes to it."""
    served = serve(path=False, copy_seconds=3)
    served.import_image("one/a", tmp_path)
    with background(BIN / "imagectl", "--sidecar", served.sidecar.address, "cp", "one/a", "two/b") as copy:
        wait_until(lambda: is_copying(served), "the server copies")
        shutil.rmtree(served.places["one"].directory("a"))
        served.places["one"].plant("a", size=size, companions={"a.ecv": b"{}"})
        said = copy.communicate(timeout=60)[1].decode()
        assert copy.returncode == CHANGED, said
        assert "replaced while it was" in said
    served.places["two"].assert_holds({})


@pytest.mark.parametrize("change", ["replaced", "removed", "cut off"])
def test_a_file_that_another_host_changes_while_it_is_read_never_ends_as_if_it_had_been_read(
    serve: Serve, change: str
) -> None:
    """There is more of it than what is on its way when it changes."""
    served = serve(path=False)
    one = served.places["one"]
    one.plant("a", size=64 * MIB)
    answers = served.client.read_file("one/a", "a-flat.vmdk")
    assert next(answers).size_bytes == 64 * MIB
    assert next(answers).data
    if change == "cut off":
        os.truncate(one.file("a", "a-flat.vmdk"), MIB)
    else:
        shutil.rmtree(one.directory("a"))
    if change == "replaced":
        one.plant("a", size=64 * MIB)
    # Nobody cuts a disk off: where that is met in the middle of an answer, the server seems to have gone away.
    expected = (FileChanged, DatastoreUnavailable) if change == "cut off" else FileChanged
    with pytest.raises(expected, match=r"a-flat\.vmdk"):
        list(answers)


def published(served: Served) -> list[str]:
    return [path.parent.name.removeprefix("image_") for path in served.places["two"].root.glob(f"image_*/{TIMESTAMP}")]


@pytest.mark.parametrize("layout", ["compound", "vsan"])
@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_server_that_goes_away_while_images_are_published_leaves_each_whole_or_not_there(
    serve: Serve, tmp_path: Path, how: str, layout: str
) -> None:
    served = serve(path=False, timeout=TIMEOUT, layout=layout, more="rescan_seconds = 0.5")
    source = served.import_image("one/a", tmp_path)
    with background(
        *("bash", "-c", 'for i in $(seq 500); do "$0" --sidecar "$1" cp one/a two/b$i || exit; done'),
        *(BIN / "imagectl", served.sidecar.address),
    ) as copies:
        wait_until(lambda: len(published(served)) > 3, "some are published")
        if how == "killed":
            served.site.simulator.kill()
            copies.wait(60)
            served.site.simulator.start()
        else:
            with served.site.simulator.hanging():
                copies.wait(60)
    wait_until(lambda: served.imagectl("touch", "one/a", check=False)[0] == 0, "the datastore is back")
    wait_until(lambda: reaped(served, "two"), "nothing is left but images", 60)
    assert len(published(served)) > 3
    wait_until(lambda: images(served, "two") == set(published(served)), "nothing else looks like an image")
    for name in published(served):
        assert digest(served.places["two"].file(name, f"{name}-flat.vmdk")) == digest(
            source.with_name("disk-flat.vmdk")
        )
        served.imagectl("validate", f"two/{name}")


def test_a_slow_server_is_waited_for(serve: Serve, tmp_path: Path) -> None:
    slow = ("MakeDirectory", "SearchDatastore_Task", "MoveDatastoreFile_Task", "CopyVirtualDisk_Task")
    served = serve(path=False, delays=dict.fromkeys(slow, 150))
    source = served.import_image("one/a", tmp_path)
    for command in ("cp one/a two/b", "touch two/b", "rm one/a", "purge one/a", "validate two/b"):
        served.imagectl(*command.split())
    assert_same_disk(source, served.places["two"].descriptor("b"))
    served.assert_tidy()


def test_sessions_that_end_again_and_again_break_no_copy_and_no_publishing(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False, copy_seconds=0.5)
    source = served.import_image("one/a", tmp_path)
    with background(
        *("bash", "-c", 'for i in 1 2 3 4 5 6; do "$0" --sidecar "$1" cp one/a two/b$i || exit; done'),
        *(BIN / "imagectl", served.sidecar.address),
    ) as copies:
        while copies.poll() is None:
            end_sessions(served.site)
            with suppress(subprocess.TimeoutExpired):
                copies.wait(0.3)
        assert copies.returncode == 0
    assert sorted(published(served)) == [f"b{number}" for number in range(1, 7)]
    for name in published(served):
        assert_same_disk(source, served.places["two"].descriptor(name))


@pytest.mark.parametrize("how", ["killed", "hanging", "logged out"])
def test_a_scan_during_which_the_server_goes_away_marks_nothing(serve: Serve, tmp_path: Path, how: str) -> None:
    served = serve(path=False, timeout=TIMEOUT, delays={"RetrievePropertiesEx": 300})
    for number in range(5):
        served.places["one"].plant(f"i{number}")
        os.utime(served.places["one"].file(f"i{number}", TIMESTAMP), (1e9, 1e9))
    with (
        ExitStack() as stack,
        background(BIN / "imagectl", "--sidecar", served.sidecar.address, "scan", "one", "--rate", "100000") as scan,
    ):
        wait_until(lambda: "method=StartScan" in served.sidecar.log.read_text(), "the scan has begun")
        if how == "killed":
            served.site.simulator.kill()
        elif how == "hanging":
            stack.enter_context(served.site.simulator.hanging())
        else:
            end_sessions(served.site)
        said = scan.communicate(timeout=60)[1].decode()
        if how == "logged out":
            assert scan.returncode == 0, said
            return
        assert scan.returncode == UNAVAILABLE, said
    assert list(served.places["one"].root.rglob(MARKER)) == []


def test_a_session_that_ends_at_any_time_is_begun_anew(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False)
    source = served.import_image("one/a", tmp_path)
    for number, command in enumerate(("cp one/a two/b", "touch two/b", "rm two/b", "restore two/b", "scan two")):
        end_sessions(served.site)
        served.imagectl(*command.split())
        assert served.sidecar.log.read_text().count("logged in server=sim") >= number + 2
    assert_same_disk(source, served.places["two"].descriptor("b"))


def test_a_sidecar_that_is_killed_leaves_what_the_next_one_reaps(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False, copy_seconds=2)
    served.import_image("one/a", tmp_path)
    with background(BIN / "imagectl", "--sidecar", served.sidecar.address, "cp", "one/a", "two/b"):
        wait_until(lambda: is_copying(served), "the server copies")
        served.sidecar.kill()
    wait_until(lambda: any(served.places["two"].root.glob("tmp_image_*/b.vmdk")), "the server has copied")
    assert not served.places["two"].directory("b").exists()
    served.sidecar.start()
    wait_until(lambda: reaped(served, "two"), "nothing is left", 30)
    served.imagectl("cp", "one/a", "two/b")


def test_an_image_lock_of_a_sidecar_that_was_killed_is_taken_over(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False, delays={"MoveDatastoreFile_Task": 0})
    served.import_image("one/a", tmp_path)
    lock = served.places["one"].lock_file("a")
    with background(
        *("bash", "-c", 'while "$0" --sidecar "$1" touch one/a; do :; done', BIN / "imagectl", served.sidecar.address)
    ):
        wait_until(lock.is_dir, "it is locked")
        served.sidecar.stop_now()
        served.copies()  # what the server was asked for before the stop, it has done now
        held = lock.is_dir()
        served.sidecar.signal(signal.SIGKILL)
        served.sidecar.kill()
    served.sidecar.start()
    served.imagectl("touch", "one/a")
    assert held == ("lock taken over" in served.sidecar.log.read_text())
    wait_until(lambda: reaped(served, "one"), "nothing is left", 30)


def test_two_sidecars_exclude_each_other_and_name_the_holder(serve: Serve, tmp_path: Path, stack: ExitStack) -> None:
    served = serve(path=False, copy_seconds=0)
    served.import_image("one/a", tmp_path)
    config = served.site.simulator.configuration()
    others = {}
    for name, more in {"api": "", "path": f'path = "{served.places["one"].root}"\nlocks = "flock"\n'}.items():
        others[name] = stack.enter_context(
            Sidecar(
                tmp_path / name,
                config=f'{config}[limits]\nlock_timeout_seconds = 0.5\n[datastore.one]\ntype = "vsphere"\n'
                f'server = "sim"\nlayout = "compound"\nreserve = 0\n{more}',
            )
        )
    lock = served.places["one"].lock_file("a")
    with background(
        *("bash", "-c", 'while "$0" --sidecar "$1" touch one/a; do :; done', BIN / "imagectl", served.sidecar.address)
    ):
        # Stopped in the midst of it, so that it holds the lock.
        for _ in range(200):
            wait_until(lock.is_dir, "it is locked")
            served.sidecar.stop_now()
            served.copies()  # what the server was asked for before the stop, it has done now
            if lock.is_dir():
                break
            served.sidecar.signal(signal.SIGCONT)
        try:
            assert lock.is_dir()
            for other in others.values():
                result = imagectl(other.address, "touch", "one/a", check=False)
                assert result.returncode == 1, result.stderr
                assert f"pid {served.sidecar.pid}" in result.stderr and "for touch a" in result.stderr
        finally:
            served.sidecar.signal(signal.SIGCONT)
        wait_until(lambda: imagectl(others["api"].address, "touch", "one/a", check=False).returncode == 0, "it is free")


def test_a_datastore_that_is_full_is_told_and_nothing_is_left(serve: Serve, tmp_path: Path) -> None:
    """The server takes what comes, writes what it can, and says that all is well."""
    with loop_mount(tmp_path / "small", 7 << 20, ("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal")) as small:
        (small / "lost+found").rmdir()
        (tmp_path / "two").symlink_to(small)
        served = serve(path=False)
        try:
            source = make_disk(tmp_path / "source")
            with pytest.raises(NoSpace):
                import_image(served.client, "two/b", source)
            wait_until(lambda: reaped(served, "two"), "nothing is left", 30)
            served.places["two"].assert_holds({})
        finally:
            served.sidecar.stop()


def test_a_host_without_room_for_what_is_staged_is_told_of_and_not_the_datastore(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", small)
    try:
        monkeypatch.setenv("TMPDIR", str(small))
        served = serve(path=False)
        with pytest.raises(NoSpace, match=f"make space in {small}, or start the sidecar with another TMPDIR"):
            import_image(served.client, "two/b", make_disk(tmp_path / "source"))
        served.sidecar.stop()
    finally:
        run("umount", "-l", small)


def test_wrong_credentials_are_told_where_a_datastore_is_looked_at(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False)
    served.site.simulator.credentials.write_text("nobody:wrong\n")
    served.site.simulator.kill()
    served.site.simulator.start()
    wait_until(
        lambda: "InvalidLogin" in run(BIN / "imagectl", "--sidecar", served.sidecar.address, "datastores").stdout,
        "the datastore says why",
    )


def test_an_interrupted_copy_is_cancelled_on_the_server(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False, copy_seconds=6)
    served.import_image("one/a", tmp_path)
    with background(BIN / "imagectl", "--sidecar", served.sidecar.address, "cp", "one/a", "two/b") as copy:
        wait_until(lambda: is_copying(served), "the server copies")
        copy.send_signal(signal.SIGINT)
        copy.communicate(timeout=10)
        assert copy.returncode == 130
    wait_until(lambda: not any(served.places["two"].root.glob("tmp_image_*")), "it is cleaned up")
    served.places["two"].assert_holds({})


def test_nothing_on_this_host_is_left_of_what_was_staged(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False)
    served.import_image("one/a", tmp_path)
    descriptors = Path(f"/proc/{served.sidecar.pid}/fd")
    open_files = [os.readlink(path) for path in descriptors.iterdir() if path.is_symlink()]
    assert [path for path in open_files if path.startswith("/var/tmp/")] == []


def test_what_is_no_image_of_ours_is_refused(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False)
    for name in ("../one/x", "one/..", "one/a/../b"):
        with pytest.raises(ImagesError):
            served.client.image(name)
