"""The README's commands do what it says."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import wait_until

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


@pytest.mark.slow
def test_when_the_sidecar_dies_the_mount_may_end_and_bash_tells_nothing(tmp_path: Path) -> None:
    """The mount, which waits 10 s for the sidecar of each import then, was killed, and bash told of it in its words."""
    told = tmp_path / "told"
    with told.open("wb") as output:
        main = subprocess.Popen(
            [str(ROOT / "scripts" / "run")], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: "Ctrl-C ends it." in told.read_text(), "it runs", 60)
        sidecar, _ = map(int, (ROOT / "demo" / "processes").read_text().split())
        (ROOT / "demo" / "mnt" / "one" / "pending").mkdir()
        os.kill(sidecar, signal.SIGKILL)
        assert main.wait(60) == 1
    finally:
        if main.poll() is None:
            main.terminate()
            main.wait(60)
    text = told.read_text()
    assert "the sidecar has ended by itself" in text
    assert "killing it" not in text
    assert "Killed" not in text and ": line " not in text
    assert not os.path.ismount(ROOT / "demo" / "mnt")


def test_every_command_of_the_readme_exists() -> None:
    from sidecar.ctl.commands import imagectl

    readme = (ROOT / "README.md").read_text()
    documented = set(re.findall(r"^\| `([a-z]+)[ `]", readme, re.MULTILINE)) & set(imagectl.list_commands(None))  # type: ignore[arg-type]
    assert documented | {"restore", "purge"} == set(imagectl.list_commands(None))  # type: ignore[arg-type]
