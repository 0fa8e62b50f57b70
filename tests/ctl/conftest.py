"""imagectl as a user runs it, against a real sidecar."""

import json
import os
import pty
import subprocess
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import BIN, Sidecar, run


@dataclass(frozen=True)
class Imagectl:
    """Runs imagectl with the sidecar's address in the environment."""

    address: str
    environment: dict[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"

    def command(self, *arguments: str | Path) -> list[str]:
        return [str(BIN / "imagectl"), *map(str, arguments)]

    def env(self) -> dict[str, str]:
        return {**os.environ, "LC_ALL": "C", "IMAGE_SIDECAR": self.address, **self.environment}

    def __call__(self, *arguments: str | Path, code: int = 0, cwd: Path | None = None) -> str:
        """Its stdout; it must end with `code`, and without a word on stderr when that is 0."""
        result = self.result(*arguments, cwd=cwd)
        assert result.returncode == code, result.stderr
        if code == 0:
            assert result.stderr == ""
        return result.stdout

    def result(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            encoding=self.encoding,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
            env=self.env(),
            cwd=cwd,
        )

    def error(self, *arguments: str | Path, code: int, cwd: Path | None = None) -> str:
        """Its message: one line on stderr, and nothing on stdout."""
        result = self.result(*arguments, cwd=cwd)
        assert (result.returncode, result.stdout) == (code, ""), result.stderr
        assert result.stderr.startswith("imagectl: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("imagectl: ").rstrip("\n")

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self("--output", "json", *arguments))

    def start(self, *arguments: str | Path) -> "subprocess.Popen[str]":
        """Heeds signals, also where the tests themselves run under nohup or as a shell's job in the background."""
        return subprocess.Popen(
            ["env", "--default-signal=INT,HUP,TERM", *self.command(*arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env(),
        )

    def on_terminal(self, *arguments: str | Path, columns: int = 80) -> str:
        """All that is written to a terminal of that width, on which it runs."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        written: list[bytes] = []

        def read() -> None:
            while True:
                try:
                    data = os.read(ours, 1 << 16)
                except OSError:  # EIO: the other side is closed
                    return
                written.append(data)

        reader = threading.Thread(target=read)
        try:
            process = subprocess.Popen(
                self.command(*arguments),
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env={**self.env(), "TERM": "xterm-256color"},
            )
            os.close(theirs)
            reader.start()
            assert process.wait(60) == 0
            reader.join(10)
        finally:
            os.close(ours)
        return b"".join(written).decode()


@pytest.fixture
def imagectl(sidecar: Sidecar) -> Imagectl:
    return Imagectl(sidecar.address)


@pytest.fixture
def exported(imagectl: Imagectl, tmp_path: Path) -> Callable[[str], Path]:
    """The descriptor of an image, exported; QEMU has checked it."""

    def export(ref: str) -> Path:
        directory = tmp_path / "exported" / ref.replace("/", "-")
        directory.parent.mkdir(exist_ok=True)
        imagectl("export", ref, directory)
        descriptor = directory / f"{ref.partition('/')[2]}.vmdk"
        # A flat disk has no structure that could be checked: 63 says so.
        assert run("qemu-img", "check", descriptor, check=False).returncode in (0, 63)
        return descriptor

    return export
