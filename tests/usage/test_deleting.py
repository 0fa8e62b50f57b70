"""An image that a VM needs is not freed, whether the VM runs or not; the refusal, and `show`, say which VM."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.datastores import behind_mounts
from sidecar.datastores.open_files import FileUser
from tests.support.places import Place
from tests.support.processes import BIN, Mount, background, imagectl, run, wait_until
from tests.support.world import World, running_world
from tests.usage.conftest import delta


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    try:
        yield shared_world
    finally:
        shared_world.clear()


@pytest.fixture(params=["one", "two", "three"])
def place(request: pytest.FixtureRequest, world: World) -> Place:
    return world.places[request.param]


def clone(world: World, descriptor: Path, vm_id: str = "web", name: str = "disk.vmdk") -> Path:
    """A VM on the datastore `one` with a linked clone of the image; its descriptor."""
    directory = world.places["one"].root / f"vm_{vm_id}"
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(delta(str(descriptor)))
    return directory / name


def test_an_image_that_a_stopped_vm_needs_is_tombstoned_and_not_freed(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    disk = clone(world, place.plant("a"))
    before = place.snapshot()
    who = f"{ref} is in use by VM web (disk {disk})"
    with pytest.raises(errors.ImageInUse) as refused:
        world.client.delete(ref, force=True)
    assert who in refused.value.message
    assert place.snapshot() == before
    world.client.delete(ref)
    with pytest.raises(errors.ImageInUse) as refused:
        world.client.purge(ref)
    assert who in refused.value.message
    world.client.restore(ref)
    disk.unlink()
    world.client.delete(ref, force=True)
    assert not place.directory("a").exists()


def test_only_the_image_that_is_used_is_kept(world: World, place: Place) -> None:
    clone(world, place.plant("a"))
    place.plant("b")
    world.client.delete(f"{place.name}/b", force=True)
    assert not place.directory("b").exists()
    assert place.directory("a").exists()


def test_a_vm_that_cannot_be_read_stops_every_purge_and_says_what_to_do(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    disk = clone(world, Path("/not/there.vmdk"))
    said = rf"VM web: {disk}: .*remove the VM, and try again"
    before = place.snapshot()
    with pytest.raises(errors.UseUnknown, match=said):
        world.client.delete(ref, force=True)
    assert place.snapshot() == before
    world.client.delete(ref)  # a tombstone frees nothing
    before = place.snapshot()
    with pytest.raises(errors.UseUnknown, match=said):
        world.client.purge(ref)
    assert place.snapshot() == before


def test_many_users_make_a_message_of_bounded_length(world: World) -> None:
    image = world.places["one"].plant("a")
    for number in range(50):
        clone(world, image, str(number))
    with pytest.raises(errors.ImageInUse, match=r"and 45 more; ") as refused:
        world.client.delete("one/a", force=True)
    assert len(refused.value.message) < 2000


def test_show_names_the_vms_and_a_listing_does_not_look_for_them(world: World) -> None:
    disk = clone(world, world.places["one"].plant("a"))
    world.wait_listed("one/a")
    assert f"VM web (disk {disk})" in imagectl(world.sidecar.address, "show", "one/a").stdout
    shown = json.loads(imagectl(world.sidecar.address, "--output", "json", "show", "one/a").stdout)
    assert shown["users"] == [f"VM web (disk {disk})"]
    assert world.client.image("one/a").users == []
    clone(world, Path("/not/there.vmdk"), "broken")
    users = world.client.image("one/a", with_vms=True).users
    assert len(users) == 1 and users[0].startswith("unknown, VM broken: ")
    world.listed("one")


@pytest.mark.parametrize("program", ["qemu-system-x86_64", "qemu-nbd", "sleep"])
def test_who_has_an_image_open_through_the_mount_is_named(world: World, tmp_path: Path, program: str) -> None:
    world.places["one"].plant("a")
    world.places["one"].plant("b")
    with ExitStack() as stack:
        other = stack.enter_context(Mount(tmp_path / "other", world.sidecar.address))
        mount = stack.enter_context(Mount(tmp_path / "mnt", world.sidecar.address))
        assert mount.process and other.process
        wait_until(lambda: {"a", "b"} <= set(os.listdir(mount.path / "one")), "the images are listed")
        wait_until(lambda: "a" in os.listdir(other.path / "one"), "the image is listed")
        overlay = tmp_path / "overlay.qcow2"
        backing = mount.path / "one" / "a" / "a.vmdk"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "vmdk", "-b", backing, overlay)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        drive = f"file={overlay},format=qcow2,if=virtio"
        commands: dict[str, list[str]] = {
            "qemu-system-x86_64": ["-S", "-nographic", "-nodefaults", "-accel", "tcg", "-drive", drive],
            "qemu-nbd": ["-f", "qcow2", "--persistent", "--socket", str(directory / "socket"), str(overlay)],
            "tail": ["-f", str(backing)],
        }
        if program == "sleep":  # any program that has the file open, and holds no lock of its own
            started = background("sh", "-c", f"exec sleep 60 <{backing}")
        else:
            started = background(program, *commands[program])
        process = stack.enter_context(started)
        through = f" (pid {process.pid}) through image-mount (pid {mount.process.pid})"
        wait_until(lambda: bool(world.client.image("one/a").users), "the disk is open")
        assert world.client.image("one/a").users == [f"{program}{through}"]
        with pytest.raises(errors.ImageInUse) as refused:
            world.client.delete("one/a", force=True)
        assert f"{program}{through}" in refused.value.message
        world.client.delete("one/a")
        wait_until(lambda: "a" not in os.listdir(mount.path / "one"), "the mount knows of the tombstone")
        with pytest.raises(errors.ImageInUse) as refused:
            world.client.purge("one/a")
        assert f"{program}{through}" in refused.value.message
        held = stack.enter_context((other.path / "one" / "b" / "b.vmdk").open("rb"))
        (user,) = world.client.image("one/b").users
        assert f"(pid {os.getpid()}) through image-mount (pid {other.process.pid})" in user
        held.close()


def test_a_mount_is_known_by_its_mountpoint_where_the_kernel_does_not_tell(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.places["one"].plant("a")
    monkeypatch.setattr(behind_mounts, "_CONNECTION", "not told:")
    with Mount(tmp_path / "other", world.sidecar.address), Mount(tmp_path / "mnt", world.sidecar.address) as mount:
        assert mount.process
        daemon = FileUser(mount.process.pid, "image-mount")
        wait_until(lambda: "a" in os.listdir(mount.path / "one"), "the image is listed")
        assert behind_mounts.with_openers([daemon], "one", "a") == (daemon,)
        with (tmp_path / "other" / "one" / "a" / "a.vmdk").open("rb"):
            assert behind_mounts.with_openers([daemon], "one", "a") == (daemon,)
        with (mount.path / "one" / "a" / "a.vmdk").open("rb"):
            (user,) = behind_mounts.with_openers([daemon], "one", "a")
            assert (user.pid, user.through) == (os.getpid(), daemon)
            assert behind_mounts.with_openers([daemon], "one", "b") == (daemon,)


def test_a_vm_on_an_image_in_a_mount_keeps_it(world: World, tmp_path: Path) -> None:
    world.places["two"].plant("a")
    vm = world.places["one"].root / "vm_1"
    vm.mkdir()
    with Mount(tmp_path / "mnt", world.sidecar.address) as mount:
        wait_until(lambda: "a" in os.listdir(mount.path / "two"), "the image is listed")
        backing = mount.path / "two" / "a" / "a.vmdk"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "vmdk", "-b", backing, vm / "disk.qcow2")
        (tmp_path / "alias").symlink_to(mount.path)
        with pytest.raises(errors.ImageInUse, match="VM 1"):
            world.client.delete("two/a", force=True)
        run("rm", "-r", mount.path / "two" / "a")
        wait_until(lambda: "a" in os.listdir(mount.path / "two" / ".deleted"), "it is tombstoned")
        refused = run("rm", "-r", mount.path / "two" / ".deleted" / "a", check=False)
        assert "Device or resource busy" in refused.stderr
        known = json.loads(run("cat", mount.path / "two" / ".deleted" / "a" / ".image.json").stdout)
        assert known["users"] == [f"VM 1 (disk {vm}/disk.qcow2)"]
    # Without the mount its disk cannot be followed: not to know is no reason to free anything.
    with pytest.raises(errors.UseUnknown):
        world.client.purge("two/a")


def test_a_vm_made_while_a_purge_waits_for_the_lock_is_seen(world: World, place: Place) -> None:
    image = place.plant("a")
    with place.locked("a"):
        purge = subprocess.Popen(
            [*_imagectl(world), "rm", "--force", f"{place.name}/a"], stderr=subprocess.PIPE, text=True
        )
        clone(world, image)
    assert purge.wait(30) == 5
    assert purge.stderr is not None
    with purge.stderr:
        assert "VM web" in purge.stderr.read()
    assert image.exists()


def _imagectl(world: World) -> list[str]:
    return [str(BIN / "imagectl"), "--sidecar", world.sidecar.address]
