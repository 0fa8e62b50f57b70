"""The history of a run: JSON lines, written as things happen, so that a run that is cut off can be judged too.

An operation is two lines, one when it begins and one when it is answered; without the second its outcome is unknown.
Everything else is an event: processes that start, are killed, stopped, or sampled.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

OK, ERROR, UNKNOWN = "ok", "error", "unknown"


@dataclass(slots=True)
class Operation:
    """One operation of one worker. Times are monotonic seconds; `end` is infinite when there was no answer.

    `target` and `source` are DATASTORE/IMAGE. `via`: the processes that it went through. `said`: what the answer told
    besides: content, time of touch, and the like.
    """

    id: int
    worker: str
    kind: str
    target: str
    via: tuple[str, ...]
    begin: float
    source: str = ""
    end: float = math.inf
    outcome: str = UNKNOWN
    reason: str = ""
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def is_mounts(self) -> bool:
        return self.kind.startswith("mount-")

    def line(self) -> str:
        """For a report."""
        what = f"{self.source} to {self.target}" if self.source else self.target
        end = f"{self.end:9.3f}" if self.end < math.inf else "     none"
        said = f" {json.dumps(self.said)}" if self.said else ""
        return (
            f"{self.begin:9.3f} {end}  #{self.id} {self.worker} {'+'.join(self.via)} {self.kind} {what}: "
            f"{self.outcome} {self.reason}{said}".rstrip()
        )


@dataclass(slots=True)
class Event:
    """What happened to a process, or was seen of one."""

    what: str
    process: str
    time: float
    details: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        details = f" {json.dumps(self.details)}" if self.details else ""
        return f"{self.time:9.3f}            {self.process} {self.what}{details}"


@dataclass
class History:
    operations: list[Operation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def last_time(self) -> float:
        times = [event.time for event in self.events] + [operation.begin for operation in self.operations]
        return max([*times, *(operation.end for operation in self.operations if operation.end < math.inf)], default=0.0)


class Recorder:
    """Writes the history; threads may share it. Times count from its making."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = path.open("w", buffering=1)
        self._clock = clock
        self._start = clock()
        self._lock = threading.Lock()  # guards the file and the number
        self._number = 0

    def now(self) -> float:
        return self._clock() - self._start

    def begin(self, worker: str, kind: str, target: str, via: Iterable[str], source: str = "") -> Operation:
        with self._lock:
            self._number += 1
            operation = Operation(self._number, worker, kind, target, tuple(via), self.now(), source)
            self._write(
                begin=operation.id,
                worker=worker,
                kind=kind,
                target=target,
                via=via,
                time=operation.begin,
                source=source,
            )
        return operation

    def end(self, operation: Operation, outcome: str, reason: str = "", said: Mapping[str, Any] | None = None) -> None:
        with self._lock:
            # The time after the answer, never before it.
            operation.end, operation.outcome, operation.reason = self.now(), outcome, reason
            operation.said |= said or {}
            self._write(end=operation.id, time=operation.end, outcome=outcome, reason=reason, said=operation.said)

    def event(self, what: str, process: str, **details: Any) -> None:
        with self._lock:
            self._write(event=what, process=process, time=self.now(), details=details)

    def _write(self, **fields: Any) -> None:
        if not self._file.closed:
            self._file.write(json.dumps(fields) + "\n")

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_history(path: Path) -> History:
    history = History()
    running: dict[int, Operation] = {}
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        if "event" in fields:
            history.events.append(Event(fields["event"], fields["process"], fields["time"], fields["details"]))
        elif "begin" in fields:
            operation = Operation(
                fields["begin"],
                fields["worker"],
                fields["kind"],
                fields["target"],
                tuple(fields["via"]),
                fields["time"],
                fields["source"],
            )
            history.operations.append(operation)
            running[operation.id] = operation
        else:
            operation = running[fields["end"]]
            operation.outcome, operation.reason, operation.said = fields["outcome"], fields["reason"], fields["said"]
            # Without an answer it may take effect at any time: what was sent may still be under way.
            operation.end = math.inf if operation.outcome == UNKNOWN else fields["time"]
    return history
