"""CopyImage: the destination is there complete or not at all, whatever is at it and whatever the source is."""

import itertools
import json
import os
import subprocess
import threading
import time

import pytest

from protos.images.v1.types_pb2 import IMAGE_STATE_VALID, ImageRef
from sidecar import errors
from sidecar.client import CopyCall, CopyImageResponse
from tests.support.disks import allocated, assert_same_disk, tree_digest
from tests.support.places import KIB, LAYOUTS, MIB, RENAMED, TIMESTAMP, Place, flat_files
from tests.support.processes import run, wait_until
from tests.support.world import World

PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))
SLACK = 64 * KIB  # a block here and there, where ranges are not aligned


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_a_copy_is_an_image_of_its_own_name(world: World, source: str, destination: str) -> None:
    here, there = world.places[source], world.places[destination]
    companions = {"a.ecv": b'{"os": "x"}', "a.manifest": b"{}", "a.nvram": b"n", "readme.txt": b"r", "ab.txt": b"ab"}
    original = here.plant("a", companions=companions)
    before = here.snapshot()
    began = time.time_ns()
    image = world.client.copy(f"{source}/a", f"{destination}/b").wait()
    assert image.state == IMAGE_STATE_VALID
    assert image.ref == ImageRef(datastore=destination, image_id="b")
    copied = {"b": flat_files("b", "b.ecv", "b.manifest", "b.nvram", "readme.txt", "ab.txt")}
    if here is there:
        here.assert_holds({"a": flat_files("a", *companions), **copied})
    else:
        there.assert_holds(copied)
        assert here.snapshot() == before
    for name, content in companions.items():
        assert there.file("b", name.replace("a.", "b.", 1) if name[:2] == "a." else name).read_bytes() == content
    # The descriptor but for the extents' names, and those are the copy's.
    assert there.descriptor("b").read_text() == original.read_text().replace("a-flat.vmdk", "b-flat.vmdk")
    assert_same_disk(original, there.descriptor("b"))
    run("qemu-img", "info", there.descriptor("b"))
    # Used now, however long ago the source was.
    assert began <= there.file("b", TIMESTAMP).stat().st_mtime_ns <= time.time_ns()
    assert there.file("b", TIMESTAMP).read_bytes() == b""
    world.client.validate(f"{destination}/b")


def test_a_copy_has_a_last_use_of_its_own(world: World, place: Place) -> None:
    # The harm: with the source's old time, a sweep would take the copy for long unused.
    place.plant("a")
    os.utime(place.file("a", TIMESTAMP), ns=(1, 1_000_000_000_000_000_000))
    place.file("a", "unused_image_marker.txt").write_text("1450000000")
    place.file("a", RENAMED).touch()
    image = world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    assert image.touch_time.seconds > 1_700_000_000
    assert not image.HasField("marked_unused_time")
    assert {path.name for path in place.directory("b").iterdir()} == flat_files("b")


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_holes_stay_holes(world: World, source: str, destination: str) -> None:
    data = [(0, 128 * KIB), (64 * MIB, 64 * KIB), (300 * MIB + 4096, 4096), (511 * MIB, 1 * MIB)]
    original = world.places[source].plant("a", size=512 * MIB, data=data)
    image = world.client.copy(f"{source}/a", f"{destination}/b").wait()
    copy = world.places[destination].directory("b")
    assert allocated(copy) <= allocated(world.places[source].directory("a")) + SLACK
    assert image.allocated_bytes <= 2 * MIB
    assert image.size_bytes > 512 * MIB
    assert_same_disk(original, copy / "b.vmdk")


def test_a_disk_of_holes_only_is_copied(world: World, place: Place) -> None:
    original = place.plant("a", size=64 * MIB, data=[])
    image = world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    assert image.allocated_bytes <= SLACK
    assert_same_disk(original, place.descriptor("b"))


def test_no_byte_of_a_disk_is_changed_at_any_alignment(world: World, place: Place) -> None:
    data = [(1, 1), (4095, 2), (8192, 4096), (100_001, 77_777), (1 * MIB - 1, 3), (2 * MIB - 1, 1)]
    place.plant("a", data=data)
    world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    assert place.file("b", "b-flat.vmdk").read_bytes() == place.file("a", "a-flat.vmdk").read_bytes()


def test_progress_is_told_a_few_times_a_second_and_adds_up(world: World, place: Place) -> None:
    place.plant("a", size=8 * MIB, data=[(0, 1 * MIB)])
    answers: list[CopyImageResponse] = []
    with place.locked("b"):  # holds it at its last step
        copy = world.client.copy(f"{place.name}/a", f"{place.name}/b")
        began = time.monotonic()
        while len(answers) < 5:
            answers.append(next(copy))
        assert time.monotonic() - began < 3
    answers += list(copy)
    size = sum(place.file("a", name).stat().st_size for name in ("a.vmdk", "a-flat.vmdk"))
    assert answers[-1].done_bytes == answers[-1].total_bytes == size
    assert [answer.HasField("image") for answer in answers[:-1]] == [False] * (len(answers) - 1)
    assert answers[-1].image.state == IMAGE_STATE_VALID
    done = [answer.done_bytes for answer in answers]
    assert done == sorted(done)
    assert all(0 <= answer.cloned_bytes <= answer.done_bytes <= size for answer in answers)


@pytest.mark.parametrize("state", ["tombstoned", "no timestamp", "no descriptor", "no extent", "short extent"])
def test_only_a_whole_image_is_copied(world: World, place: Place, state: str) -> None:
    place.plant("a")
    match state:
        case "tombstoned":
            place.file("a", "image_tombstone.txt").touch()
        case "no timestamp":
            place.file("a", TIMESTAMP).unlink()
        case "no descriptor":
            place.descriptor("a").unlink()
        case "no extent":
            place.file("a", "a-flat.vmdk").unlink()
        case _:
            os.truncate(place.file("a", "a-flat.vmdk"), 1 * MIB)
    before = world.snapshot()
    error = errors.ImageTombstoned if state == "tombstoned" else errors.ImageIncomplete
    for destination in LAYOUTS:
        with pytest.raises(error, match=f"{place.name}/a"):
            world.client.copy(f"{place.name}/a", f"{destination}/b").wait()
    assert world.snapshot() == before


@pytest.mark.parametrize("tombstoned", [False, True])
def test_an_image_that_is_there_is_never_written_over(world: World, place: Place, tombstoned: bool) -> None:
    place.plant("a", seed=1)
    place.plant("b", seed=2)
    if tombstoned:
        world.client.delete(f"{place.name}/b")
    before = place.snapshot()
    with pytest.raises(errors.ImageAlreadyExists, match=f"{place.name}/b"):
        world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    assert place.snapshot() == before


def test_an_image_is_not_copied_onto_itself(world: World, place: Place) -> None:
    place.plant("a")
    before = place.snapshot()
    with pytest.raises(errors.ImageAlreadyExists):
        world.client.copy(f"{place.name}/a", f"{place.name}/a").wait()
    assert place.snapshot() == before


@pytest.mark.parametrize("wreck", ["no descriptor", "no timestamp and no extent", "only a timestamp", "empty"])
def test_a_wreck_at_the_destination_makes_way(world: World, place: Place, wreck: str) -> None:
    original = place.plant("a")
    match wreck:
        case "no descriptor":
            place.plant("b", seed=9, companions={"b.ecv": b"{}"})
            place.descriptor("b").unlink()
        case "no timestamp and no extent":
            place.plant("b", seed=9, timestamp=False)
            place.file("b", "b-flat.vmdk").unlink()
        case "only a timestamp":
            place.directory("b").mkdir(parents=True)
            place.file("b", TIMESTAMP).touch()
        case _:
            place.directory("b").mkdir(parents=True)
    world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    place.assert_holds({"a": flat_files("a"), "b": flat_files("b")})
    assert_same_disk(original, place.descriptor("b"))


@pytest.mark.parametrize("renamed", [False, True])
def test_a_whole_image_that_lost_its_timestamp_is_repaired_and_not_thrown_away(
    world: World, place: Place, renamed: bool
) -> None:
    place.plant("a", seed=1)
    place.plant("b", seed=2)
    os.utime(place.file("b", TIMESTAMP), ns=(1, 1_600_000_000_000_000_000))
    before = tree_digest(place.directory("b"))
    if renamed:
        place.file("b", TIMESTAMP).rename(place.file("b", RENAMED))
    else:
        place.file("b", TIMESTAMP).unlink()
    with pytest.raises(errors.ImageAlreadyExists):
        world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    assert tree_digest(place.directory("b")) == before
    assert (place.file("b", TIMESTAMP).stat().st_mtime_ns == 1_600_000_000_000_000_000) is renamed
    assert world.client.validate(f"{place.name}/b").image.state == IMAGE_STATE_VALID
    assert world.listed()[f"{place.name}/b"].state == IMAGE_STATE_VALID


def test_a_stray_file_in_the_destinations_place_is_no_reason_to_lose_either(world: World) -> None:
    for name in ("one", "two"):
        place = world.places[name]
        place.plant("a")
        place.directory("b").parent.mkdir(exist_ok=True)
        place.directory("b").write_bytes(b"not a directory")
        with pytest.raises(errors.ImagesError):
            world.client.copy(f"{name}/a", f"{name}/b").wait()
        assert place.directory("b").read_bytes() == b"not a directory"
        place.directory("b").unlink()
        place.assert_holds({"a": flat_files("a")})


def finish(calls: list[CopyCall]) -> list[str]:
    """How each of them ended, waited for at the same time."""
    outcomes: list[str] = ["" for _ in calls]

    def wait(number: int) -> None:
        try:
            outcomes[number] = calls[number].wait().ref.image_id
        except errors.ImagesError as error:
            outcomes[number] = error.reason

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_of_two_copies_to_one_place_one_wins_and_the_other_is_told_so(world: World, place: Place) -> None:
    # The harm in the origin: whoever lost took the winner's image with it, or got an error that said nothing.
    sources = [place.plant("a", seed=1), place.plant("c", seed=2)]
    with place.locked("b"):
        calls = [world.client.copy(f"{place.name}/{name}", f"{place.name}/b") for name in ("a", "c")]
        wait_until(lambda: len(place.complete_staging_directories()) == 2, "both only have to publish")
    outcomes = finish(calls)
    assert sorted(outcomes) == ["IMAGE_ALREADY_EXISTS", "b"]
    assert_same_disk(sources[outcomes.index("b")], place.descriptor("b"))
    place.assert_holds({"a": flat_files("a"), "b": flat_files("b"), "c": flat_files("c")})


def test_a_program_that_takes_no_lock_is_not_overwritten(world: World, place: Place) -> None:
    place.plant("a", seed=1)
    with place.locked("b"):
        copy = world.client.copy(f"{place.name}/a", f"{place.name}/b")
        wait_until(lambda: bool(place.complete_staging_directories()), "the copy only has to publish")
        if place.layout == "vsan":
            place.plant("elsewhere", seed=2)
            for path in place.directory("elsewhere").iterdir():
                path.rename(place.file("b", path.name.replace("elsewhere", "b")))
            place.directory("elsewhere").rmdir()
            place.descriptor("b").write_text(place.descriptor("b").read_text().replace("elsewhere", "b"))
        else:
            place.plant("b", seed=2)
        before = tree_digest(place.directory("b"))
    assert finish([copy]) == ["IMAGE_ALREADY_EXISTS"]
    assert {name: value for name, value in before.items() if "lock" not in name and "tmp_image" not in name} == (
        tree_digest(place.directory("b"))
    )


def test_a_copys_staging_directory_is_locked_for_as_long_as_it_lives(world: World, place: Place) -> None:
    # The harm in the origin: the lock was documented and never taken, and the reaper ate a copy that took long.
    place.plant("a")
    with place.locked("b"):
        copy = world.client.copy(f"{place.name}/a", f"{place.name}/b")
        wait_until(lambda: bool(place.complete_staging_directories()), "the copy only has to publish")
        [staging] = place.staging_directories()
        lock = staging / "lock.ec_lock" if place.layout == "vsan" else staging.with_name(f"{staging.name}.ec_lock")
        taken = subprocess.run(["flock", "--nonblock", str(lock), "true"], check=False)
        assert taken.returncode == 1
        holder = json.loads(lock.read_text())
        assert holder["pid"] == world.sidecar.pid
        assert holder["process"] == "image-sidecar"
        assert "copy" in holder["operation"]
    copy.wait()
    place.assert_holds({"a": flat_files("a"), "b": flat_files("b")})


@pytest.mark.parametrize(
    ("destination", "companions"),
    [
        ("b", {"a.txt": b"first", "b.txt": b"second"}),
        ("b", {"b-flat.vmdk": b"not the disk"}),
        ("b", {"b.vmdk": b"not the disk"}),
        ("image_timestamp", {"a.txt": b"would be the timestamp"}),
        ("image_tombstone", {"a.txt": b"would be a tombstone"}),
    ],
)
def test_no_file_is_lost_because_two_would_get_the_same_name(
    world: World, place: Place, destination: str, companions: dict[str, bytes]
) -> None:
    place.plant("a", companions=companions)
    before = place.snapshot()
    with pytest.raises(errors.InvalidRequest, match="another"):
        world.client.copy(f"{place.name}/a", f"{place.name}/{destination}").wait()
    assert place.snapshot() == before
    world.client.copy(f"{place.name}/a", f"{place.name}/c").wait()
    assert len(list(place.directory("c").iterdir())) == 3 + len(companions)
