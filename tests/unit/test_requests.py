"""Idempotency by request id: never twice, never another one's answer, never without a limit."""

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from protos.images.v1 import image_service_pb2 as pb
from protos.images.v1 import types_pb2
from sidecar.errors import (
    DatastoreUnavailable,
    DeadlineExceeded,
    ImageNotFound,
    ImagesError,
    InternalError,
    InvalidRequest,
    LockTimeout,
    NoSpace,
    OperationCancelled,
)
from sidecar.services.requests import Requests, fingerprint

LIMIT = 10.0


class Work:
    """Counts how often it is done; may be held until it is let go, and may fail."""

    def __init__(self, *outcomes: object, held: bool = False) -> None:
        self.outcomes = list(outcomes)
        self.count = 0
        self.started = threading.Event()
        self.go = threading.Event()
        if not held:
            self.go.set()

    def __call__(self) -> object:
        self.count += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        self.started.set()
        assert self.go.wait(LIMIT)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fails(error: type[BaseException], call: Callable[[], object]) -> None:
    with pytest.raises(error):
        call()


def test_a_repeated_call_does_not_make_the_change_again() -> None:
    requests, work = Requests(), Work("first", "second")
    assert requests.run("id", b"f", work, 1) == "first"
    assert requests.run("id", b"f", work, 1) == "first"
    assert work.count == 1


def test_calls_without_an_id_are_not_taken_for_each_other() -> None:
    requests, work = Requests(), Work("first", "second")
    assert requests.run("", b"f", work, 1) == "first"
    assert requests.run("", b"f", work, 1) == "second"


def test_an_id_that_is_used_for_another_change_is_not_answered_with_the_first_ones_result() -> None:
    requests, work = Requests(), Work("first")
    requests.run("id", b"f", work, 1)
    with pytest.raises(InvalidRequest, match="request_id id was used for another change"):
        requests.run("id", b"g", work, 1)
    assert work.count == 1


def test_an_id_of_a_running_change_is_not_taken_for_another_one_either() -> None:
    requests, work = Requests(), Work("first", held=True)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(requests.run, "id", b"f", work, LIMIT)
        assert work.started.wait(LIMIT)
        fails(InvalidRequest, lambda: requests.run("id", b"g", work, LIMIT))
        work.go.set()
        assert first.result(LIMIT) == "first"


def test_a_change_that_failed_for_good_fails_alike_when_it_is_repeated() -> None:
    requests, work = Requests(), Work(ImageNotFound("no image one/a"))
    for _ in range(2):
        with pytest.raises(ImageNotFound, match="no image one/a"):
            requests.run("id", b"f", work, 1)
    assert work.count == 1


@pytest.mark.parametrize(
    "error",
    [
        DatastoreUnavailable("x"),
        LockTimeout("x"),
        NoSpace("x"),
        OperationCancelled("x"),
        DeadlineExceeded("x"),
        InternalError("x"),
        RuntimeError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_retry_after_a_passing_fault_is_not_answered_with_that_fault(error: Exception) -> None:
    requests, work = Requests(), Work(error, "done")
    fails(type(error), lambda: requests.run("id", b"f", work, 1))
    assert requests.run("id", b"f", work, 1) == "done"
    assert requests.run("id", b"f", work, 1) == "done"
    assert work.count == 2


def run_two(requests: Requests, work: Work) -> tuple[Future[object], Future[object]]:
    """Two calls of one id, the second waiting for the first when it is let go."""
    waiting = threading.Event()

    def second() -> object:
        waiting.set()
        return requests.run("id", b"f", work, LIMIT)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(requests.run, "id", b"f", work, LIMIT)
        assert work.started.wait(LIMIT)
        other = pool.submit(second)
        # It finds the first one running or, when it is late, done: neither may do the work again.
        assert waiting.wait(LIMIT)
        work.go.set()
    return first, other


def test_two_calls_at_a_time_make_one_change() -> None:
    requests, work = Requests(), Work("first", "second", held=True)
    first, other = run_two(requests, work)
    assert (first.result(), other.result(), work.count) == ("first", "first", 1)


def test_two_calls_at_a_time_fail_alike() -> None:
    requests, work = Requests(), Work(ImageNotFound("gone"), held=True)
    first, other = run_two(requests, work)
    assert isinstance(first.exception(), ImageNotFound)
    assert isinstance(other.exception(), ImageNotFound)
    assert first.exception() is not other.exception()
    assert work.count == 1


@pytest.mark.parametrize("error", [OperationCancelled("gone"), DeadlineExceeded("late"), GeneratorExit()])
def test_a_caller_that_gave_up_does_not_make_the_others_fail(error: BaseException) -> None:
    requests, work = Requests(), Work(error, "done", held=True)
    first, other = run_two(requests, work)
    assert first.exception() is error
    assert other.result() == "done"
    assert work.count == 2


def test_a_waiting_caller_waits_no_longer_than_its_deadline() -> None:
    requests, work = Requests(), Work("first", held=True)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(requests.run, "id", b"f", work, LIMIT)
        assert work.started.wait(LIMIT)
        with pytest.raises(DeadlineExceeded, match="request_id id still runs"):
            requests.run("id", b"f", work, 0.01)
        work.go.set()
        assert first.result(LIMIT) == "first"


@pytest.mark.parametrize("timeout", [None, float("inf"), -1.0])
def test_a_caller_without_a_deadline_is_no_defect(timeout: float | None) -> None:
    assert Requests().run("id", b"f", Work("done"), timeout) == "done"


def test_a_thousand_threads_worth_of_repeats_make_one_change() -> None:
    requests, work = Requests(), Work("first", "second")
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda _: requests.run("id", b"f", work, LIMIT), range(1000)))
    assert set(results) == {"first"}
    assert work.count == 1


def test_the_memory_does_not_grow_with_the_number_of_changes() -> None:
    requests = Requests(max_remembered=3)
    works = [Work(index, "again") for index in range(5)]
    for index, work in enumerate(works):
        requests.run(f"id{index}", b"f", work, 1)
    # The oldest are the ones that are forgotten.
    assert requests.run("id2", b"f", works[2], 1) == 2
    assert requests.run("id4", b"f", works[4], 1) == 4
    assert requests.run("id1", b"f", works[1], 1) == "again"


def test_a_result_is_forgotten_after_its_time() -> None:
    clock = Clock()
    requests, work = Requests(max_age_seconds=60, clock=clock), Work("first", "second")
    assert requests.run("id", b"f", work, 1) == "first"
    clock.now += 60
    assert requests.run("id", b"f", work, 1) == "first"
    clock.now += 1
    assert requests.run("id", b"f", work, 1) == "second"


def test_a_client_cannot_fill_the_memory_with_its_ids() -> None:
    fails(InvalidRequest, lambda: Requests().run("x" * 129, b"f", Work("done"), 1))
    assert Requests().run("x" * 128, b"f", Work("done"), 1) == "done"


def test_a_remembered_error_does_not_keep_alive_what_its_call_worked_with() -> None:
    class Large:
        pass

    gone: list[weakref.ref[Large]] = []

    def work() -> object:
        large = Large()
        gone.append(weakref.ref(large))
        raise ImageNotFound(f"{large is None}")

    requests = Requests()
    fails(ImagesError, lambda: requests.run("id", b"f", work, 1))
    gc.collect()
    assert gone[0]() is None


def test_the_fingerprint_tells_changes_apart_but_not_their_ids_nor_how_long_they_wait() -> None:
    def request(image_id: str, request_id: str) -> pb.TouchImageRequest:
        return pb.TouchImageRequest(ref=types_pb2.ImageRef(datastore="one", image_id=image_id), request_id=request_id)

    sample = request("a", "1")
    known = fingerprint("TouchImage", sample)
    assert known == fingerprint("TouchImage", request("a", "2"))
    assert known != fingerprint("TouchImage", request("b", "1"))
    patient = request("a", "1")
    patient.lock_timeout.FromSeconds(1)
    assert known == fingerprint("TouchImage", patient)
    assert known != fingerprint("RestoreImage", sample)
    assert sample.request_id == "1"


def test_the_order_in_a_map_does_not_make_another_change() -> None:
    names = [f"file{index}" for index in range(50)]
    forward = pb.UpdateMetadataRequest(files=dict.fromkeys(names, b"x"))
    backward = pb.UpdateMetadataRequest(files=dict.fromkeys(reversed(names), b"x"))
    assert fingerprint("UpdateMetadata", forward) == fingerprint("UpdateMetadata", backward)
