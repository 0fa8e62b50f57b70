"""The README's commands do what it says."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_tour_holds_and_leaves_nothing_running() -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "run"), "--tour"],
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^The tour held: \d+ steps", done.stdout, re.MULTILINE)
    assert not os.path.ismount(ROOT / "demo" / "mnt")
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [command for command in commands if os.fsencode(ROOT / "demo") in command]


def test_every_command_of_the_readme_exists() -> None:
    from sidecar.ctl.commands import imagectl

    readme = (ROOT / "README.md").read_text()
    documented = set(re.findall(r"^\| `([a-z]+)[ `]", readme, re.MULTILINE)) & set(imagectl.list_commands(None))  # type: ignore[arg-type]
    assert documented | {"restore", "purge"} == set(imagectl.list_commands(None))  # type: ignore[arg-type]
