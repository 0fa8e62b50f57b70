"""Real processes for tests: always ended by the pid that was started, whatever the test did."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sidecar.client import SidecarClient

BIN = Path(sys.executable).parent


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    """Waits for a condition, never longer than `timeout` seconds."""
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"waited {timeout:g} s in vain: {what}")
        time.sleep(0.01)


def stop_now(process: "subprocess.Popen[bytes]") -> None:
    """SIGSTOP; returns when none of its threads runs any more: until then some may still answer.

    One that the kernel does not let go yet stops on its way back, once another has stopped.
    """

    def has_stopped() -> bool:
        states = {_state(thread) for thread in Path(f"/proc/{process.pid}/task").iterdir()}
        return "T" in states and states <= {"T", "D", ""}

    process.send_signal(signal.SIGSTOP)
    wait_until(has_stopped, f"process {process.pid} stops")


def _state(thread: Path) -> str:
    """Its letter, as in proc(5); none when it has ended."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Sidecar:
    """An image-sidecar of its own process. `datastores` are written as its --datastore flags are."""

    def __init__(
        self, directory: Path, *datastores: str, config: str = "", name: str = "sidecar", log_level: str = "debug"
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / f"{name}.log"
        self.address = f"unix:{directory}/{name}.sock"
        self._command = [str(BIN / "image-sidecar"), "serve", "--listen", self.address, "--log-level", log_level]
        if config:
            (directory / f"{name}.toml").write_text(config)
            self._command += ["--config", str(directory / f"{name}.toml")]
        for datastore in datastores:
            self._command += ["--datastore", datastore]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> Self:
        with self.log.open("ab") as log:
            start = log.tell()
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(lambda: self._is_ready(start), f"the sidecar is ready; its log:\n{self.log.read_text()}")
        return self

    def client(self, timeout: float = 30.0) -> SidecarClient:
        return SidecarClient(self.address, timeout=timeout)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop_now(self) -> None:
        """SIGSTOP; nothing of it runs afterwards."""
        assert self.process is not None
        stop_now(self.process)

    def kill(self) -> None:
        """kill -9, and waits until it is gone."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(10)

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM; returns its exit status."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise

    def _is_ready(self, start: int) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the sidecar ended with {self.process.returncode}:\n{self.log.read_text()}")
        return b"image-sidecar: ready" in self.log.read_bytes()[start:]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class Mount:
    """An image-mount of its own process, in the foreground."""

    def __init__(
        self, mountpoint: Path, address: str, *, options: str = "", binding: str = "mfusepy", log: Path | None = None
    ) -> None:
        mountpoint.mkdir(parents=True, exist_ok=True)
        self.path = mountpoint
        self.log = log or mountpoint.with_name(f"{mountpoint.name}.log")
        self._command = [str(BIN / "image-mount"), str(mountpoint), "--sidecar", address, "--foreground"]
        self._command += ["--binding", binding, *(["-o", options] if options else [])]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(self._is_ready, f"the mount is there; its log:\n{self.log.read_text()}")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM; returns its exit status. Unmounts by force what is still mounted then."""
        if self.process is None:
            return 0
        try:
            if self.process.poll() is None:
                self.process.terminate()
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(10)
            if is_mounted(self.path):
                subprocess.run(["umount", "--lazy", str(self.path)], check=False)

    def _is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the mount ended with {self.process.returncode}:\n{self.log.read_text()}")
        try:
            return is_mounted(self.path) and bool(os.listdir(self.path))
        except OSError:  # what a mount that died left, until it is cleared
            return False

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def is_mounted(path: Path) -> bool:
    written = str(path).replace(" ", r"\040")
    return any(line.split()[1] == written for line in Path("/proc/self/mounts").read_text().splitlines())


def run(*command: str | Path, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Runs a tool as a user would; its messages in English."""
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C"},
    )
    if check and result.returncode:
        raise AssertionError(f"{' '.join(map(str, command))} ended with {result.returncode}: {result.stderr}")
    return result


@contextlib.contextmanager
def background(*command: str | Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the block."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


def imagectl(address: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(BIN / "imagectl", "--sidecar", address, *arguments, check=check)


@contextlib.contextmanager
def loop_mount(directory: Path, size: int, mkfs: Sequence[str]) -> Iterator[Path]:
    """A file system of its own, `size` bytes large, on a loop device; `mkfs` such as ("mkfs.xfs", "-q")."""
    directory.mkdir(parents=True, exist_ok=True)
    image, mountpoint = directory / "fs.img", directory / "fs"
    with image.open("wb") as file:
        file.truncate(size)
    run(*mkfs, image)
    mountpoint.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, mountpoint)
    try:
        yield mountpoint
    finally:
        result = run("umount", mountpoint, check=False)
        if result.returncode:
            run("umount", "--lazy", mountpoint)
        image.unlink()
