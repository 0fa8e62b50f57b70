"""What a staging directory must not hold, and which names nobody may write: refused, and mendable until it is right."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.client import Staging
from tests.support.disks import assert_same_disk
from tests.support.places import MIB, RENAMED, TIMESTAMP, TOMBSTONE, Place, flat_descriptor, flat_files, write_flat_disk
from tests.support.processes import run
from tests.support.world import World

NAMES = {
    "empty": "",
    "dot": ".",
    "dot-dot": "..",
    "slash": "a/b",
    "out": "../b",
    "absolute": "/etc/passwd",
    "trailing-slash": "a/",
    "nul": "a\0b",
    "256": "a" * 256,
    "300": "a" * 300,
    "256-bytes": "ä" * 128,
    "timestamp": TIMESTAMP,
    "renamed-timestamp": RENAMED,
    "tombstone": TOMBSTONE,
    "marker": "unused_image_marker.txt",
    "lock": "lock.ec_lock",
    "another-lock": "x.ec_lock",
    "staging": "tmp_image_x",
}


@pytest.fixture
def disk(scratch: Path) -> Path:
    write_flat_disk(scratch, "disk", seed=5)
    return scratch / "disk.vmdk"


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_no_file_of_an_image_has_is_refused(world: World, place: Place, name: str) -> None:
    place.plant("src")
    with world.client.create_staging(f"{place.name}/a") as staging:
        before = world.snapshot()
        with pytest.raises(errors.InvalidRequest):
            staging.write_file(name, [(0, b"x")])
        with pytest.raises(errors.InvalidRequest):
            list(world.client.read_file(staging, name))
        with pytest.raises(errors.InvalidRequest):
            list(world.client.read_file(f"{place.name}/src", name))
        with pytest.raises(errors.InvalidRequest):
            staging.clone_range(f"{place.name}/src", "src.vmdk", 0, name, 0, 1)
        with pytest.raises(errors.InvalidRequest):
            staging.clone_range(f"{place.name}/src", name, 0, "x", 0, 1)
        assert world.snapshot() == before


def write(staging: Staging, name: str, content: bytes | str) -> None:
    staging.write_file(name, [], size=0)
    staging.write_file(name, [(0, content if isinstance(content, bytes) else content.encode())])


def complete(staging: Staging, disk: Path) -> None:
    for path in (disk, disk.with_name("disk-flat.vmdk")):
        write(staging, path.name, path.read_bytes())


def without_descriptor(staging: Staging, directory: Path) -> None:
    (directory / "disk.vmdk").unlink()


def without_extent(staging: Staging, directory: Path) -> None:
    (directory / "disk-flat.vmdk").unlink()


def short_extent(staging: Staging, directory: Path) -> None:
    os.truncate(directory / "disk-flat.vmdk", 2 * MIB - 512)


def long_extent(staging: Staging, directory: Path) -> None:
    os.truncate(directory / "disk-flat.vmdk", 2 * MIB + 512)


def cut_descriptor(staging: Staging, directory: Path) -> None:
    os.truncate(directory / "disk.vmdk", 60)


def empty_descriptor(staging: Staging, directory: Path) -> None:
    write(staging, "disk.vmdk", b"")


def zeroed_descriptor(staging: Staging, directory: Path) -> None:
    write(staging, "disk.vmdk", bytes(1024))


def two_disks(staging: Staging, directory: Path) -> None:
    write(staging, "other.vmdk", flat_descriptor("other-flat.vmdk", 1 * MIB))
    staging.write_file("other-flat.vmdk", [], size=1 * MIB)


def extent_is_shadow(staging: Staging, directory: Path) -> None:
    write(staging, "disk.vmdk", flat_descriptor("/etc/shadow", 2 * MIB))


def extent_is_above(staging: Staging, directory: Path) -> None:
    write(staging, "disk.vmdk", flat_descriptor("../../x", 2 * MIB))


def extent_is_the_parent_directory(staging: Staging, directory: Path) -> None:
    write(staging, "disk.vmdk", flat_descriptor("..", 2 * MIB))


def extent_is_the_descriptor(staging: Staging, directory: Path) -> None:
    write(staging, "disk.vmdk", flat_descriptor("disk.vmdk", 512))


def extent_is_a_lock(staging: Staging, directory: Path) -> None:
    write(staging, "disk.vmdk", flat_descriptor("lock.ec_lock", 512))


def with_a_parent(staging: Staging, directory: Path) -> None:
    text = flat_descriptor("disk-flat.vmdk", 2 * MIB).replace("ffffffff", "12345678")
    write(staging, "disk.vmdk", text.replace("createType", 'parentFileNameHint="base.vmdk"\ncreateType'))


def with_a_parent_in_a_comment(staging: Staging, directory: Path) -> None:
    # QEMU follows it even there.
    text = flat_descriptor("disk-flat.vmdk", 2 * MIB)
    write(staging, "disk.vmdk", text.replace("createType", '# parentFileNameHint="/etc/passwd"\ncreateType'))


def raw_disk(staging: Staging, directory: Path) -> None:
    write(staging, "disk.vmdk", b"\x55\xaa" * 4096)


def link_for_the_extent(staging: Staging, directory: Path) -> None:
    (directory / "disk-flat.vmdk").unlink()
    (directory / "disk-flat.vmdk").symlink_to("/etc/shadow")


def link_for_the_descriptor(staging: Staging, directory: Path) -> None:
    (directory / "disk.vmdk").unlink()
    (directory / "disk.vmdk").symlink_to("/etc/shadow")


def link_beside(staging: Staging, directory: Path) -> None:
    (directory / "notes").symlink_to("/etc/shadow")


def fifo(staging: Staging, directory: Path) -> None:
    os.mkfifo(directory / "fifo")


def fifo_for_the_descriptor(staging: Staging, directory: Path) -> None:
    (directory / "disk.vmdk").unlink()
    os.mkfifo(directory / "disk.vmdk")


def socket_or_device(staging: Staging, directory: Path) -> None:
    os.mknod(directory / "null", 0o600 | 0o020000, os.makedev(1, 3))


def subdirectory(staging: Staging, directory: Path) -> None:
    (directory / "directory").mkdir()


def subdirectory_named_like_a_disk(staging: Staging, directory: Path) -> None:
    (directory / "x.vmdk").mkdir()


def hidden_file(staging: Staging, directory: Path) -> None:
    write(staging, ".hidden", b"x")


def tombstone(staging: Staging, directory: Path) -> None:
    (directory / TOMBSTONE).touch()


def marker(staging: Staging, directory: Path) -> None:
    (directory / "unused_image_marker.txt").touch()


def two_files_for_one_name(staging: Staging, directory: Path) -> None:
    write(staging, "disk.txt", b"x")
    write(staging, "a.txt", b"y")


def extent_that_nobody_names(staging: Staging, directory: Path) -> None:
    write(staging, "disk-s002.vmdk", b"x")


def companion_with_the_disks_name(staging: Staging, directory: Path) -> None:
    write(staging, "a-flat.vmdk", b"x")


def name_that_is_no_text(staging: Staging, directory: Path) -> None:
    (directory / os.fsdecode(b"notes-\xff")).touch()


FAULTS: list[Callable[[Staging, Path], None]] = [
    without_descriptor, without_extent, short_extent, long_extent, cut_descriptor, empty_descriptor, zeroed_descriptor,
    two_disks, extent_is_shadow, extent_is_above, extent_is_the_parent_directory, extent_is_the_descriptor,
    extent_is_a_lock, with_a_parent, with_a_parent_in_a_comment, raw_disk, link_for_the_extent, link_for_the_descriptor,
    link_beside, fifo, fifo_for_the_descriptor, socket_or_device, subdirectory, subdirectory_named_like_a_disk,
    hidden_file, tombstone, marker, two_files_for_one_name, companion_with_the_disks_name,
    extent_that_nobody_names, name_that_is_no_text,
]  # fmt: skip


def test_what_is_not_a_vmdk_is_told_by_its_kind(world: World, place: Place, scratch: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", scratch / "disk.vmdk", "4M")
    with world.client.create_staging(f"{place.name}/a") as staging:
        write(staging, "disk.vmdk", (scratch / "disk.vmdk").read_bytes())
        with pytest.raises(errors.InvalidDisk, match=r"'disk.vmdk': a qcow2 disk, .* qemu-img convert -O vmdk"):
            staging.commit()


def test_the_data_without_its_descriptor_is_told_what_is_missing(world: World, place: Place, disk: Path) -> None:
    with world.client.create_staging(f"{place.name}/a") as staging:
        write(staging, "disk-flat.vmdk", disk.with_name("disk-flat.vmdk").read_bytes())
        with pytest.raises(errors.InvalidDisk, match=r"its descriptor, 'disk.vmdk', is missing"):
            staging.commit()
        write(staging, "disk.vmdk", disk.read_bytes())
        staging.commit()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_what_is_no_whole_disk_is_not_published_and_can_be_mended(
    world: World, place: Place, disk: Path, fault: Callable[[Staging, Path], None]
) -> None:
    with world.client.create_staging(f"{place.name}/a") as staging:
        directory = place.root / staging.directory
        complete(staging, disk)
        fault(staging, directory)
        before = place.snapshot()
        for _ in range(2):
            with pytest.raises(errors.InvalidDisk):
                staging.commit()
            assert place.snapshot() == before
        assert world.listed() == {}
        # Mended, it is an image.
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.endswith(".ec_lock"):
                path.unlink()
        complete(staging, disk)
        staging.commit()
    place.assert_holds({"a": flat_files("a")})
    assert_same_disk(disk, place.descriptor("a"))


def test_an_extent_is_never_named_like_a_staging_directory(world: World, place: Place, scratch: Path) -> None:
    # The descriptor's name, less `.vmdk`, is the extent's: the image id alone would be its new name.
    write_flat_disk(scratch, "disk", seed=5)
    with world.client.create_staging(f"{place.name}/tmp_image_x") as staging:
        write(staging, "disk.vmdk", (scratch / "disk.vmdk").read_text().replace("disk-flat.vmdk", "disk"))
        write(staging, "disk", (scratch / "disk-flat.vmdk").read_bytes())
        staging.commit()
    place.assert_holds({"tmp_image_x": flat_files("tmp_image_x")})
    assert_same_disk(scratch / "disk.vmdk", place.descriptor("tmp_image_x"))


def test_a_delta_on_another_disk_is_not_published(world: World, place: Place, disk: Path, scratch: Path) -> None:
    delta = scratch / "delta.vmdk"
    run("qemu-img", "create", "-f", "vmdk", "-F", "vmdk", "-b", disk, delta)
    with world.client.create_staging(f"{place.name}/a") as staging:
        write(staging, "delta.vmdk", delta.read_bytes())
        with pytest.raises(errors.InvalidDisk, match="has a parent"):
            staging.commit()
    place.assert_holds({})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("disk.ecv", b"{"),
        ("disk.ecv", b"[]"),
        ("disk.manifest", b'{"imageType": "X"}'),
        ("a.ecv", b""),
        ("a.ecv", "{}".encode("utf-16")),
        ("a.manifest", b"\xff"),
    ],
)
def test_corrupt_metadata_is_not_published_and_can_be_mended(
    world: World, place: Place, disk: Path, name: str, content: bytes
) -> None:
    with world.client.create_staging(f"{place.name}/a") as staging:
        complete(staging, disk)
        write(staging, name, content)
        with pytest.raises(errors.InvalidMetadata, match=name):
            staging.commit()
        write(staging, name, b"{}")
        staging.commit()
    assert len(world.client.image(f"{place.name}/a").files) == 3


def test_a_planted_link_is_never_written_through_or_read(world: World, place: Place, scratch: Path) -> None:
    secret = scratch / "secret"
    secret.write_bytes(b"secret")
    with world.client.create_staging(f"{place.name}/a") as staging:
        directory = place.root / staging.directory
        place.plant("src")
        (directory / "x").symlink_to(secret)
        (directory / "new").symlink_to(scratch / "new")
        os.mkfifo(directory / "fifo")
        (directory / "directory").mkdir()
        for name in ("x", "new", "fifo", "directory"):
            with pytest.raises(errors.InvalidRequest):
                staging.write_file(name, [(0, b"overwritten")])
            with pytest.raises((errors.InvalidRequest, errors.FileNotInImage)):
                list(world.client.read_file(staging, name))
            with pytest.raises(errors.InvalidRequest):
                staging.clone_range(f"{place.name}/src", "src.vmdk", 0, name, 0, 10)
    assert secret.read_bytes() == b"secret"
    assert not (scratch / "new").exists()
    place.assert_holds({"src": flat_files("src")})


def test_a_staging_directory_that_was_replaced_by_a_link_harms_nobody(
    world: World, place: Place, scratch: Path
) -> None:
    (scratch / "kept").write_bytes(b"kept")
    staging = world.client.create_staging(f"{place.name}/a")
    directory = place.root / staging.directory
    directory.rename(scratch / "moved")
    directory.symlink_to(scratch)
    with pytest.raises(errors.ImagesError):
        staging.write_file("x", [(0, b"x")])
    with pytest.raises(errors.ImagesError):
        staging.commit()
    staging.abort()
    assert sorted(path.name for path in scratch.iterdir()) == ["kept", "moved"]
    assert (scratch / "kept").read_bytes() == b"kept"
    directory.unlink(missing_ok=True)
    if place.layout == "vsan" and place.directory("a").exists():
        place.directory("a").rmdir()
