"""GetImage: one image as it is on the datastore now, with what is wrong with it."""

import os
from pathlib import Path

import pytest

from protos.images.v1.types_pb2 import (
    FILE_KIND_COMPANION,
    FILE_KIND_DESCRIPTOR,
    FILE_KIND_EXTENT,
    IMAGE_STATE_INCOMPLETE,
    IMAGE_STATE_TOMBSTONED,
    IMAGE_STATE_VALID,
)
from sidecar import errors
from tests.support.places import KIB, MARKER, MIB, RENAMED, TIMESTAMP, TOMBSTONE, Place, flat_descriptor
from tests.support.processes import run
from tests.support.world import World

METADATA = b'{"os": "debian", "tags": ["a", "b"], "name": "\xc3\xa4"}'
MANIFEST = b'{"imageType": "CLOUD", "imageReplication": "EAGER"}'


def test_files_are_listed_companions_first_and_the_descriptor_last(world: World, place: Place) -> None:
    # A copier that follows this order has a complete image with its last file, not before.
    place.plant("a", companions={"zz.txt": b"last by name", "a.ecv": METADATA, "a.manifest": MANIFEST, "0": b""})
    image = world.client.image(f"{place.name}/a")
    assert [file.name for file in image.files] == ["0", "a.ecv", "a.manifest", "zz.txt", "a-flat.vmdk", "a.vmdk"]
    assert [file.kind for file in image.files] == [
        *[FILE_KIND_COMPANION] * 4,
        FILE_KIND_EXTENT,
        FILE_KIND_DESCRIPTOR,
    ]


def test_every_extent_of_a_split_disk_is_one_of_its_files(world: World, place: Place) -> None:
    place.directory("a").mkdir(parents=True)
    run("qemu-img", "create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", place.descriptor("a"), "5G")
    place.file("a", "b.vmdk").write_bytes(b"not named by the descriptor")
    place.file("a", TIMESTAMP).touch()
    image = world.client.image(f"{place.name}/a")
    assert [(file.name, file.kind) for file in image.files] == [
        ("b.vmdk", FILE_KIND_COMPANION),
        ("a-s001.vmdk", FILE_KIND_EXTENT),
        ("a-s002.vmdk", FILE_KIND_EXTENT),
        ("a-s003.vmdk", FILE_KIND_EXTENT),
        ("a.vmdk", FILE_KIND_DESCRIPTOR),
    ]
    assert image.disk_type == "twoGbMaxExtentSparse"
    assert image.capacity_bytes == 5 << 30


def test_sizes_times_and_numbers_are_those_of_the_disk(world: World, place: Place) -> None:
    place.plant("a", size=4 * MIB, data=[(1 * MIB, 64 * KIB)], companions={"a.ecv": METADATA})
    os.utime(place.file("a", TIMESTAMP), ns=(1, 1_600_000_000_123_456_789))
    os.utime(place.file("a", "a-flat.vmdk"), ns=(1, 1_500_000_000_000_000_001))
    image = world.client.image(f"{place.name}/a")
    for file in image.files:
        status = place.file("a", file.name).stat()
        assert file.size_bytes == status.st_size
        assert file.allocated_bytes == status.st_blocks * 512
        assert file.modify_time.ToNanoseconds() == status.st_mtime_ns
        assert file.inode == status.st_ino
    assert image.size_bytes == sum(file.size_bytes for file in image.files)
    assert image.allocated_bytes == sum(file.allocated_bytes for file in image.files) < 1 * MIB
    assert image.capacity_bytes == 4 * MIB
    assert image.disk_type == "monolithicFlat"
    assert image.state == IMAGE_STATE_VALID
    assert image.touch_time.ToNanoseconds() == 1_600_000_000_123_456_789
    assert image.create_time.ToNanoseconds() == 1_500_000_000_000_000_001
    assert place.root / image.directory == place.directory("a")
    assert image.details_known
    assert not image.problems
    assert not image.users
    assert not image.HasField("tombstone_time")
    assert not image.HasField("marked_unused_time")


def test_metadata_and_manifest_are_told_as_they_are_written(world: World, place: Place) -> None:
    place.plant("a", companions={"a.ecv": METADATA, "a.manifest": MANIFEST})
    image = world.client.image(f"{place.name}/a")
    assert image.metadata_json.encode() == METADATA
    assert image.manifest_json.encode() == MANIFEST
    assert not image.problems


def test_an_image_without_metadata_has_none_and_no_problem(world: World, place: Place) -> None:
    place.plant("a", companions={"b.ecv": METADATA})
    image = world.client.image(f"{place.name}/a")
    assert (image.metadata_json, image.manifest_json, list(image.problems)) == ("", "", [])


@pytest.mark.parametrize("ending", ["ecv", "manifest"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"\0" * 10,
        b"{}x",
        b"[" * 200_000,
        b'{"a": "' + b"x" * MIB + b'"}',
    ],
    ids=["empty", "cut", "null", "list", "text", "no-utf-8", "zeroes", "more", "deep", "large"],
)
def test_corrupt_metadata_is_a_problem_and_never_no_metadata(
    world: World, place: Place, ending: str, content: bytes
) -> None:
    place.plant("a", companions={f"a.{ending}": content})
    image = world.client.image(f"{place.name}/a")
    assert [problem for problem in image.problems if f"a.{ending}" in problem]
    assert f"a.{ending}" in [file.name for file in image.files]
    assert image.state == IMAGE_STATE_VALID
    with pytest.raises(errors.InvalidMetadata, match=f"a.{ending}"):
        world.client.validate(f"{place.name}/a")


@pytest.mark.parametrize(
    "content", [b'{"imageType": "OTHER"}', b'{"imageReplication": 1}', b'{"imageType": ["CLOUD"]}']
)
def test_a_manifest_that_means_nothing_is_a_problem(world: World, place: Place, content: bytes) -> None:
    place.plant("a", companions={"a.manifest": content})
    assert "a.manifest" in world.client.image(f"{place.name}/a").problems[0]
    with pytest.raises(errors.InvalidMetadata):
        world.client.validate(f"{place.name}/a")


def test_bookkeeping_files_are_told_as_times_and_not_listed(world: World, place: Place) -> None:
    place.plant("a")
    place.file("a", MARKER).write_text("1450000000")
    place.file("a", TOMBSTONE).touch()
    os.utime(place.file("a", TOMBSTONE), ns=(1, 1_700_000_000_000_000_000))
    place.file("a", RENAMED).touch()
    place.file("a", ".hidden").touch()
    image = world.client.image(f"{place.name}/a")
    assert [file.name for file in image.files] == ["a-flat.vmdk", "a.vmdk"]
    assert image.state == IMAGE_STATE_TOMBSTONED
    assert image.tombstone_time.seconds == 1_700_000_000
    assert image.marked_unused_time.seconds == 1_450_000_000
    place.file("a", ".hidden").unlink()


@pytest.mark.parametrize("content", ["", "yesterday", "9" * 100])
def test_a_marker_without_a_time_is_a_problem_and_not_a_mark(world: World, place: Place, content: str) -> None:
    place.plant("a")
    place.file("a", MARKER).write_text(content)
    image = world.client.image(f"{place.name}/a")
    assert not image.HasField("marked_unused_time")
    assert MARKER in image.problems[0]
    assert image.state == IMAGE_STATE_VALID


@pytest.mark.parametrize(
    ("missing", "state", "problem"),
    [
        ("a.vmdk", IMAGE_STATE_INCOMPLETE, "no descriptor"),
        (TIMESTAMP, IMAGE_STATE_INCOMPLETE, ""),
        ("a-flat.vmdk", IMAGE_STATE_VALID, "'a-flat.vmdk' is not there"),
    ],
)
def test_what_an_image_lacks_is_told(world: World, place: Place, missing: str, state: int, problem: str) -> None:
    place.plant("a")
    place.file("a", missing).unlink()
    image = world.client.image(f"{place.name}/a")
    assert image.state == state
    assert problem in "; ".join(image.problems)


@pytest.mark.parametrize("size", [0, 2 * MIB - 512, 2 * MIB + 512])
def test_an_extent_of_another_size_is_a_problem(world: World, place: Place, size: int) -> None:
    place.plant("a")
    os.truncate(place.file("a", "a-flat.vmdk"), size)
    image = world.client.image(f"{place.name}/a")
    assert f"has {size} bytes, not {2 * MIB}" in image.problems[0]


@pytest.mark.parametrize("content", [b"", b"not a descriptor", b"\0" * 512, b"\xff" * 3000, b"KDMV" + b"\0" * 508])
def test_a_descriptor_that_cannot_be_read_is_a_problem(world: World, place: Place, content: bytes) -> None:
    place.plant("a")
    place.descriptor("a").write_bytes(content)
    image = world.client.image(f"{place.name}/a")
    assert image.state == IMAGE_STATE_VALID
    assert "a.vmdk" in image.problems[0] or "descriptor" in image.problems[0]


def test_a_link_in_an_image_is_a_problem_and_never_followed(world: World, place: Place, scratch: Path) -> None:
    (scratch / "secret").write_bytes(b"x" * 2 * MIB)
    place.plant("a")
    place.file("a", "a-flat.vmdk").unlink()
    place.file("a", "a-flat.vmdk").symlink_to(scratch / "secret")
    os.mkfifo(place.file("a", "fifo"))
    place.file("a", "directory").mkdir()
    image = world.client.image(f"{place.name}/a")
    for name in ("a-flat.vmdk", "fifo", "directory"):
        assert any(f"{name!r} is not a plain file" in problem for problem in image.problems)
    assert [file.name for file in image.files] == ["a.vmdk"]
    for name in ("a-flat.vmdk", "fifo", "directory"):
        with pytest.raises(errors.FileNotInImage):
            list(world.client.read_file(f"{place.name}/a", name))
    with pytest.raises(errors.ImageIncomplete):
        world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    with pytest.raises(errors.ImageIncomplete):
        world.client.validate(f"{place.name}/a")
    world.client.delete(f"{place.name}/a", force=True)
    place.assert_holds({})
    assert (scratch / "secret").read_bytes() == b"x" * 2 * MIB


@pytest.mark.parametrize("target", ["/etc/shadow", "../../secret", "..", "b/c.vmdk"])
def test_a_descriptor_that_names_files_outside_is_a_problem_and_nothing_is_read(
    world: World, place: Place, target: str
) -> None:
    place.plant("a")
    place.descriptor("a").write_text(flat_descriptor(target, 2 * MIB))
    image = world.client.image(f"{place.name}/a")
    assert target in image.problems[0]
    for call in (
        lambda: world.client.copy(f"{place.name}/a", f"{place.name}/b").wait(),
        lambda: world.client.validate(f"{place.name}/a"),
    ):
        with pytest.raises(errors.ImageIncomplete):
            call()
    place.assert_holds({"a": ["a.vmdk", "a-flat.vmdk", TIMESTAMP]})


def test_an_image_directory_that_is_a_link_is_no_image(world: World, place: Place, scratch: Path) -> None:
    place.plant("a")
    place.directory("a").rename(scratch / "a")
    place.directory("a").symlink_to(scratch / "a")
    for call in (
        lambda: world.client.image(f"{place.name}/a"),
        lambda: world.client.copy(f"{place.name}/a", f"{place.name}/b").wait(),
        lambda: world.client.delete(f"{place.name}/a", force=True),
    ):
        with pytest.raises((errors.InvalidRequest, errors.ImageNotFound)):
            call()
    assert world.listed() == {}
    assert sorted(path.name for path in (scratch / "a").iterdir()) == ["a-flat.vmdk", "a.vmdk", TIMESTAMP]
    place.directory("a").unlink()


def test_a_directory_with_nothing_of_an_image_is_none(world: World, place: Place) -> None:
    place.directory("a").mkdir(parents=True)
    (place.directory("a") / MARKER).touch()
    with pytest.raises(errors.ImageNotFound):
        world.client.image(f"{place.name}/a")
    assert world.listed() == {}
    (place.directory("a") / MARKER).unlink()
    place.directory("a").rmdir()


def test_an_image_that_is_not_there_is_not_found(world: World, place: Place) -> None:
    before = place.snapshot()
    for call in (world.client.image, world.client.validate, world.client.touch, world.client.delete,
                 world.client.restore, world.client.purge):  # fmt: skip
        with pytest.raises(errors.ImageNotFound, match=f"there is no image {place.name}/none"):
            call(f"{place.name}/none")
    with pytest.raises(errors.ImageNotFound):
        world.client.delete(f"{place.name}/none", force=True)
    with pytest.raises(errors.ImageNotFound):
        world.client.validate(f"{place.name}/none", repair=True)
    with pytest.raises(errors.ImageNotFound):
        world.client.update_metadata(f"{place.name}/none", files={"none.ecv": b"{}"})
    with pytest.raises(errors.ImageNotFound):
        world.client.copy(f"{place.name}/none", f"{place.name}/b").wait()
    assert place.snapshot() == before


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
@pytest.mark.parametrize("name", [TIMESTAMP, TOMBSTONE, MARKER])
def test_a_bookkeeping_file_that_is_no_plain_file_is_a_problem_of_an_image_that_can_be_deleted(
    world: World, place: Place, scratch: Path, name: str, kind: str
) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    place.file("a", name).unlink(missing_ok=True)
    if kind == "directory":
        place.file("a", name).mkdir()
    elif kind == "link":
        place.file("a", name).symlink_to(scratch)
    else:
        os.mkfifo(place.file("a", name))
    image = world.client.image(ref)
    assert f"{name!r} is not a plain file" in image.problems
    states = {TIMESTAMP: IMAGE_STATE_INCOMPLETE, TOMBSTONE: IMAGE_STATE_TOMBSTONED, MARKER: IMAGE_STATE_VALID}
    assert image.state == states[name]
    assert ref in world.listed()
    world.client.delete(ref, force=True)
    place.assert_holds({})
