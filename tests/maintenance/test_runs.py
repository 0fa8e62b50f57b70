"""A run: one at a time, at its pace, within its time, stopped within one item, and its end is told."""

import threading
from collections.abc import Callable

import pytest

from sidecar.errors import DatastoreUnavailable, OperationCancelled, TaskAlreadyRunning
from sidecar.images.runs import Clock, Ended, Outcome, Run, Runs, RunState, RunStatus
from tests.maintenance.conftest import NOW, OwnClock, wait_ended


def ended(clock: OwnClock, work: Callable[[Run], None], timeout: float = 1000) -> RunStatus:
    runs: Runs[object] = Runs("scan", "one", clock.as_clock())
    runs.start("a", timeout, object(), work)
    status = wait_ended(runs)
    assert status.state is RunState.IDLE
    runs.close()
    return status


def test_a_run_without_a_thread_is_none_and_keeps_no_other(clock: OwnClock, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: Runs[object] = Runs("scan", "one", clock.as_clock())

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(threading.Thread, "start", refuse)
        runs.start("a", 1000, object(), lambda run: None)
    assert runs.current() is None
    runs.start("b", 1000, object(), lambda run: None)
    assert wait_ended(runs).run_id == "b"
    runs.close()


def test_a_run_tells_how_it_ended(clock: OwnClock) -> None:
    def fail(run: Run) -> None:
        raise DatastoreUnavailable("it is away")

    def defect(run: Run) -> None:
        raise ZeroDivisionError

    def stopped(run: Run) -> None:
        run.stop()
        run.begin("x")

    def late(run: Run) -> None:
        clock.seconds += 1000
        run.begin("x")

    assert ended(clock, lambda run: None).outcome is Outcome.DONE
    failed = ended(clock, fail)
    assert (failed.outcome, str(failed.error)) == (Outcome.FAILED, "it is away")
    broken = ended(clock, defect)
    assert (broken.outcome, broken.error.reason if broken.error else "") == (Outcome.FAILED, "INTERNAL")
    assert ended(clock, stopped).outcome is Outcome.STOPPED
    assert ended(clock, late).outcome is Outcome.TIMED_OUT


def test_states_follow_each_other_as_they_must(clock: OwnClock) -> None:
    seen = []

    def work(run: Run) -> None:
        seen.append(run.status.state)
        for state in (RunState.VM_SCAN, RunState.IMAGE_MARK):
            run.enter(state, 3)
            seen.append(run.status.state)
            assert (run.status.done, run.status.total) == (0, 3)

    status = ended(clock, work)
    assert seen == [RunState.INIT, RunState.VM_SCAN, RunState.IMAGE_MARK]
    assert (status.reached, status.started_ns) == (RunState.IMAGE_MARK, NOW * 10**9)
    # A sweep that has begun never comes to mark images, nor a scan to delete them.
    for path, wrong in (([RunState.IMAGE_SWEEP], RunState.IMAGE_MARK), ([RunState.VM_SCAN], RunState.IMAGE_SWEEP)):
        run = Run("b", 10, clock.as_clock())
        for state in path:
            run.enter(state)
        with pytest.raises(AssertionError):
            run.enter(wrong)


def test_a_second_start_is_refused_while_one_runs_and_told_how_far_that_is() -> None:
    runs: Runs[str] = Runs("sweep", "one", Clock())
    release, reached = threading.Event(), threading.Event()

    def work(run: Run) -> None:
        run.enter(RunState.IMAGE_SWEEP, 7)
        reached.set()
        release.wait(10)

    runs.start("a", 100, "first", work)
    assert reached.wait(10)
    with pytest.raises(TaskAlreadyRunning, match="IMAGE_SWEEP at 0 of 7"):
        runs.start("b", 100, "second", work)
    release.set()
    wait_ended(runs)  # type: ignore[arg-type]
    runs.start("c", 100, "third", work)
    current = runs.current()
    assert current
    assert (current[0].run_id, current[1]) == ("c", "third")
    runs.close()


def test_a_stop_ends_a_long_wait_at_once_and_only_the_run_that_is_meant() -> None:
    runs: Runs[object] = Runs("scan", "one", Clock())
    waiting = threading.Event()

    def work(run: Run) -> None:
        pace = run.pace(0.001)  # a turn every 17 hours
        pace.count()
        waiting.set()
        pace.wait()

    runs.start("a", 1e6, object(), work)
    assert waiting.wait(10)
    runs.stop("another")
    current = runs.current()
    assert current
    assert current[0].state is not RunState.IDLE
    runs.stop("a")
    assert wait_ended(runs).outcome is Outcome.STOPPED


def test_a_shutdown_ends_a_run_and_lets_no_other_start() -> None:
    runs: Runs[object] = Runs("scan", "one", Clock())

    def work(run: Run) -> None:
        pace = run.pace(0.001)
        pace.count()
        pace.wait()

    runs.start("a", 1e6, object(), work)
    runs.close()
    current = runs.current()
    assert current
    assert current[0].outcome is Outcome.STOPPED
    with pytest.raises(OperationCancelled):
        runs.start("b", 1e6, object(), work)


def test_a_pace_is_kept_and_a_timeout_ends_a_wait(clock: OwnClock) -> None:
    run = Run("a", 100, clock.as_clock())
    pace = run.pace(10)
    times = []
    with pytest.raises(Ended) as end:
        for _ in range(100):
            pace.wait()
            pace.count()
            times.append(clock.seconds - NOW)
            clock.seconds += 1  # what an item takes is part of its turn
    assert end.value.outcome is Outcome.TIMED_OUT
    assert times == [6.0 * turn for turn in range(17)]
    assert clock.seconds - NOW == 100
