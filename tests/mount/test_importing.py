"""Files from outside become an image when they are one, and not before."""

import os
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.mount.harness import import_sparse, is_name, log_of, message_of, names, published_as, wait_listed
from tests.support.disks import MIB, assert_same_disk, make_disk
from tests.support.processes import Mount, run, wait_until

# As the kernel has it: the owner, user 1, the group and the mask may read and write, others may read.
_ENTRIES = ((0x01, 6, 0xFFFFFFFF), (0x02, 6, 1), (0x04, 4, 0xFFFFFFFF), (0x10, 6, 0xFFFFFFFF), (0x20, 4, 0xFFFFFFFF))
ACCESS_LIST = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in _ENTRIES)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    directory = tmp_path / "outside"
    make_disk(directory, "x.vmdk")
    (directory / "x.ecv").write_text('{"k": 1}')
    return directory


@pytest.mark.parametrize("datastore", ["one", "two", "three"])
def test_cp_from_outside(datastore: str, outside: Path, mount: Mount, client: SidecarClient) -> None:
    target = mount.path / datastore / "new"
    run("cp", "-r", outside, target)
    # The maker sees what is there; nobody sees half an image.
    image = wait_listed(mount, f"{datastore}/new")
    assert names(image) == {"new.vmdk", "new-flat.vmdk", "new.ecv"}
    assert published_as(mount, f"{datastore}/new") == ""
    assert_same_disk(outside / "x.vmdk", image / "new.vmdk")
    client.validate(f"{datastore}/new")


def test_is_not_listed_while_it_is_made(outside: Path, mount: Mount) -> None:
    target = mount.path / "one" / "new"
    target.mkdir()
    run("cp", outside / "x-flat.vmdk", target)
    assert names(target) == {"x-flat.vmdk"}
    assert names(mount.path / "one") == set()
    assert target.is_dir()


def test_sync_publishes_at_once_and_says_what_is_wrong(outside: Path, mount: Mount) -> None:
    target = mount.path / "one" / "new"
    target.mkdir()
    run("cp", outside / "x.vmdk", target)
    assert message_of("sync", target) == "Invalid argument"
    run("cp", outside / "x-flat.vmdk", target)
    run("sync", target)
    assert names(target) == {"new.vmdk", "new-flat.vmdk"}


def test_every_operation_works_in_a_staged_directory(outside: Path, mount: Mount) -> None:
    target = mount.path / "one" / "new"
    target.mkdir()
    path = target / ".x-flat.vmdk.partial"
    with path.open("w+b") as file:
        file.write(b"wrong")
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        assert file.read() == b"wrong"
        file.seek(0)
        file.truncate(0)
        file.write((outside / "x-flat.vmdk").read_bytes())
        os.fchmod(file.fileno(), 0o600)
    os.utime(path, ns=(10**18, 10**18))
    assert path.stat().st_mtime_ns == 10**18
    (target / "extra").write_text("not for long")
    (target / "extra").unlink()
    (target / "x-flat.vmdk").write_text("replaced")
    path.rename(target / "x-flat.vmdk")
    assert names(target) == {"x-flat.vmdk"}
    run("cp", outside / "x.vmdk", target)
    assert_same_disk(outside / "x.vmdk", wait_listed(mount, "one/new") / "new.vmdk")


def test_a_file_that_was_unlinked_stays_readable_while_it_is_open(mount: Mount) -> None:
    target = mount.path / "one" / "new"
    target.mkdir()
    with (target / "file").open("w+b") as file:
        file.write(b"content")
        file.flush()
        (target / "file").unlink()
        assert names(target) == set()
        file.seek(0)
        assert file.read() == b"content"
        file.truncate(3)
    target.rmdir()
    assert not target.exists()


@pytest.mark.parametrize("subformat", ["monolithicFlat", "monolithicSparse", "twoGbMaxExtentSparse", "streamOptimized"])
def test_qemu_img_convert_straight_into_the_mount(
    subformat: str, outside: Path, mount: Mount, client: SidecarClient
) -> None:
    target = mount.path / "one" / "new"
    target.mkdir()
    run("qemu-img", "convert", "-O", "vmdk", "-o", f"subformat={subformat}", outside / "x.vmdk", target / "x.vmdk")
    assert_same_disk(outside / "x.vmdk", wait_listed(mount, "one/new") / "new.vmdk")


def test_waits_for_every_file_and_for_quiet(outside: Path, mount: Mount) -> None:
    """The descriptor first, then the extent in pieces, the file closed in between."""
    target = mount.path / "one" / "new"
    target.mkdir()
    run("cp", outside / "x.vmdk", target)
    data = (outside / "x-flat.vmdk").read_bytes()
    wait_until(lambda: "not published image=one/new" in log_of(mount), "the sidecar has refused half of it")
    with (target / "x-flat.vmdk").open("wb") as file:
        file.write(data[: 2 * MIB])
    assert names(mount.path / "one") == set()
    with (target / "x-flat.vmdk").open("ab") as file:
        file.write(data[2 * MIB :])
        file.flush()
        # Complete, but open for writing for longer than the settle time.
        log = log_of(mount).count("published image=one/new ")
        with pytest.raises(AssertionError):
            wait_until(lambda: log_of(mount).count("published image=one/new ") > log, "", 4)
    assert_same_disk(outside / "x.vmdk", wait_listed(mount, "one/new") / "new.vmdk")


@pytest.mark.slow
@pytest.mark.parametrize("subformat", ["monolithicFlat", "monolithicSparse"])
def test_an_interrupted_import_publishes_nothing_and_can_be_repeated(
    subformat: str, mount: Mount, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    make_disk(outside, "x.vmdk", size=512 * MIB, data=((0, 512 * MIB),), subformat=subformat)
    target = mount.path / "one" / "new"
    copy = subprocess.Popen(["cp", "-r", outside, target])
    wait_until(lambda: sum(path.stat().st_size for path in target.glob("*")) > MIB, "the copy has begun")
    copy.send_signal(signal.SIGINT)
    assert copy.wait(30) == -signal.SIGINT
    wait_until(lambda: not is_name(target), f"nothing is left:\n{log_of(mount)}")
    assert names(mount.path / "one") == set()
    assert "published" not in log_of(mount)
    run("cp", "-r", outside, target)
    wait_listed(mount, "one/new")


def test_half_a_copy_with_its_full_size_is_not_published(mount: Mount, client: SidecarClient, tmp_path: Path) -> None:
    """A copier that preallocates and gives up: every file is there, with its size, and nobody was killed."""
    import_sparse(client, "one/a", make_disk(tmp_path / "source"))
    source, target = wait_listed(mount, "one/a"), mount.path / "two" / "b"
    target.mkdir()
    run("cp", source / "a.vmdk", target)
    with (source / "a-flat.vmdk").open("rb") as reading, (target / "a-flat.vmdk").open("wb") as writing:
        writing.truncate(8 * MIB)
        assert os.copy_file_range(reading.fileno(), writing.fileno(), 65536) == 65536
    with pytest.raises(AssertionError):
        wait_until(lambda: "published image=two/b" in log_of(mount), "", 5)
    assert names(mount.path / "two") == set()


def test_a_changed_disk_is_published_though_somebody_just_read_what_it_was_made_from(
    mount: Mount, client: SidecarClient, tmp_path: Path
) -> None:
    """Its guest freed a range: that is a hole now, and all else is as in the image."""
    import_sparse(client, "one/a", make_disk(tmp_path / "source"))
    out = tmp_path / "out"
    run("cp", "-r", wait_listed(mount, "one/a"), out)
    run("fallocate", "--punch-hole", "-o", str(4 * MIB), "-l", str(MIB), out / "a-flat.vmdk")
    run("cp", "-r", out, mount.path / "one" / "b")
    assert_same_disk(out / "a.vmdk", wait_listed(mount, "one/b") / "b.vmdk")
    assert published_as(mount, "one/b") == ""


def test_rm_r_of_a_staged_directory_drops_it(outside: Path, mount: Mount, tmp_path: Path) -> None:
    target = mount.path / "one" / "new"
    target.mkdir()
    run("cp", outside / "x-flat.vmdk", target)
    run("rm", "-r", target)
    assert not target.exists()
    assert not list((tmp_path / "one").glob("tmp_image_*"))
    run("cp", "-r", outside, target)
    wait_listed(mount, "one/new")


def test_what_was_synced_stays_when_the_mount_ends(outside: Path, mount: Mount, client: SidecarClient) -> None:
    """The unmount comes within the settle time: only who said that it is complete has an image."""
    run("cp", "-r", outside, mount.path / "one" / "new")
    run("sync", mount.path / "one" / "new")
    (mount.path / "one" / "half").mkdir()
    run("cp", outside / "x.vmdk", mount.path / "one" / "half")
    assert mount.stop() == 0
    assert [image.ref.image_id for image in client.images("one")] == ["new"]


OWN_ATTRIBUTES = {
    "cp -a": 'cp -a "$0" "$1"',
    "cp --preserve=xattr": 'cp -r --preserve=xattr "$0" "$1"',
    "busybox cp -a": 'busybox cp -a "$0" "$1"',
    "rsync -aAX": 'rsync -aAX "$0/" "$1"',
    "tar --xattrs": 'mkdir "$1" && tar -C "$0" --xattrs -cf - . | tar -C "$1" --xattrs -xpf -',
    "mv": 'mv "$0" "$1"',
}


@pytest.mark.parametrize("tool", OWN_ATTRIBUTES)
def test_owners_modes_times_and_attributes_that_a_tool_takes_along_stop_it_from_nothing(
    tool: str, outside: Path, mount: Mount, tmp_path: Path
) -> None:
    """An image has none of them. Refused, the tool would fail, or leave out the rest."""
    run("cp", "-r", outside, tmp_path / "kept")
    for path in (*outside.iterdir(), outside):
        os.setxattr(path, "user.note", b"kept")
        os.setxattr(path, "system.posix_acl_access", ACCESS_LIST)
        os.chown(path, 65534, 65534)
        os.utime(path, ns=(10**18, 10**18))
    done = run("sh", "-c", OWN_ATTRIBUTES[tool], outside, mount.path / "one" / "new")
    assert done.stderr == ""
    image = wait_listed(mount, "one/new")
    assert_same_disk(tmp_path / "kept" / "x.vmdk", image / "new.vmdk")
    assert image.stat().st_uid == os.getuid()


def test_a_time_that_is_not_set_stays(mount: Mount, tmp_path: Path) -> None:
    staged = mount.path / "one" / "new"
    staged.mkdir()
    file = staged / "x.txt"
    file.write_bytes(b"x")
    (real,) = (tmp_path / "one").glob("tmp_image_*/x.txt")
    run("touch", "-m", "-d", "@1500000000", file)
    assert real.stat().st_mtime == 1_500_000_000
    run("touch", "-a", "-d", "@1400000000", file)
    assert real.stat().st_mtime == 1_500_000_000
    run("touch", file)
    assert abs(real.stat().st_mtime - time.time()) < 60
