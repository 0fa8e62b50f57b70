"""Many clients at once, in processes of their own: started together, and what came of all of them."""

import contextlib
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.bench.clients import Orders, encode

# For the last copies to end, and for processes to start on a busy machine.
PATIENCE_SECONDS = 120.0


@dataclass(slots=True)
class Outcome:
    """Of all clients together: seconds of what was answered, and how often what was not for which reason, by kind."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, seconds: Mapping[str, Sequence[float]], reasons: Mapping[str, Mapping[str, int]]) -> None:
        for kind, values in seconds.items():
            self.seconds.setdefault(kind, []).extend(values)
        for kind, counted in reasons.items():
            self.errors.setdefault(kind, Counter()).update(counted)

    def require_no_error_but(self, *allowed: str) -> None:
        others = {(kind, reason): count for kind, reasons in self.errors.items() for reason, count in reasons.items()}
        others = {key: count for key, count in others.items() if key[1] not in allowed}
        if others:
            raise AssertionError(f"only {', '.join(allowed) or 'no errors'} may come, and not {others}")


class Crowd:
    """Clients that run, in one process for each of the `orders`."""

    def __init__(self, processes: Sequence[tuple[Orders, "subprocess.Popen[str]"]]) -> None:
        self._processes = processes

    def go(self) -> None:
        for _, process in self._processes:
            _stdin(process).write("go\n")
            _stdin(process).flush()

    def end(self) -> None:
        """Nothing more is begun; before the time that was ordered."""
        for _, process in self._processes:
            _stdin(process).close()

    def outcome(self) -> Outcome:
        """Waits until all clients have left."""
        outcome = Outcome()
        for orders, process in self._processes:
            # Standard input stays open: its end would end the clients.
            assert process.stdout
            answer = process.stdout.read()
            if process.wait(PATIENCE_SECONDS):
                raise AssertionError(f"clients that {orders.task} ended with {process.returncode}")
            for tally in json.loads(answer):
                outcome.add(tally["seconds"], tally["errors"])
        return outcome


@contextlib.contextmanager
def crowd(*orders: Orders) -> Iterator[Crowd]:
    """Clients that are connected, and wait for `go`. Those that still run after the block are killed."""
    with ExitStack() as stack:
        processes = [(each, stack.enter_context(_process(each))) for each in orders]
        for each, process in processes:
            assert process.stdout
            if process.stdout.readline() != "connected\n":
                raise AssertionError(f"clients that {each.task} do not start")
        yield Crowd(processes)


@contextlib.contextmanager
def _process(orders: Orders) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.clients", encode(orders)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        for stream in (process.stdin, process.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _stdin(process: "subprocess.Popen[str]") -> IO[str]:
    assert process.stdin
    return process.stdin


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that is not below `share` of them."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
