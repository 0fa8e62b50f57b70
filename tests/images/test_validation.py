"""ValidateImage and TouchImage: what is whole, what can be repaired, and that nothing else is changed."""

import os
import time

import pytest

from protos.images.v1.types_pb2 import IMAGE_STATE_INCOMPLETE, IMAGE_STATE_VALID
from sidecar import errors
from tests.support.places import MIB, RENAMED, TIMESTAMP, TOMBSTONE, Place, flat_files
from tests.support.processes import run
from tests.support.world import World


def test_a_whole_image_is_valid_and_not_repaired(world: World, place: Place) -> None:
    place.plant("a", companions={"a.ecv": b"{}", "a.manifest": b'{"imageType": "MANAGEMENT"}', "notes": b"\xff"})
    before = place.snapshot()
    for repair in (False, True):
        answer = world.client.validate(f"{place.name}/a", repair=repair)
        assert answer.image.state == IMAGE_STATE_VALID
        assert not answer.repaired
    assert place.snapshot() == before


def test_a_lost_timestamp_makes_an_image_incomplete_until_it_is_repaired(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a", timestamp=False)
    before = place.snapshot()
    with pytest.raises(errors.ImageIncomplete, match="its timestamp file is not there; imagectl validate --repair"):
        world.client.validate(ref)
    assert place.snapshot() == before
    assert world.client.image(ref).problems == ["its timestamp file is not there"]
    began = time.time_ns()
    answer = world.client.validate(ref, repair=True)
    assert answer.repaired
    assert answer.image.state == IMAGE_STATE_VALID
    assert place.file("a", TIMESTAMP).read_bytes() == b""
    assert began <= place.file("a", TIMESTAMP).stat().st_mtime_ns <= time.time_ns()
    place.assert_holds({"a": flat_files("a")})
    assert not world.client.validate(ref, repair=True).repaired


def test_a_sweep_that_died_while_it_decided_does_not_lose_the_last_use(world: World, place: Place) -> None:
    place.plant("a")
    os.utime(place.file("a", TIMESTAMP), ns=(1, 1_600_000_000_000_000_000))
    place.file("a", TIMESTAMP).rename(place.file("a", RENAMED))
    assert world.client.image(f"{place.name}/a").state == IMAGE_STATE_INCOMPLETE
    answer = world.client.validate(f"{place.name}/a", repair=True)
    assert answer.repaired
    assert answer.image.touch_time.seconds == 1_600_000_000
    assert place.file("a", TIMESTAMP).stat().st_mtime_ns == 1_600_000_000_000_000_000
    place.assert_holds({"a": flat_files("a")})


@pytest.mark.parametrize("renamed", [False, True], ids=["lost", "renamed"])
@pytest.mark.parametrize("damage", ["missing", "short", "long", "no descriptor", "no text"])
def test_a_repair_never_makes_an_image_of_a_wreck(world: World, place: Place, damage: str, renamed: bool) -> None:
    place.plant("a", timestamp=False)
    extent = place.file("a", "a-flat.vmdk")
    if damage == "missing":
        extent.unlink()
    elif damage == "short":
        os.truncate(extent, 2 * MIB - 1)
    elif damage == "long":
        os.truncate(extent, 2 * MIB + 1)
    elif damage == "no descriptor":
        place.descriptor("a").unlink()
    else:
        place.descriptor("a").write_bytes(b"\0" * 600)
    if renamed:
        place.file("a", RENAMED).touch()
    before = place.snapshot()
    for repair in (False, True):
        with pytest.raises(errors.ImageIncomplete, match=f"imagectl rm --force {place.name}/a") as caught:
            world.client.validate(f"{place.name}/a", repair=repair)
        assert "--repair" not in caught.value.message, "it cannot help"
        assert place.directory("a").name in caught.value.message
        assert place.snapshot() == before
    world.client.delete(f"{place.name}/a", force=True)  # as the message says
    place.assert_holds({})


@pytest.mark.parametrize("damage", ["missing", "short", "link"])
def test_a_valid_looking_image_with_a_broken_disk_is_not_valid(world: World, place: Place, damage: str) -> None:
    place.plant("a")
    extent = place.file("a", "a-flat.vmdk")
    if damage == "short":
        os.truncate(extent, 0)
    else:
        extent.unlink()
    if damage == "link":
        extent.symlink_to("/etc/passwd")
    before = place.snapshot()
    with pytest.raises(errors.ImageIncomplete, match="a-flat"):
        world.client.validate(f"{place.name}/a")
    assert place.snapshot() == before


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized"])
def test_a_sparse_disk_that_was_cut_is_not_valid(world: World, place: Place, subformat: str) -> None:
    source = place.plant("flat", data=[(0, 2 * MIB)])
    place.directory("a").mkdir(parents=True)
    options = ("-o", f"subformat={subformat}")
    run("qemu-img", "convert", "-f", "vmdk", "-O", "vmdk", *options, source, place.descriptor("a"))
    place.file("a", TIMESTAMP).touch()
    assert world.client.validate(f"{place.name}/a").image.disk_type == subformat
    os.truncate(place.descriptor("a"), place.descriptor("a").stat().st_size // 2)
    with pytest.raises(errors.ImageIncomplete):
        world.client.validate(f"{place.name}/a")


def test_a_tombstoned_image_is_not_validated_and_not_repaired(world: World, place: Place) -> None:
    place.plant("a", timestamp=False)
    place.file("a", TOMBSTONE).touch()
    before = place.snapshot()
    for repair in (False, True):
        with pytest.raises(errors.ImageTombstoned, match="restore it first"):
            world.client.validate(f"{place.name}/a", repair=repair)
    assert place.snapshot() == before


def test_a_touch_sets_the_time_and_nothing_else(world: World, place: Place) -> None:
    place.plant("a")
    os.utime(place.file("a", TIMESTAMP), ns=(1, 1_600_000_000_000_000_000))
    before = place.snapshot()
    began = time.time_ns() // 1000
    touched = world.client.touch(f"{place.name}/a")
    now = place.file("a", TIMESTAMP).stat().st_mtime_ns
    assert began <= now // 1000 <= time.time_ns() // 1000
    assert round(touched.timestamp() * 1e6) == now // 1000
    assert world.client.image(f"{place.name}/a").touch_time.ToNanoseconds() == now
    os.utime(place.file("a", TIMESTAMP), ns=(1, 1_600_000_000_000_000_000))
    assert place.snapshot() == before


def test_a_tombstoned_image_cannot_be_touched(world: World, place: Place) -> None:
    place.plant("a")
    place.file("a", TOMBSTONE).touch()
    before = place.snapshot()
    with pytest.raises(errors.ImageTombstoned):
        world.client.touch(f"{place.name}/a")
    assert place.snapshot() == before


@pytest.mark.parametrize("missing", [TIMESTAMP, "a.vmdk", "a-flat.vmdk"])
def test_a_touch_does_not_make_an_incomplete_image_look_used(world: World, place: Place, missing: str) -> None:
    # The harm: a touch that creates the timestamp makes a wreck valid.
    place.plant("a")
    place.file("a", missing).unlink()
    before = place.snapshot()
    with pytest.raises(errors.ImageIncomplete):
        world.client.touch(f"{place.name}/a")
    assert place.snapshot() == before
