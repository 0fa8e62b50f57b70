"""UpdateMetadata: companion files come and go; the disk and the sidecar's own files never do."""

import pytest

from sidecar import errors
from tests.support.places import MIB, TIMESTAMP, TOMBSTONE, Place, flat_files
from tests.support.world import World


def test_companion_files_are_written_replaced_and_removed(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a", companions={"old.txt": b"old", "kept.txt": b"kept"})
    image = world.client.update_metadata(ref, files={"a.ecv": b'{"v": 1}', "new": b""}, remove=["old.txt"])
    assert [file.name for file in image.files] == ["a.ecv", "kept.txt", "new", "a-flat.vmdk", "a.vmdk"]
    assert world.client.image(ref).metadata_json == '{"v": 1}'
    world.client.update_metadata(ref, files={"a.ecv": b'{"v": 2}', "kept.txt": b"x" * MIB})
    assert place.file("a", "a.ecv").read_bytes() == b'{"v": 2}'
    assert place.file("a", "kept.txt").read_bytes() == b"x" * MIB
    world.client.update_metadata(ref, remove=["a.ecv", "kept.txt", "new"])
    assert world.client.image(ref).metadata_json == ""
    place.assert_holds({"a": flat_files("a")})


def test_corrupt_metadata_can_be_mended_and_removed(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a", companions={"a.ecv": b"{", "a.manifest": b"{"})
    world.client.update_metadata(ref, files={"a.ecv": b"{}"}, remove=["a.manifest"])
    world.client.validate(ref)


@pytest.mark.parametrize("name", ["a.vmdk", "a-flat.vmdk"])
def test_a_disk_never_changes(world: World, place: Place, name: str) -> None:
    place.plant("a")
    before = place.snapshot()
    with pytest.raises(errors.InvalidRequest, match="part of the disk"):
        world.client.update_metadata(f"{place.name}/a", files={name: b"x"})
    with pytest.raises(errors.InvalidRequest, match="part of the disk"):
        world.client.update_metadata(f"{place.name}/a", remove=[name])
    assert place.snapshot() == before


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../b", "x/y", "/etc/x", "x\0y", "x" * 256, ".hidden", TIMESTAMP, TOMBSTONE, "lock.ec_lock",
     "unused_image_marker.txt", "image_timestamp.txt.renamed", "tmp_image_x"],
)  # fmt: skip
def test_names_that_are_no_companions_are_refused(world: World, place: Place, name: str) -> None:
    place.plant("a")
    before = world.snapshot()
    with pytest.raises(errors.InvalidRequest):
        world.client.update_metadata(f"{place.name}/a", files={name: b"{}"})
    with pytest.raises(errors.InvalidRequest):
        world.client.update_metadata(f"{place.name}/a", remove=[name])
    assert world.snapshot() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ecv", b"{"),
        ("a.ecv", b"[]"),
        ("a.ecv", b""),
        ("a.ecv", b'{"a": NaN}'),
        ("a.ecv", b'{"a": [-Infinity]}'),
        ("a.ecv", b'{"a": 1e999}'),
        ("a.ecv", b'{"a": ' + 100_000 * b"[" + 100_000 * b"]" + b"}"),
        ("a.manifest", b'{"imageType": "X"}'),
        ("a.manifest", b"\xff"),
    ],
)
def test_what_is_not_json_is_refused_whole(world: World, place: Place, name: str, content: bytes) -> None:
    place.plant("a", companions={"a.ecv": b'{"old": 1}', "gone": b"x"})
    before = place.snapshot()
    with pytest.raises(errors.InvalidMetadata, match=name):
        world.client.update_metadata(f"{place.name}/a", files={name: content, "other": b"x"}, remove=["gone"])
    assert place.snapshot() == before


def test_a_file_larger_than_the_limit_is_refused(world: World, place: Place) -> None:
    place.plant("a")
    with pytest.raises(errors.InvalidRequest, match="at most 1048576"):
        world.client.update_metadata(f"{place.name}/a", files={"x": b"x" * (MIB + 1)})
    place.assert_holds({"a": flat_files("a")})


def test_removing_what_is_not_there_changes_nothing(world: World, place: Place) -> None:
    place.plant("a", companions={"x": b"x"})
    before = place.snapshot()
    with pytest.raises(errors.FileNotInImage, match="'none'"):
        world.client.update_metadata(f"{place.name}/a", files={"y": b"y"}, remove=["x", "none"])
    assert place.snapshot() == before


def test_a_file_cannot_be_written_and_removed_at_once(world: World, place: Place) -> None:
    place.plant("a", companions={"x": b"x"})
    before = place.snapshot()
    with pytest.raises(errors.InvalidRequest):
        world.client.update_metadata(f"{place.name}/a", files={"x": b"y"}, remove=["x"])
    assert place.snapshot() == before


def test_a_file_that_is_named_twice_is_removed_once(world: World, place: Place) -> None:
    place.plant("a", companions={"x": b"x"})
    world.client.update_metadata(f"{place.name}/a", remove=["x", "x"])
    place.assert_holds({"a": flat_files("a")})


@pytest.mark.parametrize(
    ("change", "error"), [("tombstone", errors.ImageTombstoned), ("timestamp", errors.ImageIncomplete)]
)
def test_only_a_valid_image_is_changed(
    world: World, place: Place, change: str, error: type[errors.ImagesError]
) -> None:
    place.plant("a")
    place.file("a", TOMBSTONE).touch() if change == "tombstone" else place.file("a", TIMESTAMP).unlink()
    before = place.snapshot()
    with pytest.raises(error):
        world.client.update_metadata(f"{place.name}/a", files={"x": b"x"})
    assert place.snapshot() == before


def test_a_link_in_place_of_a_companion_is_replaced_and_not_followed(world: World, place: Place) -> None:
    place.plant("a")
    place.file("a", "x").symlink_to(place.root / "outside")
    with pytest.raises(errors.ImagesError):
        world.client.update_metadata(f"{place.name}/a", files={"x": b"x"})
    assert not (place.root / "outside").exists()


def test_a_companion_with_the_longest_of_names_is_written(world: World, place: Place) -> None:
    place.plant("a")
    name = "\N{GRINNING FACE}" * 63  # 252 bytes
    world.client.update_metadata(f"{place.name}/a", files={name: b"x"})
    place.assert_holds({"a": flat_files("a", name)})
