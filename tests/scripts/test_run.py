"""The README's commands do what it says."""

import os
import re
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.support.processes import run, wait_until

ROOT = Path(__file__).parents[2]


def tour(*options: str) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "run"), *options, "--tour"],
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
def test_the_tour_holds_and_leaves_nothing_running() -> None:
    tour()


@pytest.mark.slow
def test_the_tour_holds_by_the_api_of_a_server_that_is_checked_and_shows_no_secret() -> None:
    tour("--vsphere")
    files, logs = ROOT / "demo" / "vsphere", (ROOT / "demo").glob("*.log")
    config = tomllib.loads((files / "sidecar.toml").read_text())
    assert config["vsphere"]["simulator"].keys() == {"address", "thumbprint", "credentials_file"}
    assert not any("path" in datastore for datastore in config["datastore"].values())
    secrets = [Path(config["vsphere"]["simulator"]["credentials_file"]), files / "certificate.pem"]
    assert [secret.stat().st_mode & 0o777 for secret in secrets] == [0o600, 0o600]
    password = secrets[0].read_text().strip().partition(":")[2]
    assert len(password) == 32 and not any(password in log.read_text() for log in logs)


def test_what_is_no_option_is_named_and_nothing_is_started() -> None:
    for arguments, wrong in ((["--vpshere"], "--vpshere"), (["--tour", "two words"], r"two\\ words"), ([""], "''")):
        done = run(ROOT / "scripts" / "run", *arguments, check=False)
        assert done.returncode == 2 and done.stdout == ""
        assert re.search(rf"^scripts/run: there is no option {wrong}\.\nusage: scripts/run ", done.stderr)


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
