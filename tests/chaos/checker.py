"""Decides, from the history of a run and what lies on its datastores afterwards, whether each promise held.

Imports nothing of what it judges: layouts, descriptors, tombstones, timestamps and locks are read by rules of its own.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.chaos.content import UPDATE_OF_IMPORT
from tests.chaos.effects import (
    IMPORTING,
    PUBLISHING,
    REMOVING,
    SILENT,
    SOURCE_SEEN,
    SWEEPING,
    UNEXPECTED,
    UPDATING,
    Candidates,
    mending,
    sees,
    steps_of,
)
from tests.chaos.history import ERROR, OK, Event, History, Operation
from tests.chaos.reading import ABSENT, DELETED, DELETED_WRECK, VALID, WRECK, Found, Reading
from tests.chaos.register import Step, contradiction, is_possible

LEFTOVERS = ("staging", "trash", "locks", "temporary")
DEATHS = ("kill", "term", "died")
# Pools and caches of a process fill in its first seconds, and are bounded: what grows beyond is a leak.
MOST_DESCRIPTORS_MORE, MOST_THREADS_MORE = 12, 40
# Refused for a file that another tool put into the directory that a mount staged.
FOREIGN_FILE = "as another file is"
GHOSTLY = ("mount-delete", "mount-purge")
GHOST_SECONDS = 65.0
CLOCK_SLACK = 0.1  # seconds: a file system's clock is that of the last tick


@dataclass(slots=True)
class Violation:
    """`evidence`: the lines of the history that show it."""

    promise: str
    what: str
    evidence: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([f"{self.promise}: {self.what}", *(f"    {line}" for line in self.evidence)])


@dataclass
class Verdict:
    """`undecided`: names whose history was too long for the search."""

    violations: list[Violation]
    undecided: list[str]
    published: int


class Checker:
    """`readings`: by datastore, after the last process ended. `afterwards`: after a start, a reap and
    an end more, in good order."""

    def __init__(
        self, history: History, readings: Mapping[str, Reading], afterwards: Mapping[str, Reading] | None = None
    ) -> None:
        self._history = history
        self._readings = readings
        self._afterwards = afterwards
        self._violations: list[Violation] = []
        self._undecided: list[str] = []
        self._by_id = {operation.id: operation for operation in history.operations}
        self._by_target: dict[str, list[Operation]] = {}
        for operation in history.operations:
            self._by_target.setdefault(operation.target, []).append(operation)
        self._by_source: dict[str, list[Operation]] = {}
        for operation in history.operations:
            if operation.source:
                self._by_source.setdefault(operation.source, []).append(operation)
        self._lives = _lives(history.events)
        self._candidates: dict[int, Candidates] = {}

    def check(self) -> Verdict:
        self._check_answers()
        self._check_processes()
        self._check_images()
        self._check_names()
        self._check_leftovers()
        self._check_afterwards()
        published = sum(operation.kind in PUBLISHING and operation.outcome == OK for operation in self._by_id.values())
        return Verdict(self._violations, self._undecided, published)

    def _found(self, promise: str, what: str, evidence: Iterable[Operation | Event] = ()) -> None:
        self._violations.append(Violation(promise, what, [item.line() for item in evidence]))

    # ---- What was answered

    def _check_answers(self) -> None:
        for operation in self._by_id.values():
            is_unexpected = operation.reason in UNEXPECTED and FOREIGN_FILE not in operation.said.get("message", "")
            if operation.outcome == ERROR and is_unexpected and not operation.is_mounts:
                self._found("answers", f"{operation.kind} was answered {operation.reason}", [operation])
            if operation.kind == "mount-read" and "content" in operation.said:
                self._check_read(operation)
            if operation.kind in SWEEPING and operation.outcome == OK and operation.said["deleted"]:
                self._check_sweep(operation)
            if operation.said.get("fault"):
                promise = "mount reads" if operation.is_mounts else "whole"
                self._found(promise, f"a reader was given other bytes: {operation.said['fault']}", [operation])

    def _check_read(self, read: Operation) -> None:
        """The mount may show what was there a moment ago, and nothing that never was."""
        publishes = [
            other
            for other in self._by_target.get(read.target, [])
            if other.kind in PUBLISHING and other.begin < read.end and not self._is_refused(other)
        ]
        if not any(read.said["content"] in self._candidates_of(other).contents for other in publishes):
            self._found("whole", f"{read.target} never had the content that was read", [*publishes, read])

    def _check_sweep(self, sweep: Operation) -> None:
        """What was used is deleted only when a scan has begun since, by more than the grace time."""
        datastore = sweep.target.partition("/")[0]
        scans = [
            scan
            for scan in self._history.operations
            if scan.target.partition("/")[0] == datastore and scan.begin < sweep.end and _may_have_scanned(scan)
        ]
        for use in self._by_target[sweep.target]:
            is_use = use.outcome == OK and (use.kind == "touch" or use.kind in PUBLISHING)
            if not is_use or use.end >= sweep.begin:
                continue
            if not any(scan.end > use.begin + sweep.said["grace"] for scan in scans):
                self._found("sweep", f"{sweep.target} was used in time, and swept", [use, *scans[-3:], sweep])

    def _check_processes(self) -> None:
        first: dict[tuple[str, int], Event] = {}
        mounts_left: list[Event] = []
        for event in self._history.events:
            match event.what:
                case "died" | "not-started":
                    self._found("processes", f"{event.process} {event.what.replace('-', ' ')}", [event])
                case "ended" if event.details.get("status") not in (0, None):
                    self._found("processes", f"{event.process} ended with {event.details['status']}", [event])
                case "hangs":
                    when = event.details["when"]
                    self._found(f"hangs {when}", f"{event.process} did not end", [event])
                case "listing" if event.details["differs"]:
                    self._found("restart", "a started sidecar lists other images than there are", [event])
                case "sample":
                    if event.details["open"]:
                        self._found("leaks", f"{event.process} has files open while nothing runs", [event])
                    before = first.setdefault((event.process, event.details["pid"]), event)
                    self._check_growth(before, event)
                case "mounts" if event.details["left"]:
                    mounts_left.append(event)
        for event in mounts_left:
            self._found("leaks", "mounts are left", [event])

    def _check_growth(self, before: Event, after: Event) -> None:
        for what, most in (("descriptors", MOST_DESCRIPTORS_MORE), ("threads", MOST_THREADS_MORE)):
            if after.details[what] > before.details[what] + most:
                self._found("leaks", f"the {what} of {after.process} grew", [before, after])

    # ---- What lies there

    def _check_images(self) -> None:
        for datastore, reading in self._readings.items():
            for image_id, found in reading.images.items():
                name = f"{datastore}/{image_id}"
                operations = self._by_target.get(name, [])
                if found.status == VALID and found.faults:
                    self._found("whole", f"{name} is valid, and {'; '.join(found.faults)}", operations)
                if found.foreign and not self._may_be_mixed(name):
                    self._found("companions", f"{name} has files that nobody put there: {found.foreign}", operations)
                if found.status in (VALID, DELETED):
                    self._check_notes(name, found)
                    self._check_touches(name, found)

    def _check_notes(self, name: str, found: Found) -> None:
        """A companion file goes along with every copy; it may lack only where a tool said that it had failed."""
        publishes = [
            operation
            for operation in self._by_target.get(name, [])
            if operation.kind in PUBLISHING and not self._is_refused(operation)
        ]
        if not found.has_notes and not any(self._candidates_of(operation).may_lack_files for operation in publishes):
            self._found("companions", f"{name} lacks its companion file", self._by_target.get(name, []))

    def _may_be_mixed(self, name: str) -> bool:
        """Two tools that copy to one new name in one mount: the second may write when the first has ended."""
        return any(
            self._candidates_of(operation).may_be_mixed
            for operation in self._by_target.get(name, [])
            if operation.kind in PUBLISHING and not self._is_refused(operation)
        )

    def _check_touches(self, name: str, found: Found) -> None:
        """The last use is not older than a touch that was acknowledged, of an image that was not published since."""
        operations = self._by_target.get(name, [])
        publishes = [
            operation for operation in operations if operation.kind in PUBLISHING and not self._is_refused(operation)
        ]
        since = max((self._latest_end(operation) for operation in publishes), default=0.0)
        for touch in operations:
            is_late = touch.kind == "touch" and touch.outcome == OK and touch.begin > since
            if is_late and found.used < touch.said["wall"] - CLOCK_SLACK:
                self._found("touches", f"{name} was touched later than its timestamp file says", operations)

    def _check_leftovers(self) -> None:
        """What only a process that was killed may leave, and what nobody may."""
        killed = any(event.what in ("kill", "died") for event in self._history.events)
        for datastore, reading in self._readings.items():
            if reading.held:
                self._found("leftovers", f"{datastore}: locks are held and no process is left: {reading.held}")
            if reading.strangers:
                self._found("leftovers", f"{datastore}: what is this? {reading.strangers}")
            for what in LEFTOVERS:
                if (left := getattr(reading, what)) and not killed:
                    self._found("leftovers", f"{datastore}: nobody was killed, and there is {what}: {left}")

    def _check_afterwards(self) -> None:
        """A start, a reap and an end change no image, and leave nothing else."""
        for datastore, after in (self._afterwards or {}).items():
            before = self._readings[datastore]
            for image_id in sorted(before.images.keys() | after.images.keys()):
                was_wreck = image_id in before.images and before.images[image_id].status == WRECK
                if before.images.get(image_id) != after.images.get(image_id) and not was_wreck:
                    self._found(
                        "restart",
                        f"{datastore}/{image_id} was {before.images.get(image_id)}, and after a start and an end is "
                        f"{after.images.get(image_id)}",
                    )
            for what in ("held", *LEFTOVERS):
                if left := getattr(after, what):
                    self._found("leftovers", f"{datastore}: after a start, a reap and an end there is {what}: {left}")

    # ---- What the answers and the datastore say together

    def _check_names(self) -> None:
        names = set(self._by_target)
        names |= {f"{datastore}/{image}" for datastore, reading in self._readings.items() for image in reading.images}
        for name in sorted(names):
            datastore, _, image_id = name.partition("/")
            reading = self._readings[datastore]
            steps = self._steps(name, reading.layout)
            last = self._last_step(reading.images.get(image_id))
            possible = is_possible([*steps, last])
            if possible is None:
                self._undecided.append(name)
            elif not possible:
                self._tell_contradiction(name, steps, last, reading.images.get(image_id))

    def _steps(self, name: str, layout: str) -> list[Step]:
        steps = []
        for operation in self._by_target.get(name, []):
            steps += steps_of(
                operation,
                layout,
                self._candidates_of,
                died=self._died_in(operation),
                doubted=self._may_name_a_ghost(operation),
            )
        # What a copy says of its source. The mount may have shown an older one.
        for operation in self._by_source.get(name, []):
            statuses = (VALID,) if operation.outcome == OK else SOURCE_SEEN.get(operation.reason)
            if operation.kind == "copy" and operation.outcome in (OK, ERROR) and statuses:
                steps.append(Step(operation.id, operation.begin, operation.end, sees(*statuses), only_looks=True))
        return steps + mending(steps)

    def _last_step(self, found: Found | None) -> Step:
        if found is None:
            return Step(0, math.inf, math.inf, sees(ABSENT))
        known = found.status in (VALID, DELETED) and found.content is not None and not found.faults
        contents = [found.content] if known and found.content is not None else None
        updates = [found.update] if known else None
        # A purge that was killed takes an image of the layout vsan apart; as a whole it can be found, too.
        statuses = (DELETED, DELETED_WRECK) if found.status == DELETED else (found.status,)
        return Step(0, math.inf, math.inf, sees(*statuses, contents=contents, updates=updates))

    def _tell_contradiction(self, name: str, steps: list[Step], last: Step, found: Found | None) -> None:
        if is_possible(steps) is False:
            what = f"no order of the operations on {name} explains what was answered"
            shown = contradiction(steps)
        else:
            there = "absent" if found is None else f"{found.status}, content {found.content}, update {found.update}"
            what = f"what was answered of {name} does not lead to what is there: {there}"
            shown = contradiction([*steps, last])
        unanswered = {step.operation for step in steps if step.optional}
        evidence = [self._by_id[number] for number in sorted(unanswered | set(shown)) if number]
        self._found("order", what, evidence)

    def _may_name_a_ghost(self, operation: Operation) -> bool:
        """Whether an rm may have succeeded on what was no image.

        A mount lets the rest of an rm succeed on what is gone already, for some time, and so another rm, too. And what
        it stages of a copy that failed is a directory, which hides an image that others publish under that name, until
        it is left alone for the settle time.
        """
        return operation.kind in GHOSTLY and any(
            other.via == operation.via
            and other.begin < operation.end
            and (
                (other.kind in GHOSTLY and operation.begin - GHOST_SECONDS < other.begin)
                or (other.kind in PUBLISHING and other.outcome not in (OK, ERROR))
            )
            for other in self._by_target[operation.target]
            if other.id != operation.id
        )

    def _died_in(self, operation: Operation) -> bool:
        return any(
            begin <= operation.end and operation.begin <= end
            for process in operation.via
            for begin, end in self._lives.get(process, [])
        )

    def _candidates_of(self, operation: Operation) -> Candidates:
        if operation.id not in self._candidates:
            self._candidates[operation.id] = self._find_candidates(operation, set())
        return self._candidates[operation.id]

    def _find_candidates(self, operation: Operation, visited: set[int]) -> Candidates:
        """What a publish may have published: its own content, or all that its source may have been at the time."""
        # A tool that fails goes on with the next file: what it leaves may be published without the one.
        may_lack_files = operation.is_mounts and operation.outcome != OK
        updates: set[int | None] = {None} if may_lack_files else set()
        may_be_mixed = operation.is_mounts and any(
            other.id != operation.id
            and other.is_mounts
            and other.kind in PUBLISHING
            and other.begin < operation.end
            and operation.begin < other.end
            for other in self._by_target[operation.target]
        )
        if operation.kind in IMPORTING:
            contents_of_import = frozenset([operation.id])
            return Candidates(contents_of_import, frozenset([UPDATE_OF_IMPORT, *updates]), may_lack_files, may_be_mixed)
        visited.add(operation.id)
        contents: set[int] = set()
        there = self._by_target.get(operation.source, [])
        # By what the mount knew, it may copy what is gone already.
        gone = [] if operation.is_mounts else [other for other in there if _surely_removed(other, operation.begin)]
        for other in there:
            if other.begin > operation.end:
                continue
            if other.kind in UPDATING:
                updates.add(other.id)
            if other.kind not in PUBLISHING or other.id in visited or self._is_refused(other):
                continue
            if any(self._latest_end(other) < removal.begin for removal in gone):
                continue
            more = self._find_candidates(other, visited)
            contents |= more.contents
            updates |= more.updates
            may_lack_files |= more.may_lack_files
            may_be_mixed |= more.may_be_mixed
        return Candidates(frozenset(contents), frozenset(updates), may_lack_files, may_be_mixed)

    def _is_refused(self, operation: Operation) -> bool:
        """Nothing was published by it, for certain. A mount goes on trying what it could not publish."""
        if operation.outcome != ERROR or self._died_in(operation):
            return False
        return operation.is_mounts or operation.reason in SILENT or operation.reason.startswith("IMAGE_")

    def _latest_end(self, operation: Operation) -> float:
        """When whatever it did was done."""
        is_known = operation.outcome in (OK, ERROR) and not self._died_in(operation)
        return operation.end if is_known and not operation.is_mounts else math.inf


def _lives(events: Iterable[Event]) -> dict[str, list[tuple[float, float]]]:
    """By process, from when to when it was dying or dead."""
    found: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        spans = found.setdefault(event.process, [])
        if event.what in DEATHS:
            spans.append((event.time, math.inf))
        elif event.what == "started" and spans and spans[-1][1] == math.inf:
            spans[-1] = (spans[-1][0], event.time)
    return found


def _may_have_scanned(operation: Operation) -> bool:
    if operation.kind in SWEEPING:
        return operation.outcome != OK or bool(operation.said.get("scanned"))
    return operation.kind == "scan"


def _surely_removed(operation: Operation, before: float) -> bool:
    return operation.kind in REMOVING and operation.outcome == OK and operation.end < before
