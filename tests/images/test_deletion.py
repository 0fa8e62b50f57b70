"""Delete, restore and purge: a tombstone, its removal, and the end of the bytes."""

import shutil
import time
from collections.abc import Callable

import pytest

from protos.images.v1 import image_service_pb2 as wire
from protos.images.v1.types_pb2 import IMAGE_STATE_TOMBSTONED, IMAGE_STATE_VALID
from sidecar import errors
from tests.support.disks import assert_same_disk
from tests.support.places import MIB, TIMESTAMP, TOMBSTONE, Place, flat_files, write_flat_disk
from tests.support.world import World, make_ref


def test_a_deletion_adds_a_tombstone_and_changes_no_byte(world: World, place: Place) -> None:
    place.plant("a", companions={"a.ecv": b"{}"})
    before = place.snapshot()
    began = time.time_ns()
    world.client.delete(f"{place.name}/a")
    after = place.snapshot()
    tombstones = set(after) - set(before)
    assert tombstones == {str(place.file("a", TOMBSTONE).relative_to(place.root))}
    for tombstone in tombstones:
        _, size, modified, _ = after.pop(tombstone)
        assert size == 0
        assert began <= modified <= time.time_ns()
    assert after == before
    image = world.client.image(f"{place.name}/a")
    assert image.state == IMAGE_STATE_TOMBSTONED
    assert began <= image.tombstone_time.ToNanoseconds() <= time.time_ns()


def test_a_deleted_image_is_not_there_for_any_use(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a", companions={"a.ecv": b"{}"})
    world.client.delete(ref)
    before = place.snapshot()
    uses: dict[str, Callable[[], object]] = {
        "touch": lambda: world.client.touch(ref),
        "copy": lambda: world.client.copy(ref, f"{place.name}/b").wait(),
        "validate": lambda: world.client.validate(ref),
        "repair": lambda: world.client.validate(ref, repair=True),
        "update": lambda: world.client.update_metadata(ref, files={"x": b"x"}),
        "delete": lambda: world.client.delete(ref),
    }
    for name, use in uses.items():
        with pytest.raises(errors.ImageTombstoned, match="tombstoned"):
            use()
            pytest.fail(name)
    with world.client.create_staging(f"{place.name}/c") as staging:
        with pytest.raises(errors.ImageTombstoned):
            list(staging.clone_disk(ref))
        with pytest.raises(errors.ImageTombstoned):
            staging.clone_range(ref, "a-flat.vmdk", 0, "c", 0, 512)
    assert place.snapshot() == before


def test_a_deletion_that_is_asked_for_twice_says_so_and_keeps_the_time(world: World, place: Place) -> None:
    place.plant("a")
    world.client.delete(f"{place.name}/a")
    before = place.snapshot()
    with pytest.raises(errors.ImageTombstoned, match=r"deleted \(tombstoned\) already"):
        world.client.delete(f"{place.name}/a")
    assert place.snapshot() == before


def test_a_deletion_that_is_repeated_because_its_answer_was_lost_succeeds(world: World, place: Place) -> None:
    place.plant("a")
    request = wire.DeleteImageRequest(ref=make_ref(f"{place.name}/a"), request_id=f"once-{place.name}")
    world.images.DeleteImage(request)
    world.images.DeleteImage(request)
    world.client.restore(f"{place.name}/a")
    # A late repetition must not delete what was restored since.
    world.images.DeleteImage(request)
    assert world.client.image(f"{place.name}/a").state == IMAGE_STATE_VALID


def test_a_restored_image_is_the_one_that_was_deleted(world: World, place: Place) -> None:
    place.plant("a", companions={"a.ecv": b"{}"})
    before = place.snapshot()
    world.client.delete(f"{place.name}/a")
    image = world.client.restore(f"{place.name}/a")
    assert image.state == IMAGE_STATE_VALID
    assert not image.HasField("tombstone_time")
    assert place.snapshot() == before
    world.client.validate(f"{place.name}/a")


def test_what_is_not_deleted_is_neither_restored_nor_purged(world: World, place: Place) -> None:
    place.plant("a")
    place.plant("broken", timestamp=False)
    before = place.snapshot()
    for image_id in ("a", "broken"):
        with pytest.raises(errors.ImageNotTombstoned, match="nothing to restore"):
            world.client.restore(f"{place.name}/{image_id}")
        with pytest.raises(errors.ImageNotTombstoned, match="imagectl rm"):
            world.client.purge(f"{place.name}/{image_id}")
    assert place.snapshot() == before


@pytest.mark.parametrize("missing", [TIMESTAMP, "a.vmdk"])
def test_an_image_that_a_purge_began_to_take_apart_is_not_restored(world: World, place: Place, missing: str) -> None:
    place.plant("a")
    place.file("a", TOMBSTONE).touch()
    place.file("a", missing).unlink()
    before = place.snapshot()
    with pytest.raises(errors.ImageIncomplete, match="purge it"):
        world.client.restore(f"{place.name}/a")
    assert place.snapshot() == before
    world.client.purge(f"{place.name}/a")
    place.assert_holds({})


def test_a_purge_frees_the_image_and_says_how_much(world: World, place: Place) -> None:
    place.plant("a", size=8 * MIB, data=[(0, 1 * MIB)], companions={"a.ecv": b"{}"})
    place.plant("other")
    world.client.delete(f"{place.name}/a")
    allocated = world.client.image(f"{place.name}/a").allocated_bytes
    assert world.client.purge(f"{place.name}/a") == allocated >= 1 * MIB
    place.assert_holds({"other": flat_files("other")})
    with pytest.raises(errors.ImageNotFound):
        world.client.purge(f"{place.name}/a")
    with pytest.raises(errors.ImageNotFound):
        world.client.restore(f"{place.name}/a")


def test_a_purge_takes_what_else_is_in_the_directory_and_follows_no_link(world: World, place: Place) -> None:
    outside = place.root.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    place.plant("a")
    place.file("a", "link").symlink_to(outside)
    place.file("a", "directory").mkdir()
    (place.file("a", "directory") / "link").symlink_to(outside / "kept")
    place.file("a", "image_timestamp.txt.renamed").touch()
    place.file("a", "unused_image_marker.txt").touch()
    world.client.delete(f"{place.name}/a")
    world.client.purge(f"{place.name}/a")
    place.assert_holds({})
    assert (outside / "kept").read_bytes() == b"kept"
    shutil.rmtree(outside)


@pytest.mark.parametrize("state", ["valid", "tombstoned", "incomplete", "no disk"])
def test_a_forced_deletion_frees_an_image_of_any_state_at_once(world: World, place: Place, state: str) -> None:
    place.plant("a", timestamp=state != "incomplete")
    if state == "tombstoned":
        world.client.delete(f"{place.name}/a")
    if state == "no disk":
        place.file("a", "a-flat.vmdk").unlink()
        place.descriptor("a").unlink()
    world.client.delete(f"{place.name}/a", force=True)
    place.assert_holds({})
    assert world.listed() == {}


def test_an_incomplete_image_can_be_deleted_and_purged(world: World, place: Place) -> None:
    place.plant("a")
    place.descriptor("a").unlink()
    world.client.delete(f"{place.name}/a")
    assert world.client.image(f"{place.name}/a").state == IMAGE_STATE_TOMBSTONED
    world.client.purge(f"{place.name}/a")
    place.assert_holds({})


def test_a_deleted_name_is_taken_until_it_is_purged(world: World, place: Place) -> None:
    source = place.plant("source")
    place.plant("a", seed=7)
    world.client.delete(f"{place.name}/a")
    before = place.snapshot()
    with pytest.raises(errors.ImageAlreadyExists, match="imagectl purge"):
        world.client.copy(f"{place.name}/source", f"{place.name}/a").wait()
    with pytest.raises(errors.ImageAlreadyExists, match="imagectl purge"):
        world.client.create_staging(f"{place.name}/a")
    assert place.snapshot() == before
    world.client.purge(f"{place.name}/a")
    world.client.copy(f"{place.name}/source", f"{place.name}/a").wait()
    assert_same_disk(source, place.descriptor("a"))


def test_an_image_in_the_making_survives_the_purge_of_the_wreck_in_its_place(
    world: World, place: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place.plant("a", timestamp=False)
    directory = tmp_path_factory.mktemp("disk")
    write_flat_disk(directory, "disk", seed=3)
    with world.client.create_staging(f"{place.name}/a") as staging:
        staging.write_file("disk-flat.vmdk", [(0, (directory / "disk-flat.vmdk").read_bytes())])
        world.client.delete(f"{place.name}/a", force=True)
        assert len(place.staging_directories()) == 1
        staging.write_file("disk.vmdk", [(0, (directory / "disk.vmdk").read_bytes())])
        staging.commit()
    place.assert_holds({"a": flat_files("a")})
    assert_same_disk(directory / "disk.vmdk", place.descriptor("a"))
