"""Where a chaos run takes place: two datastores, sidecars that both serve them, mounts; and how these are disturbed."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.history import Recorder
from tests.support.processes import Mount, Sidecar, is_mounted, loop_mount

LAYOUTS = ("compound", "sharded", "vsan")
XFS_BYTES = 2 << 30
CONFIG = """
[limits]
lock_timeout_seconds = 3
staging_lease_seconds = 20
shutdown_seconds = 5
"""
ENDING_SECONDS = 40.0
KILL_SECONDS = 10.0
# For calls that were cancelled to end, and for what a mount holds open for a moment after a close.
QUIET_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Store:
    """A datastore that all sidecars serve."""

    name: str
    layout: str
    root: Path


class Actor:
    """A sidecar or a mount, over all its lives. Only one thread disturbs; others ask whether it is up."""

    def __init__(self, name: str, process: Sidecar | Mount, recorder: Recorder) -> None:
        self.name = name
        self.process = process
        self._recorder = recorder
        self.is_up = False
        self.is_stopped = False

    @property
    def pid(self) -> int:
        assert self.process.process is not None
        return self.process.process.pid

    def start(self) -> None:
        try:
            self.process.start()
        except AssertionError as error:
            self._recorder.event("not-started", self.name, error=str(error)[-2000:])
            raise
        self.is_up = True
        self._recorder.event("started", self.name, pid=self.pid)

    def signal(self, number: signal.Signals, what: str) -> None:
        # The event first: from here on its answers may be missing.
        self._recorder.event(what, self.name, pid=self.pid)
        self.is_up = self.is_up and number is not signal.SIGKILL and number is not signal.SIGTERM
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL, "kill")
        self._wait_killed("after SIGKILL")

    def _wait_killed(self, when: str) -> None:
        """A daemon that waits in the kernel for itself would survive SIGKILL until its mount is taken away by force."""
        assert self.process.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.process.wait(KILL_SECONDS)
            return
        self._recorder.event("hangs", self.name, when=when, threads=self._where_threads_are())
        if isinstance(self.process, Mount):
            subprocess.run(["umount", "--force", "--lazy", self.process.path], check=False)
        self.process.process.wait(ENDING_SECONDS)

    def terminate(self) -> None:
        """SIGTERM, and its end."""
        self.signal(signal.SIGTERM, "term")
        assert self.process.process is not None
        try:
            status: int | str = self.process.process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"nothing within {ENDING_SECONDS:g} s"
            self._recorder.event("hangs", self.name, when="after SIGTERM", threads=self._where_threads_are())
            self.process.process.kill()
            self._wait_killed("after SIGTERM and SIGKILL")
        self._recorder.event("ended", self.name, status=status)

    def _where_threads_are(self) -> list[str]:
        found = []
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
                found.append(f"{(thread / 'comm').read_text().strip()} {state} {(thread / 'stack').read_text()}")
        return found

    def stop(self) -> None:
        self.signal(signal.SIGSTOP, "stop")
        self.is_stopped = True

    def resume(self) -> None:
        if self.is_stopped:
            self.is_stopped = False
            self.signal(signal.SIGCONT, "continue")

    def notice_death(self) -> bool:
        """Whether it died, and nobody had a hand in it."""
        if not self.is_up or self.process.process is None or self.process.process.poll() is None:
            return False
        self.is_up = False
        self._recorder.event("died", self.name, status=self.process.process.returncode)
        return True

    def end(self) -> None:
        """However it is; nothing of it is left."""
        if self.process.process is None:
            return
        if self.process.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.stop()

    def sample(self, stores: Sequence[Store]) -> None:
        """Counts what it has open, when it does nothing."""
        until = time.monotonic() + QUIET_SECONDS
        while (found := self._open_files(stores))[0] and time.monotonic() < until:
            time.sleep(0.1)
        files, staged = found
        self._recorder.event(
            "sample",
            self.name,
            pid=self.pid,
            descriptors=len(os.listdir(f"/proc/{self.pid}/fd")) - staged,
            threads=len(os.listdir(f"/proc/{self.pid}/task")),
            open=files,
        )

    def _open_files(self, stores: Sequence[Store]) -> tuple[list[str], int]:
        """Files of the datastores that it has open; and the number of those of imports that may go on."""
        files, staged = [], 0
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                path = os.readlink(f"/proc/{self.pid}/fd/{number}")
                if not any(path.startswith(f"{store.root}/") for store in stores):
                    continue
                if "tmp_image" in path and (path.endswith(".ec_lock") or isinstance(self.process, Mount)):
                    staged += 1
                else:
                    files.append(path)
        return files, staged


class Stage:
    """Chosen by the seed: how many sidecars and mounts, which layouts. The last sidecar is only ever stopped."""

    def __init__(
        self, directory: Path, recorder: Recorder, choose: random.Random, xfs: Path, command: Sequence[str] = ()
    ) -> None:
        self.directory = directory
        self.recorder = recorder
        layouts = choose.sample(LAYOUTS, 2)
        self.stores = [Store("one", layouts[0], xfs / "one"), Store("two", layouts[1], directory / "two")]
        for store in self.stores:
            store.root.mkdir()
        flags = [f"{store.name}={store.root},layout={store.layout}" for store in self.stores]
        self.sidecars = [
            Actor(name, self._make_sidecar(name, flags, command), recorder)
            for name in [f"sidecar-{number}" for number in range(choose.choice((2, 3)))]
        ]
        self.mounts: list[Actor] = []
        for number in range(choose.choice((1, 2))):
            process = Mount(directory / f"mount-{number}", self.address(0), options="settle=0.5")
            self.mounts.append(Actor(f"mount-{number}", process, recorder))
        self.disturbing = threading.Lock()  # held while processes are ended and started

    def _make_sidecar(self, name: str, flags: list[str], command: Sequence[str]) -> Sidecar:
        sidecar = Sidecar(self.directory / "run", *flags, config=CONFIG, name=name)
        if command:
            # Another program in its place, with the same arguments: one whose rules are broken on purpose.
            sidecar._command[:1] = command
        return sidecar

    @property
    def actors(self) -> list[Actor]:
        return [*self.sidecars, *self.mounts]

    @property
    def spared(self) -> Actor:
        return self.sidecars[-1]

    def address(self, number: int) -> str:
        process = self.sidecars[number].process
        assert isinstance(process, Sidecar)
        return process.address

    def store(self, name: str) -> Store:
        return next(store for store in self.stores if store.name == name)

    def mountpoint(self, number: int) -> Path:
        process = self.mounts[number].process
        assert isinstance(process, Mount)
        return process.path

    def start(self) -> None:
        for actor in self.actors:
            actor.start()

    def sample(self) -> None:
        for actor in self.actors:
            if actor.is_up:
                actor.sample(self.stores)

    def end_all(self, choose: random.Random) -> None:
        """Mounts first; each killed or ended in good order."""
        for actor in reversed(self.actors):
            if actor.is_up:
                actor.kill() if choose.random() < 0.4 else actor.terminate()

    def clear(self) -> None:
        """After whatever happened: no process and no mount is left."""
        for number in range(len(self.mounts)):
            # First: whatever waits for a daemon that does not answer is told so, and can end.
            while is_mounted(self.mountpoint(number)):
                if subprocess.run(["umount", "--force", "--lazy", self.mountpoint(number)], check=False).returncode:
                    break
        for actor in reversed(self.actors):
            actor.end()

    def mounts_left(self) -> list[str]:
        """Of mounts that have been ended in good order, or whose daemon was started again."""
        return [str(path) for number in range(len(self.mounts)) if is_mounted(path := self.mountpoint(number))]


@contextlib.contextmanager
def stage(directory: Path, recorder: Recorder, choose: random.Random, command: Sequence[str] = ()) -> Iterator[Stage]:
    """The first datastore on an XFS that shares extents, the second on whatever holds `directory`."""
    with ExitStack() as stack:
        xfs = stack.enter_context(loop_mount(directory / "xfs", XFS_BYTES, ("mkfs.xfs", "-q", "-m", "reflink=1")))
        made = Stage(directory, recorder, choose, xfs, command)
        stack.callback(made.clear)
        yield made


BROKEN_COMMAND = (sys.executable, "-m", "tests.chaos.broken")
