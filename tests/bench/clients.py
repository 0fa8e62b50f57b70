"""The clients of a load, some in one process: each has a thread and a connection of its own.

python -m tests.bench.clients ORDERS: says a line when all are connected, starts when it reads one, ends after the time
that was ordered or when its standard input ends, and then says what came of it. `tests.bench.crowd` is the other side.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sidecar.client import SidecarClient, errors

# How long a client waits after it was refused.
PAUSE_SECONDS = 0.05
TOUCH, LIST, DELETE = "touch", "list", "delete"


@dataclass(frozen=True, slots=True)
class Orders:
    """What the clients of one process do: all the same `task`, for so many seconds."""

    address: str
    task: str
    clients: int
    # Tells this process from others: of the names of what its clients make.
    number: int
    seconds: float
    # What is touched: DATASTORE/IMAGE, or paths for what has no sidecar.
    touched: list[str]
    # What is copied, and where to: by kind, the source and the datastore, or paths.
    copied: dict[str, tuple[str, str]]
    listed: list[str]


class Tally:
    """What a client did: seconds of what was answered, and the reasons of what was not, by kind."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.errors: dict[str, dict[str, int]] = {}

    def timed(self, kind: str, work: Callable[[], object]) -> bool:
        """Whether it was done."""
        start = time.perf_counter()
        try:
            work()
        except Exception as error:
            # What is no error of this project is counted by its class, and is none that is allowed.
            reason = error.reason if isinstance(error, errors.ImagesError) else f"{type(error).__name__}: {error}"
            reasons = self.errors.setdefault(kind, {})
            reasons[reason] = reasons.get(reason, 0) + 1
            return False
        self.seconds.setdefault(kind, []).append(time.perf_counter() - start)
        return True


class Client:
    """One client, in a thread. `ended` says when to begin nothing more."""

    def __init__(self, orders: Orders, number: int, ended: threading.Event) -> None:
        self.tally = Tally()
        self._orders = orders
        self._name = f"copy-{orders.number}-{number}"
        self._ended = ended
        self._random = random.Random(f"{orders.number}-{number}")
        self._sidecar = SidecarClient(orders.address, timeout=60.0) if orders.address else None

    def connect(self) -> None:
        if self._sidecar:
            self._sidecar.wait_ready(30)

    def run(self) -> None:
        tasks = {
            "mix": self._mix,
            "touch": self._touch,
            "copy": self._copy,
            "raw touch": self._raw_touch,
            "cp": self._cp,
        }
        task = tasks[self._orders.task]
        while not self._ended.is_set():
            task()

    def close(self) -> None:
        if self._sidecar:
            self._sidecar.close()

    def _mix(self) -> None:
        self._random.choices((self._touch, self._list, self._copy), (6, 3, 1))[0]()

    def _touch(self) -> None:
        assert self._sidecar
        sidecar, ref = self._sidecar, self._random.choice(self._orders.touched)
        self.tally.timed(TOUCH, lambda: sidecar.touch(ref))

    def _list(self) -> None:
        assert self._sidecar
        sidecar, datastore = self._sidecar, self._random.choice(self._orders.listed)
        self.tally.timed(LIST, lambda: list(sidecar.images(datastore)))

    def _copy(self) -> None:
        """A copy, which is freed again. Also after the end: no copy is left behind."""
        assert self._sidecar
        sidecar, kind = self._sidecar, self._random.choice(sorted(self._orders.copied))
        source, datastore = self._orders.copied[kind]
        copy = f"{datastore}/{self._name}"
        if self.tally.timed(kind, lambda: sidecar.copy(source, copy).wait()):
            while not self.tally.timed(DELETE, lambda: sidecar.delete(copy, force=True)):
                if set(self.tally.errors[DELETE]) != {errors.TooManyCalls.reason}:
                    return
                self._ended.wait(PAUSE_SECONDS)
        else:
            self._ended.wait(PAUSE_SECONDS)

    def _raw_touch(self) -> None:
        self.tally.timed(TOUCH, lambda: _touch_file(self._random.choice(self._orders.touched)))

    def _cp(self) -> None:
        """As durable as ours: cp, then fsync of the copies."""
        kind, (source, directory) = next(iter(self._orders.copied.items()))
        copy = Path(directory, self._name)

        def copy_files() -> None:
            subprocess.run(["cp", "-r", source, copy], check=True)
            subprocess.run(["sync", *copy.iterdir()], check=True)

        if self.tally.timed(kind, copy_files):
            self.tally.timed(DELETE, lambda: subprocess.run(["rm", "-r", copy], check=True))


def _touch_file(path: str) -> None:
    """What the sidecar does to note a use, and nothing else."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.utime(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def main() -> None:
    orders = Orders(**json.loads(sys.argv[1]))
    ended = threading.Event()
    with ExitStack() as stack:
        clients = [Client(orders, number, ended) for number in range(orders.clients)]
        for client in clients:
            stack.callback(client.close)
            client.connect()
        threads = [threading.Thread(target=client.run) for client in clients]
        print("connected", flush=True)  # noqa: T201
        sys.stdin.readline()
        threading.Thread(target=_end_with_input, args=(ended,), daemon=True).start()
        for thread in threads:
            thread.start()
        ended.wait(orders.seconds)
        ended.set()
        for thread in threads:
            thread.join()
    tallies: list[dict[str, Any]] = [{"seconds": c.tally.seconds, "errors": c.tally.errors} for c in clients]
    json.dump(tallies, sys.stdout)


def _end_with_input(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def encode(orders: Orders) -> str:
    return json.dumps(asdict(orders))


if __name__ == "__main__":
    main()
