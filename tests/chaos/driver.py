"""Drives a chaos run: workers that do random operations, one disturber that kills and stops, quiet moments between."""

import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from protos.images.v1.types_pb2 import IMAGE_STATE_INCOMPLETE, IMAGE_STATE_TOMBSTONED, IMAGE_STATE_VALID
from sidecar.client import SidecarClient
from sidecar.errors import ImagesError
from tests.chaos.history import ERROR, OK, UNKNOWN, Operation, Recorder
from tests.chaos.names import Names
from tests.chaos.operations import KINDS, Bench, ToolError, Tools
from tests.chaos.reading import DELETED, DELETED_WRECK, VALID, WRECK, Reading, read_datastore
from tests.chaos.stage import Actor, Stage, stage

WORKERS = 6
QUIET_EVERY = 20.0
CALL_SECONDS = 10.0
# Answers that leave open what became of the call.
_OPEN = {"SIDECAR_UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "STAGING_PUBLISHED"}
_STATUSES = {
    VALID: IMAGE_STATE_VALID,
    DELETED: IMAGE_STATE_TOMBSTONED,
    DELETED_WRECK: IMAGE_STATE_TOMBSTONED,
    WRECK: IMAGE_STATE_INCOMPLETE,
}


class Gate:
    """Workers pass it for each operation; who closes it waits until nobody is inside."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._is_closed = False

    def enter(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._is_closed)
            self._inside += 1

    def leave(self) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def close(self, timeout: float) -> bool:
        with self._condition:
            self._is_closed = True
            return self._condition.wait_for(lambda: not self._inside, timeout)

    def open(self) -> None:
        with self._condition:
            self._is_closed = False
            self._condition.notify_all()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run. `command`: what is started in place of image-sidecar. `kinds`: of KINDS, all when empty."""

    seconds: float
    seed: int
    directory: Path
    command: Sequence[str] = ()
    kinds: Sequence[str] = ()
    disturb: bool = True


@dataclass
class Result:
    """What lies on the datastores when all is over, and after a start, a reap and an end in good order."""

    readings: dict[str, Reading]
    afterwards: dict[str, Reading]
    layouts: dict[str, str]


class Run:
    """One run on a stage that has started."""

    def __init__(self, plan: Plan, stage: Stage, recorder: Recorder) -> None:
        self._plan = plan
        self._stage = stage
        self._recorder = recorder
        self._names = Names([store.name for store in stage.stores])
        self._gate = Gate()
        self._tools = Tools(plan.directory)
        self._stopping = threading.Event()
        self._failed: list[BaseException] = []
        self._scratch = plan.directory / "scratch"
        self._scratch.mkdir()

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._guarded, args=(lambda number=number: self._work(number),), daemon=True)
            for number in range(WORKERS)
        ]
        disturber = threading.Thread(target=self._guarded, args=(self._disturb,), daemon=True)
        try:
            for thread in threads:
                thread.start()
            disturber.start()
            until = time.monotonic() + self._plan.seconds
            while (left := until - time.monotonic()) > 0 and not self._stopping.is_set():
                if not self._stopping.wait(min(left, QUIET_EVERY)):
                    self._be_quiet()
        except BaseException:
            self._tools.end()
            raise
        finally:
            self._stopping.set()
            self._gate.open()
            disturber.join(90)
            for thread in threads:
                thread.join(90)
        if any(thread.is_alive() for thread in (*threads, disturber)):
            raise RuntimeError("a worker hangs: an operation did not end within 90 s")
        if self._failed:
            raise self._failed[0]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failed.append(error)
            self._stopping.set()

    def _be_quiet(self) -> None:
        """No operation runs, every process is there: what they have open is counted."""
        with self._stage.disturbing:
            if self._gate.close(90):
                self._stage.sample()
            else:
                self._recorder.event("not-quiet", "driver")
            self._gate.open()

    # ---- Workers

    def _work(self, number: int) -> None:
        choose = random.Random(f"{self._plan.seed} worker {number}")
        with ExitStack() as stack:
            clients = [
                stack.enter_context(SidecarClient(self._stage.address(index), timeout=CALL_SECONDS))
                for index in range(len(self._stage.sidecars))
            ]
            while not self._stopping.is_set():
                self._gate.enter()
                try:
                    self._operate(f"worker-{number}", choose, clients)
                finally:
                    self._gate.leave()

    def _operate(self, worker: str, choose: random.Random, clients: list[SidecarClient]) -> None:
        kind, target, source = self._choose(choose)
        mount = choose.randrange(len(self._stage.mounts))
        if kind.startswith("mount-"):
            index = 0
            via = [self._stage.mounts[mount].name, self._stage.sidecars[0].name]
        else:
            index = self._choose_sidecar(choose)
            via = [self._stage.sidecars[index].name]
        bench = Bench(choose, clients[index], self._stage.mountpoint(mount), self._scratch, self._tools)
        operation = self._recorder.begin(worker, kind, target, via, source)
        try:
            said = KINDS[kind].work(bench, operation)
        except ImagesError as error:
            is_run = kind in ("scan", "sweep") and error.reason != "TASK_ALREADY_RUNNING"
            outcome = UNKNOWN if is_run or error.reason in _OPEN else ERROR
            self._recorder.end(operation, outcome, error.reason, {"message": error.message})
        except ToolError as error:
            self._recorder.end(operation, ERROR if error.is_harmless else UNKNOWN, str(error))
        else:
            self._recorder.end(operation, OK, "", said)
            if leaves := KINDS[kind].leaves:
                self._names.believe(target, leaves)
        self._learn(operation)

    def _learn(self, operation: Operation) -> None:
        status = {
            "IMAGE_NOT_FOUND": "absent",
            "IMAGE_ALREADY_EXISTS": "valid",
            "IMAGE_TOMBSTONED": "deleted",
            "IMAGE_NOT_TOMBSTONED": "valid",
        }.get(operation.reason)
        about = operation.source if operation.reason in ("IMAGE_NOT_FOUND", "IMAGE_TOMBSTONED") else ""
        if status:
            self._names.believe(about or operation.target, status)

    def _choose(self, choose: random.Random) -> tuple[str, str, str]:
        """The kind, the target and the source of the next operation: mostly one that can succeed."""
        allowed = self._plan.kinds or list(KINDS)
        if choose.random() < 0.05 and "force" in allowed and (retired := self._names.pick_retired(choose)):
            return "force", retired, ""
        target = self._names.pick(choose)
        believed = self._names.believed(target)
        weights = [KINDS[kind].weight * (8 if KINDS[kind].suits in (believed, "") else 1) for kind in allowed]
        kind = choose.choices(allowed, weights)[0]
        if kind not in ("copy", "mount-copy"):
            return kind, target, ""
        source = self._names.pick_valid(choose)
        if source is None or source == target:
            return kind.replace("copy", "import"), target, ""
        return kind, target, source

    def _choose_sidecar(self, choose: random.Random) -> int:
        index = choose.randrange(len(self._stage.sidecars))
        if not self._stage.sidecars[index].is_up and choose.random() < 0.8:
            index = len(self._stage.sidecars) - 1
        return index

    # ---- The disturber

    def _disturb(self) -> None:
        choose = random.Random(f"{self._plan.seed} disturber")
        while not self._stopping.wait(choose.uniform(0.5, 4.0)):
            with self._stage.disturbing:
                for actor in self._stage.actors:
                    if actor.notice_death():
                        actor.start()
                if self._plan.disturb and not self._stopping.is_set():
                    self._disturb_once(choose)

    def _disturb_once(self, choose: random.Random) -> None:
        victims = choose.sample(self._stage.actors, choose.choice((1, 1, 1, 2)))
        down: list[Actor] = []
        for actor in victims:
            action = choose.choices(("kill", "term", "stop", "stop and kill"), (5, 2, 3, 1))[0]
            if actor is self._stage.spared:
                action = "stop"
            match action:
                case "kill":
                    actor.kill()
                    down.append(actor)
                case "term":
                    actor.terminate()
                    down.append(actor)
                case _:
                    actor.stop()
            if action == "stop and kill":
                self._stopping.wait(choose.uniform(0.0, 2.0))
                actor.is_stopped = False
                actor.kill()
                down.append(actor)
        self._stopping.wait(choose.uniform(0.0, 3.0))
        for actor in victims:
            actor.resume()
        # A mount needs its sidecar to start.
        for actor in sorted(down, key=lambda actor: actor in self._stage.mounts):
            actor.start()


def carry_out(plan: Plan, recorder: Recorder) -> Result:
    """The whole run, from making the file systems to taking them away."""
    choose = random.Random(plan.seed)
    with stage(plan.directory, recorder, choose, plan.command) as made:
        made.start()
        Run(plan, made, recorder).run()
        for actor in made.actors:
            if actor.notice_death():
                actor.start()
        made.sample()
        made.end_all(choose)
        readings = {store.name: read_datastore(store.root, store.layout) for store in made.stores}
        afterwards = _start_once_more(made, recorder, readings)
        recorder.event("mounts", "driver", left=made.mounts_left())
        return Result(readings, afterwards, {store.name: store.layout for store in made.stores})


def _start_once_more(made: Stage, recorder: Recorder, readings: dict[str, Reading]) -> dict[str, Reading]:
    """Starts a sidecar and the mounts, compares what is listed with what is there, reaps, and ends all."""
    actor = made.sidecars[0]
    actor.start()
    for mount in made.mounts:
        mount.start()
    with SidecarClient(made.address(0)) as client:
        there = {
            f"{name}/{image_id}": _STATUSES[found.status]
            for name, reading in readings.items()
            for image_id, found in reading.images.items()
        }
        listed = {
            f"{image.ref.datastore}/{image.ref.image_id}": image.state
            for image in client.images(states=tuple(_STATUSES.values()))
        }
        for store in made.stores:
            client.maintenance.reap(store.name, grace=0)
    differs = {
        name: [there.get(name), listed.get(name)] for name in there | listed if there.get(name) != listed.get(name)
    }
    recorder.event("listing", actor.name, differs=differs)
    for each in (*made.mounts, actor):
        each.terminate()
    return {store.name: read_datastore(store.root, store.layout) for store in made.stores}


def end_on_signal() -> None:
    """A signal ends the run as an error would; a second one must not cut short the clearing."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def end(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
