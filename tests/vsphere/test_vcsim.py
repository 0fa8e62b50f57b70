"""The simulator that these tests run against: it starts as either kind, ends, and is never left out silently."""

import socket
import ssl
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.support.processes import run
from tests.support.vcsim import SCRIPT, Vcsim


def versions(simulator: Vcsim) -> str:
    """What a client asks before it knows anything; it needs no login."""
    url = f"https://127.0.0.1:{simulator.port}/sdk/vimServiceVersions.xml"
    context = ssl._create_unverified_context()
    with urllib.request.urlopen(url, timeout=10, context=context) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("kind", ["vcenter", "host"])
def test_it_serves_at_a_free_port_and_again_at_the_same_one_after_its_end(tmp_path: Path, kind: str) -> None:
    (tmp_path / "one").mkdir()
    simulator = Vcsim(tmp_path / "run", {"one": tmp_path / "one"}, kind=kind)
    with simulator:
        port = simulator.port
        assert "urn:vim25" in versions(simulator)
        simulator.kill()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        simulator.start()
        assert simulator.port == port
        assert "urn:vim25" in versions(simulator)


def test_without_a_compiler_it_fails_and_says_what_to_do(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "env"):
        (tools / name).symlink_to(Path("/usr/bin") / name)
    result = subprocess.run([SCRIPT], env={"PATH": str(tools)}, capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 1
    assert "scripts/setup installs it" in result.stderr


def test_a_directory_that_is_not_there_is_an_error() -> None:
    assert "no such file" in run(SCRIPT, "-datastore", "one=/nonexistent", check=False).stderr
