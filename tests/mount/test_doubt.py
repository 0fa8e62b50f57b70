"""What the mount does not know for sure is no image, and what is one never changes."""

import contextlib
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.crash.stopping import held_back
from tests.mount.harness import import_sparse, log_of, message_of, names, published_as, wait_listed
from tests.mount.relay import Relay
from tests.support.disks import MIB, assert_same_disk, make_disk
from tests.support.processes import Mount, Sidecar, loop_mount, run, wait_until


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "outside", "x.vmdk").parent


def test_an_image_whose_commit_got_no_answer_is_adopted_and_never_changes(
    outside: Path, sidecar: Sidecar, mount: Mount, client: SidecarClient, tmp_path: Path
) -> None:
    """The sidecar is killed after the rename and before its answer; the same rename is made here in its place."""
    target = mount.path / "one" / "new"
    target.mkdir()
    run("cp", outside / "x.vmdk", target / "new.vmdk")
    run("sed", "-i", "s/x-flat/new-flat/", target / "new.vmdk")
    run("cp", outside / "x-flat.vmdk", target / "new-flat.vmdk")
    with held_back(tmp_path / "one", "compound", "new"):
        publish = subprocess.Popen(["sync", target], stderr=subprocess.DEVNULL)
        (staging,) = (path for path in (tmp_path / "one").glob("tmp_image_*") if path.is_dir())
        wait_until((staging / "image_timestamp.txt").exists, "it is being published")
        sidecar.kill()
        staging.rename(tmp_path / "one" / "image_new")
        assert publish.wait(60) != 0
    with pytest.raises(OSError):
        os.truncate(target / "new-flat.vmdk", 0)
    sidecar.start()
    wait_until(lambda: "although its answer was lost" in log_of(mount), f"adopted:\n{log_of(mount)}")
    with pytest.raises(OSError, match="Read-only"):
        os.truncate(target / "new-flat.vmdk", 0)
    assert_same_disk(outside / "x.vmdk", wait_listed(mount, "one/new") / "new.vmdk")


def test_a_copy_that_found_no_space_is_no_image(tmp_path: Path, stack: ExitStack) -> None:
    root = stack.enter_context(loop_mount(tmp_path / "small", 48 * MIB, ("mkfs.ext4", "-q", "-m", "0")))
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},reserve=0"))
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))
    disk = make_disk(tmp_path / "outside", "x.vmdk", size=60 * MIB, data=((0, 60 * MIB),))
    target = mount.path / "one" / "new"
    target.mkdir()
    convert = ("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", disk, target / "new.vmdk")
    assert run(*convert, check=False).returncode == 1
    wait_until(lambda: "not published yet image=one/new" in log_of(mount), f"held back:\n{log_of(mount)}", 10)
    assert "a change of it failed" in log_of(mount)
    synced = run("sync", target, check=False)
    assert synced.returncode == 1
    assert "Input/output error" in synced.stderr
    assert names(mount.path / "one") == set()


def test_an_import_that_the_end_of_the_mount_interrupts_is_dropped_and_named(
    mount: Mount, client: SidecarClient
) -> None:
    target = mount.path / "one" / "new"
    target.mkdir()
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", target / "new.vmdk", "8M")
    run("fusermount3", "-u", mount.path)
    assert mount.process is not None
    assert mount.process.wait(20) == 0
    assert list(client.images("one")) == []
    assert "WARNING" in log_of(mount)
    assert "dropped image=one/new" in log_of(mount)


def test_an_import_that_nobody_goes_on_with_is_not_lost_by_a_signal(
    outside: Path, mount: Mount, client: SidecarClient
) -> None:
    """The mount is told to end within the settle time: it lets that pass, while somebody could still write."""
    run("cp", "-r", outside, mount.path / "one" / "new")
    (mount.path / "one" / "half").mkdir()
    run("cp", outside / "x.vmdk", mount.path / "one" / "half")
    unfinished = os.open(mount.path / "one" / "half" / "x-flat.vmdk", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(unfinished, b"x")
        assert mount.stop() == 0
    finally:
        with contextlib.suppress(OSError):
            os.close(unfinished)
    assert [image.ref.image_id for image in client.images("one")] == ["new"]
    assert "dropped image=one/half" in log_of(mount)


def test_a_publish_that_nobody_knows_of_is_done_again(outside: Path, tmp_path: Path, stack: ExitStack) -> None:
    """The connection breaks while the image's lock is waited for: the mount hears nothing, and the lock is not got."""
    (tmp_path / "one").mkdir()
    sidecar = stack.enter_context(
        Sidecar(tmp_path / "run", f"one={tmp_path / 'one'}", config="[limits]\nlock_timeout_seconds = 1\n")
    )
    relay = stack.enter_context(Relay(sidecar.address, tmp_path / "run" / "relay.sock"))
    mount = stack.enter_context(Mount(tmp_path / "mnt", relay.address))
    target = mount.path / "one" / "new"
    run("cp", "-r", outside, target)
    with held_back(tmp_path / "one", "compound", "new"):
        publish = subprocess.Popen(["sync", target], stderr=subprocess.DEVNULL)
        (staging,) = (path for path in (tmp_path / "one").glob("tmp_image_*") if path.is_dir())
        wait_until((staging / "image_timestamp.txt").exists, "it is being published")
        relay.cut()
        assert publish.wait(60) != 0
        assert "not known whether published image=one/new" in log_of(mount)
        with pytest.raises(OSError):
            os.truncate(target / "x-flat.vmdk", 0)
        wait_until(lambda: "LOCK_TIMEOUT" in sidecar.log.read_text(), f"it failed:\n{sidecar.log.read_text()}")
    relay.join_again()
    image = wait_listed(mount, "one/new")
    assert_same_disk(outside / "x.vmdk", image / "new.vmdk")
    assert "published image=one/new copied_from= seconds=" in log_of(mount)


@pytest.mark.parametrize("then", ["removed", "mended"])
def test_an_import_that_is_refused_for_any_reason_is_as_it_was(
    then: str, mount: Mount, client: SidecarClient, tmp_path: Path
) -> None:
    """A file of somebody else has the place of the image: there is none, for sure."""
    import_sparse(client, "one/a", make_disk(tmp_path / "source"))
    source, target, obstacle = wait_listed(mount, "one/a"), mount.path / "one" / "new", tmp_path / "one" / "image_new"
    target.mkdir()
    obstacle.write_text("x")
    run("cp", source / "a-flat.vmdk", target)
    assert message_of("cp", source / "a.vmdk", target) == "Invalid argument"
    if then == "removed":
        run("rm", "-r", target)
        obstacle.unlink()
        assert not target.exists()
        assert not list((tmp_path / "one").glob("tmp_image_*"))
    else:
        obstacle.unlink()
        (target / "notes.txt").write_text("n")
        run("sync", target)
        assert names(target) == {"new.vmdk", "new-flat.vmdk", "notes.txt"}
    assert "not known whether published" not in log_of(mount)


def test_a_copy_that_sync_publishes_keeps_what_it_was_copied_from(mount: Mount, client: SidecarClient) -> None:
    import_sparse(client, "one/a", make_disk(mount.path.parent / "source"))
    source, target = wait_listed(mount, "one/a"), mount.path / "two" / "b"
    target.mkdir()
    (target / "extra.vmdk").touch()  # so that it is no copy at the last close
    run("cp", source / "a.vmdk", source / "a-flat.vmdk", target)
    (target / "extra.vmdk").unlink()
    run("sync", target)
    assert published_as(mount, "two/b") == "one/a"


def test_names_that_are_not_utf_8_are_refused(mount: Mount) -> None:
    (mount.path / "one" / "new").mkdir()
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(os.fsencode(mount.path / "one" / "new") + b"/\xff", os.O_CREAT | os.O_WRONLY)
