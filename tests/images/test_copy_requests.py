"""One request id is one copy; a copy that nobody wants any more leaves nothing."""

import contextlib
import threading
from collections.abc import Iterator

import pytest

from sidecar import errors
from sidecar.client_calls import new_request_id
from sidecar.images.operations import Operations
from sidecar.images.progress import Progress
from tests.support.disks import assert_same_disk
from tests.support.places import MIB, Place, flat_files
from tests.support.processes import wait_until
from tests.support.world import World


def outcome(world: World, request_id: str) -> bool:
    """Whether the sidecar has seen the end of a cancelled call."""
    lines = world.sidecar.log.read_text().splitlines()
    return any(f"request_id={request_id} " in line and "outcome=CANCELLED" in line for line in lines)


def test_a_request_that_is_sent_twice_at_once_is_one_copy(world: World, place: Place) -> None:
    source = place.plant("a")
    arguments = (f"{place.name}/a", f"{place.name}/b")
    with place.locked("b"):
        calls = [world.client.copy(*arguments, request_id=f"twice-{place.name}") for _ in range(3)]
        for call in calls:
            next(call)  # it is attended to
        wait_until(lambda: bool(place.complete_staging_directories()), "the copy only has to publish")
        assert len(place.staging_directories()) == 1
    images = [call.wait() for call in calls]
    assert images[0] == images[1] == images[2]
    assert_same_disk(source, place.descriptor("b"))
    place.assert_holds({"a": flat_files("a"), "b": flat_files("b")})


def test_a_request_that_is_sent_again_afterwards_finds_its_copy(world: World, place: Place) -> None:
    place.plant("a")
    request_id = f"again-{place.name}"
    first = world.client.copy(f"{place.name}/a", f"{place.name}/b", request_id=request_id).wait()
    before = place.snapshot()
    for _ in range(2):
        assert world.client.copy(f"{place.name}/a", f"{place.name}/b", request_id=request_id).wait() == first
    assert place.snapshot() == before
    with pytest.raises(errors.ImageAlreadyExists):
        world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()


def test_a_request_id_of_another_copy_is_refused(world: World, place: Place) -> None:
    place.plant("a")
    request_id = f"other-{place.name}"
    world.client.copy(f"{place.name}/a", f"{place.name}/b", request_id=request_id).wait()
    before = place.snapshot()
    for source, destination in (("a", "c"), ("b", "b"), ("b", "c")):
        with pytest.raises(errors.InvalidRequest, match=request_id):
            world.client.copy(f"{place.name}/{source}", f"{place.name}/{destination}", request_id=request_id).wait()
    assert place.snapshot() == before


def test_a_request_that_failed_can_be_repeated_once_the_cause_is_gone(world: World, place: Place) -> None:
    request_id = f"failed-{place.name}"
    with pytest.raises(errors.ImageNotFound):
        world.client.copy(f"{place.name}/a", f"{place.name}/b", request_id=request_id).wait()
    place.plant("a")
    world.client.copy(f"{place.name}/a", f"{place.name}/b", request_id=request_id).wait()
    place.assert_holds({"a": flat_files("a"), "b": flat_files("b")})


def test_a_cancelled_copy_leaves_no_image_and_no_staging_directory(world: World, place: Place) -> None:
    place.plant("a", companions={"a.ecv": b"{}"})
    request_id = f"cancelled-{place.name}"
    with place.locked("b"):
        copy = world.client.copy(f"{place.name}/a", f"{place.name}/b", request_id=request_id)
        wait_until(lambda: bool(place.complete_staging_directories()), "the copy only has to publish")
        copy.cancel()
        with pytest.raises(errors.OperationCancelled):
            list(copy)
        wait_until(lambda: outcome(world, request_id), "the sidecar knows that the call was cancelled")
    wait_until(lambda: place.holds({"a": flat_files("a", "a.ecv")}), "nothing of the copy is left")
    assert world.listed().keys() <= {f"{place.name}/a"}
    # The same request, as after a Ctrl-C that was regretted, is a new copy.
    world.client.copy(f"{place.name}/a", f"{place.name}/b", request_id=request_id).wait()
    place.assert_holds({"a": flat_files("a", "a.ecv"), "b": flat_files("b", "b.ecv")})


@pytest.mark.parametrize("destination", ["one", "two", "three"])
def test_a_copy_that_is_cancelled_at_any_moment_is_whole_or_nothing(world: World, destination: str) -> None:
    there = world.places[destination]
    source = world.places["one"].plant("a", size=32 * MIB, data=[(0, 32 * MIB)])
    request_id = new_request_id()
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08):
        # The same as the one before, which it waits for, whose call has ended earlier.
        copy = world.client.copy("one/a", f"{destination}/b", request_id=request_id)
        timer = threading.Timer(delay, copy.cancel)
        timer.start()
        try:
            copy.wait()
            cancelled = False
        except errors.OperationCancelled:
            cancelled = True
        timer.join()
        wait_until(lambda: not there.leftovers(), "nothing of the copy is left")
        if there.directory("b").exists():
            assert_same_disk(source, there.descriptor("b"))
            world.client.delete(f"{destination}/b", force=True)
            request_id = new_request_id()
        else:
            assert cancelled
    world.client.copy("one/a", f"{destination}/b", request_id=request_id).wait()


def test_a_copy_goes_on_while_one_of_its_callers_still_wants_it(world: World, place: Place) -> None:
    place.plant("a")
    request_id = f"shared-{place.name}"
    with place.locked("b"):
        calls = [world.client.copy(f"{place.name}/a", f"{place.name}/b", request_id=request_id) for _ in range(2)]
        for call in calls:
            next(call)
        calls[0].cancel()
        with pytest.raises(errors.OperationCancelled):
            list(calls[0])
        wait_until(lambda: outcome(world, request_id), "the sidecar knows that one call was cancelled")
    calls[1].wait()
    place.assert_holds({"a": flat_files("a"), "b": flat_files("b")})


@pytest.fixture
def operations() -> Iterator[Operations[int]]:
    with contextlib.closing(Operations[int](2, "test")) as operations:
        yield operations


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_request_whose_caller_had_gone_too_late_to_cancel_it_is_found_and_else_made_anew(
    operations: Operations[int], succeeds: bool
) -> None:
    end, made = threading.Event(), []

    def work(progress: Progress) -> int:
        made.append(1)
        end.wait(10)
        if not succeeds:
            progress.check()
        return len(made)

    first = operations.start("id", "copy", work)
    with first.attend():
        wait_until(lambda: bool(made), "it runs")
    second = operations.start("id", "copy", work)
    with second.attend():
        assert second is not first
        assert made == [1]  # never two at once
        end.set()
        assert second.wait(10)
        assert second.result() == (1 if succeeds else 2)
    third = operations.start("id", "copy", work)
    with third.attend():
        assert third is second


def test_a_request_that_succeeded_although_nobody_waited_any_more_is_not_made_again(
    operations: Operations[int],
) -> None:
    end, made = threading.Event(), []

    def work(progress: Progress) -> int:
        made.append(1)
        end.wait(10)
        return len(made)

    first = operations.start("id", "copy", work)
    with first.attend():
        pass
    end.set()
    assert first.wait(10)
    with (again := operations.start("id", "copy", work)).attend():
        assert again is first
