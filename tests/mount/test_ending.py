"""The end of a mount, while its other threads still have something to tell the kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.support.processes import Sidecar, is_mounted, run

# A mount of which every path is out of date, all the time, and which is told to end all the time when it has ended.
_SCRIPT = """
import sys, threading
from fusefs import binding
from fusefs.daemon import EndSignals
from fusefs.mount import run
from fusefs.options import parse_options
from sidecar.client import SidecarClient

def busy(session):
    while True:
        session.invalidate(["/one/a/a.vmdk"] * 50)

original = binding.serve
def serve(name, filesystem, mountpoint, options, on_ready, **others):
    def ready(session):
        on_ready(session)
        for _ in range(2):
            threading.Thread(target=busy, args=(session,), daemon=True).start()
        sessions.append(session)
    original(name, filesystem, mountpoint, options, ready, **others)
    for session in sessions:
        session.exit()

sessions = []
binding.serve = serve
with SidecarClient(sys.argv[2]) as client:
    run(sys.argv[1], client, parse_options(()), "mfusepy", EndSignals(), lambda: print("ready", flush=True))
"""


@pytest.mark.parametrize("attempt", range(3))
def test_libfuse_is_told_nothing_when_it_has_freed_what_it_knows(
    attempt: int, sidecar: Sidecar, client: SidecarClient, tmp_path: Path
) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    # What is freed is overwritten: whoever uses it crashes.
    environment = {**os.environ, "MALLOC_PERTURB_": "165"}
    command: list[str | Path] = [sys.executable, "-c", _SCRIPT, mountpoint, sidecar.address]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            run("fusermount3", "-u", mountpoint)
            assert process.wait(20) == 0, "-11 is a crash"
        finally:
            if is_mounted(mountpoint):
                run("umount", "--lazy", mountpoint)
            process.kill()
