"""Delete, restore and purge: a tombstone, its removal, and the end of the bytes."""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from protos.images.v1 import image_service_pb2 as wire
from protos.images.v1.types_pb2 import IMAGE_STATE_TOMBSTONED, IMAGE_STATE_VALID
from sidecar import errors
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.deletion import purge_image, restore_image
from sidecar.images.layouts import LAYOUTS as IMAGE_LAYOUTS
from sidecar.images.store import ImageStore
from tests.support.disks import assert_same_disk
from tests.support.places import MIB, RENAMED, TIMESTAMP, TOMBSTONE, Place, flat_files, write_flat_disk
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
    with pytest.raises(
        errors.ImageTombstoned, match=rf"deleted \(tombstoned\) already; imagectl restore {place.name}/a "
    ):
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
        with pytest.raises(errors.ImageNotTombstoned, match=f"imagectl rm --force {place.name}/{image_id}"):
            world.client.purge(f"{place.name}/{image_id}")
    assert place.snapshot() == before


@pytest.mark.parametrize("timestamp", [True, False])
@pytest.mark.parametrize("missing", ["a.vmdk", "a-flat.vmdk", "a part of a-flat.vmdk"])
def test_an_image_that_a_purge_began_to_take_apart_is_not_restored(
    world: World, place: Place, missing: str, timestamp: bool
) -> None:
    place.plant("a", timestamp=timestamp)
    place.file("a", TOMBSTONE).touch()
    if missing.startswith("a part of "):
        os.truncate(place.file("a", "a-flat.vmdk"), 512)
    else:
        place.file("a", missing).unlink()
    before = place.snapshot()
    what = "descriptor" if missing == "a.vmdk" else "a-flat.vmdk"
    with pytest.raises(errors.ImageIncomplete, match=rf"{what}.*imagectl purge {place.name}/a"):
        world.client.restore(f"{place.name}/a")
    assert place.snapshot() == before
    world.client.purge(f"{place.name}/a")
    place.assert_holds({})


@pytest.mark.parametrize("renamed", [False, True], ids=["lost", "renamed"])
def test_an_image_that_lost_its_timestamp_and_was_deleted_is_not_lost_with_it(
    world: World, place: Place, renamed: bool
) -> None:
    """Restore told to purge it, and repair to restore it first."""
    ref = f"{place.name}/a"
    source = place.plant("source")
    place.plant("a", timestamp=False, companions={"a.ecv": b"{}"})
    if renamed:  # by a sweep that died
        place.file("a", RENAMED).touch()
        os.utime(place.file("a", RENAMED), ns=(1, 1_600_000_000_000_000_000))
    world.client.delete(ref)
    assert "timestamp" in world.client.image(ref).problems[0]
    began = time.time_ns()
    restored = world.client.restore(ref)
    assert restored.state == IMAGE_STATE_VALID
    assert not restored.problems
    now = world.client.image(ref)
    assert now.touch_time == restored.touch_time
    assert now.touch_time.seconds == 1_600_000_000 if renamed else now.touch_time.ToNanoseconds() >= began
    world.client.validate(ref)
    assert_same_disk(source, place.descriptor("a"))
    place.assert_holds({"a": flat_files("a", "a.ecv"), "source": flat_files("source")})
    world.client.copy(ref, f"{place.name}/b").wait()


def test_a_restore_that_meets_what_is_no_timestamp_says_so(world: World, place: Place) -> None:
    place.plant("a", timestamp=False)
    place.file("a", TIMESTAMP).mkdir()
    place.file("a", TOMBSTONE).touch()
    before = place.snapshot()
    with pytest.raises(errors.ImageIncomplete, match=f"{TIMESTAMP} is not a plain file"):
        world.client.restore(f"{place.name}/a")
    assert place.snapshot() == before


def test_of_a_purge_that_ends_halfway_nothing_is_restored(
    place: Place, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, and with the steps since the last fsync lost or kept in any order, as a power cut may have it."""
    names = {"a.vmdk", "a-flat.vmdk", "a.ecv", TIMESTAMP}
    datastore = stack.enter_context(contextlib.closing(PosixDatastore(place.name, str(place.root))))
    store = ImageStore(datastore, IMAGE_LAYOUTS[place.layout])
    steps: list[str] = []
    sync, remove = datastore.sync_directory, datastore.remove_tree

    def note_sync(path: str) -> None:
        steps.append("sync")
        sync(path)

    def note_removal(path: str) -> int:
        steps.append(path.rpartition("/")[2])
        return remove(path)

    place.plant("a", companions={"a.ecv": b"{}"})
    place.file("a", TOMBSTONE).touch()
    with monkeypatch.context() as patched:
        patched.setattr(datastore, "sync_directory", note_sync)
        patched.setattr(datastore, "remove_tree", note_removal)
        purge_image(store, "a")
    if place.layout != "vsan":
        return  # one rename
    kept: list[set[str]] = [set()]  # what may be gone by now
    durable: set[str] = set()
    pending: list[str] = []
    for step in steps:
        if step == "sync":
            durable, pending = durable | set(pending), []
        else:
            pending.append(step)
        for count in range(len(pending) + 1):
            kept += [durable | set(lost) for lost in itertools.combinations(pending, count)]
    for gone in kept:
        if not names & gone or TOMBSTONE in gone:
            continue
        place.plant("a", companions={"a.ecv": b"{}"})
        place.file("a", TOMBSTONE).touch()
        for name in gone & names:
            place.file("a", name).unlink()
        if gone == {TIMESTAMP}:  # nothing that is missed: it is whole
            restore_image(store, "a")
            place.assert_holds({"a": {*names}})
        else:
            with pytest.raises(errors.ImageIncomplete):
                restore_image(store, "a")
        shutil.rmtree(place.directory("a"))


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
