"""Many clients at once, that copy, touch and list: how long that takes, what is refused, and what the sidecar needs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.errors import TooManyCalls
from tests.bench.clients import Orders
from tests.bench.command import progress
from tests.bench.crowd import Outcome, crowd, percentile
from tests.bench.hall import SHARED, WRITTEN, Hall
from tests.bench.living import RESIDENT, memory
from tests.bench.sizes import LoadSizes
from tests.crash.support import open_descriptors, pooled_threads, threads

COLUMNS = ("operation", "answered", "a second", "p50 ms", "p99 ms", "max ms", "refused")
STATE_COLUMNS = ("the sidecar", "resident MiB", "descriptors", "threads, of them in pools")
# The one error that a client may get that does nothing wrong.
ALLOWED = TooManyCalls.reason
# What the sidecar may need more after a load than after one before it, when nothing of it is left. A thread for each
# client would be 64. The pools keep theirs, as many as they ever needed at once, which is by chance: they do not count.
MORE_MIB, MORE_DESCRIPTORS, MORE_THREADS = 64, 4, 4
# Each half of the warm-up takes this part of the time: the pools of a new process, and what it remembers, grow.
WARM_UP = 0.25
_SAMPLE_SECONDS = 0.2
# For connections that were closed to be gone.
_SETTLE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class State:
    """What a process holds."""

    mebibytes: float
    descriptors: int
    threads: int
    pooled: int  # of the threads


@dataclass(frozen=True, slots=True)
class Mixed:
    """A load, and the sidecar's states. `before`: after a warm-up, whose clients left. `after`: these left, too."""

    outcome: Outcome
    seconds: float
    new: State
    before: State
    during: Sequence[State]
    after: State

    @property
    def middle(self) -> State:
        return self.during[len(self.during) // 2]

    @property
    def end(self) -> State:
        return self.during[-1]

    @property
    def most(self) -> State:
        """Of each the most, at whatever time."""
        return State(
            max(state.mebibytes for state in self.during),
            max(state.descriptors for state in self.during),
            max(state.threads for state in self.during),
            max(state.pooled for state in self.during),
        )

    @property
    def growth(self) -> State:
        """From one load to the next: what is not given back, and would be there after each."""
        return State(
            max(self.end.mebibytes, self.after.mebibytes) - self.before.mebibytes,
            self.after.descriptors - self.before.descriptors,
            self.after.threads - self.before.threads,
            self.after.pooled - self.before.pooled,
        )

    def rows(self) -> list[list[str]]:
        """Of the operations."""
        rows = []
        for kind in sorted({*self.outcome.seconds, *self.outcome.errors}):
            milliseconds = [1000 * seconds for seconds in self.outcome.seconds.get(kind, ())]
            refused = ", ".join(f"{count} {reason}" for reason, count in self.outcome.errors.get(kind, {}).items())
            rows.append(
                [
                    kind,
                    str(len(milliseconds)),
                    f"{len(milliseconds) / self.seconds:.1f}",
                    *(f"{percentile(milliseconds, share):.1f}" if milliseconds else "" for share in (0.5, 0.99, 1.0)),
                    refused,
                ]
            )
        return rows

    def state_rows(self) -> list[list[str]]:
        def row(when: str, state: State) -> list[str]:
            return [when, f"{state.mebibytes:.0f}", str(state.descriptors), f"{state.threads}, {state.pooled}"]

        def verdict(value: float, most: int) -> str:
            return f"{value:+.0f}, ≤ +{most}: {'reached' if value <= most else 'missed'}"

        growth = self.growth
        return [
            row("new", self.new),
            row("before, warm, without clients", self.before),
            row("at the start", self.during[0]),
            row("in the middle", self.middle),
            row("at the end", self.end),
            row("the most", self.most),
            row("after, without clients", self.after),
            [
                "more than before",
                verdict(growth.mebibytes, MORE_MIB),
                verdict(growth.descriptors, MORE_DESCRIPTORS),
                verdict(growth.threads - growth.pooled, MORE_THREADS),
            ],
        ]


def mix(hall: Hall, sizes: LoadSizes) -> Mixed:
    """The load, after a shorter one; raises AssertionError for errors that no client may get.

    Before it, all clients copy: else it would be by chance how many copies, and so threads, there were at once by then.
    """
    pid = hall.sidecar.pid
    new = state(pid)
    for task in ("copy", "mix"):
        _run(hall, sizes, task, WARM_UP * sizes.seconds, [])
    before = state(pid)
    during: list[State] = []
    outcome = _run(hall, sizes, "mix", sizes.seconds, during)
    return Mixed(outcome, sizes.seconds, new, before, during, state(pid))


def _run(hall: Hall, sizes: LoadSizes, task: str, seconds: float, states: list[State]) -> Outcome:
    with crowd(*(_orders(hall, sizes, task, seconds, number) for number in range(sizes.processes))) as clients:
        clients.go()
        _watch(hall.sidecar.pid, seconds, states)
        outcome = clients.outcome()
    outcome.require_no_error_but(ALLOWED)
    hall.assert_tidy()
    time.sleep(_SETTLE_SECONDS)
    progress(f"load: {sizes.clients} clients that {task} for {seconds:g} s")
    return outcome


def _watch(pid: int, seconds: float, states: list[State]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(min(_SAMPLE_SECONDS, seconds / 4))
        states.append(state(pid))


def _orders(hall: Hall, sizes: LoadSizes, task: str, seconds: float, number: int) -> Orders:
    source = sizes.small.name
    return Orders(
        address=hall.sidecar.address,
        task=task,
        clients=sizes.clients // sizes.processes,
        number=number,
        seconds=seconds,
        touched=[ref for datastore in hall.places for ref in hall.planted(datastore)],
        copied={
            "copy, shared": (f"{SHARED}/{source}", SHARED),
            "copy, written": (f"{WRITTEN}/{source}", WRITTEN),
            "copy, between the two": (f"{SHARED}/{source}", WRITTEN),
        },
        listed=list(hall.places),
    )


def state(pid: int) -> State:
    return State(memory(pid, RESIDENT), open_descriptors(pid), threads(pid), pooled_threads(pid))
