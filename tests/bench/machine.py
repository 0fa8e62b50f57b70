"""What a measurement was taken on, for whoever compares it with another."""

import os
import platform
from pathlib import Path

from tests.support.processes import run


def describe_machine(directory: Path) -> list[tuple[str, str]]:
    """What matters for the numbers, by name; `directory` is on the disk that is measured."""
    return [
        ("processor", f"{_field('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores visible"),
        ("memory", f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / 1024 / 1024:.0f} GiB"),
        ("system", f"{_distribution()}, Linux {os.uname().release}"),
        ("disk beneath", run("stat", "--file-system", "--format=%T", directory).stdout.strip()),
        ("file systems", f"{_version('mkfs.xfs', '-V')}, {_version('mkfs.ext4', '-V')}"),
        ("tools", ", ".join(_version(tool, "--version") for tool in ("cp", "qemu-img", "bindfs", "fio"))),
        ("Python", platform.python_version()),
        ("load at the start", f"{os.getloadavg()[0]:.1f} (1 minute)"),
    ]


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "0 (not known)"


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def _version(*command: str) -> str:
    """The first line that the tool says, to whichever stream."""
    result = run(*command)
    return (result.stdout or result.stderr).splitlines()[0].split(" (Debian")[0].strip()
