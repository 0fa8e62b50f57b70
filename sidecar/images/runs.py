"""A maintenance run: one scan or one sweep of a datastore, in a thread of its own, that can be watched and stopped."""

import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from sidecar.errors import ImagesError, InternalError, OperationCancelled, TaskAlreadyRunning

_log = logging.getLogger(__name__)


class RunState(enum.Enum):
    """IDLE to INIT to VM_SCAN to IMAGE_MARK to IDLE, or IDLE to INIT to IMAGE_SWEEP to IDLE; from each back to IDLE."""

    IDLE = "IDLE"
    INIT = "INIT"
    VM_SCAN = "VM_SCAN"
    IMAGE_MARK = "IMAGE_MARK"
    IMAGE_SWEEP = "IMAGE_SWEEP"


# A run begins in INIT, and `end` is allowed in every state.
_NEXT = {
    RunState.INIT: {RunState.VM_SCAN, RunState.IMAGE_SWEEP},
    RunState.VM_SCAN: {RunState.IMAGE_MARK},
    RunState.IMAGE_MARK: set[RunState](),
    RunState.IMAGE_SWEEP: set[RunState](),
}


class Outcome(enum.Enum):
    """How a run ended."""

    DONE = "DONE"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    TIMED_OUT = "TIMED_OUT"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How far a run is. Times are nanoseconds since the epoch, 0 where there is none yet.

    `done` of `total` items of the state in which it is, or was when it ended; `item` is the one that it is at.
    """

    run_id: str
    state: RunState = RunState.INIT
    reached: RunState = RunState.INIT
    outcome: Outcome | None = None
    error: ImagesError | None = None
    started_ns: int = 0
    ended_ns: int = 0
    item: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Clock:
    """Time, for whoever has to own it. `wait` waits for an event, up to so many seconds: whether it is set."""

    now_ns: Callable[[], int] = time.time_ns
    monotonic: Callable[[], float] = time.monotonic
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait


class Ended(Exception):  # noqa: N818 - not a fault
    """A run has to end now, in the way that is said: passes through everything up to the thread."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


class Run:
    """What the work of a run says and asks while it goes on. Looked at, and stopped, from any thread."""

    def __init__(self, run_id: str, timeout: float, clock: Clock) -> None:
        self._clock = clock
        self._deadline = clock.monotonic() + timeout
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards the status
        self._status = RunStatus(run_id, started_ns=clock.now_ns())

    @property
    def status(self) -> RunStatus:
        with self._lock:
            return self._status

    @property
    def started_ns(self) -> int:
        return self._status.started_ns

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        """Raises Ended when the run was stopped, or has taken too long."""
        if self._stop.is_set():
            raise Ended(Outcome.STOPPED)
        if self._clock.monotonic() >= self._deadline:
            raise Ended(Outcome.TIMED_OUT)

    def enter(self, state: RunState, total: int = 0) -> None:
        """Goes on to the next state, with that many items."""
        assert state in _NEXT[self._status.state]
        self._change(state=state, reached=state, item="", done=0, total=total)

    def expect(self, total: int) -> None:
        """There are more items in this state than were known."""
        self._change(total=total)

    def begin(self, item: str) -> None:
        """Goes on to an item, unless the run has to end."""
        self.check()
        self._change(item=item)

    def finish_item(self) -> None:
        self._change(done=self._status.done + 1)

    def wait_until(self, monotonic: float) -> None:
        """Waits for a time of the clock; Ended when the run has to end before it."""
        while (left := min(monotonic, self._deadline) - self._clock.monotonic()) > 0:
            if self._clock.wait(self._stop, left):
                break
        self.check()

    def end(self, outcome: Outcome, error: ImagesError | None = None) -> None:
        self._change(state=RunState.IDLE, outcome=outcome, error=error, ended_ns=self._clock.now_ns(), item="")

    def pace(self, per_minute: float) -> "Pace":
        return Pace(self, self._clock, per_minute)

    def _change(self, **changes: object) -> None:
        with self._lock:
            self._status = replace(self._status, **changes)  # type: ignore[arg-type]


class Pace:
    """At most so many a minute, one after the other: the storage has others to serve."""

    def __init__(self, run: Run, clock: Clock, per_minute: float) -> None:
        self._run = run
        self._clock = clock
        self._gap = 60.0 / per_minute
        self._next = clock.monotonic()

    def wait(self) -> None:
        """Waits until it is time for one more; Ended when the run has to end before that."""
        self._run.wait_until(self._next)

    def count(self) -> None:
        """There was one."""
        self._next = self._clock.monotonic() + self._gap


Tally = TypeVar("Tally")


class Runs(Generic[Tally]):
    """The runs of one kind on one datastore: one at a time, the last one remembered. Owns the thread."""

    def __init__(self, kind: str, datastore: str, clock: Clock) -> None:
        self._kind = kind
        self._datastore = datastore
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._current: tuple[Run, Tally] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, run_id: str, timeout: float, tally: Tally, work: Callable[[Run], None]) -> None:
        """Starts a run, whose `work` counts in `tally`; TaskAlreadyRunning while there is one."""
        with self._lock:
            if self._closed:
                raise OperationCancelled(f"no {self._kind} is started: the sidecar is shutting down")
            if self._current and (status := self._current[0].status).state is not RunState.IDLE:
                raise TaskAlreadyRunning(
                    f"a {self._kind} of {self._datastore} is running, in {status.state.value} at {status.done} of "
                    f"{status.total}; wait for its end, or stop it: imagectl {self._kind} {self._datastore} --stop"
                )
            if self._thread:
                self._thread.join()
            run = Run(run_id, timeout, self._clock)
            thread = threading.Thread(
                target=self._work, args=(run, tally, work), name=f"{self._kind}-{self._datastore}"
            )
            thread.start()  # RuntimeError when there can be no more threads: then there is no run
            self._thread, self._current = thread, (run, tally)

    def current(self) -> tuple[RunStatus, Tally] | None:
        """The run that is going on, else the last one; None when there was none since the start of the sidecar."""
        with self._lock:
            return (self._current[0].status, self._current[1]) if self._current else None

    def stop(self, run_id: str = "") -> None:
        """Asks the run to end, which it does within one item; with an id, only if it is that one."""
        with self._lock:
            if self._current and run_id in ("", self._current[0].status.run_id):
                self._current[0].stop()

    def refuse(self) -> None:
        """Stops the run, and lets no other start; returns at once."""
        with self._lock:
            self._closed = True
            if self._current:
                self._current[0].stop()

    def close(self) -> None:
        """As `refuse`, and waits for the end of the run."""
        self.refuse()
        if self._thread:
            self._thread.join()

    def _work(self, run: Run, tally: Tally, work: Callable[[Run], None]) -> None:
        error: ImagesError | None = None
        try:
            work(run)
            outcome = Outcome.DONE
        except Ended as ended:
            outcome = ended.outcome
        except ImagesError as fault:
            outcome, error = Outcome.FAILED, fault
        except Exception:
            _log.exception("%s failed datastore=%s", self._kind, self._datastore)
            outcome, error = (
                Outcome.FAILED,
                InternalError(f"the {self._kind} failed: the sidecar's log has the details"),
            )
        run.end(outcome, error)
        _log.log(
            logging.WARNING if error else logging.INFO,
            "%s ended datastore=%s run=%s outcome=%s %s%s",
            self._kind,
            self._datastore,
            run.status.run_id,
            outcome.value,
            tally,
            f" error={error}" if error else "",
        )
