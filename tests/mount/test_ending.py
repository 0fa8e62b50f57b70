"""The end of a mount, while its other threads still have something to tell the kernel."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.mount.harness import import_sparse, is_in_kernel_at, log_of, wait_listed
from tests.support.disks import MIB, import_image, make_disk
from tests.support.processes import Mount, Sidecar, background, is_mounted, loop_mount, run, wait_until

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


_BUSY = """
import os, sys
while True:
    try:
        os.mkdir(sys.argv[1])
        os.rmdir(sys.argv[1])
    except OSError as error:
        if error.errno in (107, 103, 2):
            break
"""


def test_a_mount_in_the_middle_of_changes_ends(sidecar: Sidecar, client: SidecarClient, tmp_path: Path) -> None:
    """What makes the kernel forget a name waits for the requests in its directory, which have to be answered first."""
    descriptor = make_disk(tmp_path / "source", size=1 * MIB, data=())
    import_image(client, "one/a", descriptor)
    for attempt in range(3):
        with ExitStack() as stack:
            mount = stack.enter_context(Mount(tmp_path / f"busy-{attempt}", sidecar.address))
            wait_listed(mount, "one/a")
            for number in range(4):
                stack.enter_context(background(sys.executable, "-c", _BUSY, mount.path / "one" / f"busy-{number}"))
            for _ in range(10):
                client.delete("one/a")
                os.path.exists(mount.path / "one" / "a")
                client.restore("one/a")
            assert mount.process is not None
            mount.process.terminate()
            for _ in range(10):
                client.delete("one/a")
                client.restore("one/a")
            assert mount.stop(20) == 0


@pytest.mark.parametrize("change", ["touch", "rm"])
def test_a_mount_ends_soon_while_its_sidecar_hangs_with_a_change(change: str, tmp_path: Path, stack: ExitStack) -> None:
    """It has been sent already, and may take minutes: in a request, or, what is left for later, in a thread."""
    root = stack.enter_context(loop_mount(tmp_path / "xfs", 320 * MIB, ("mkfs.xfs", "-q")))
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root}"))
    with sidecar.client() as client:
        import_sparse(client, "one/a", make_disk(tmp_path / "source"), companions={"disk.ecv": b"{}"})
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address, options="settle=0"))
    image = wait_listed(mount, "one/a")
    run("fsfreeze", "--freeze", root)
    try:
        stack.enter_context(background("touch", image) if change == "touch" else background("rm", image / "a.ecv"))
        wait_until(lambda: is_in_kernel_at(sidecar.pid, "mnt_want_write"), "the sidecar is at it")
        sidecar.stop_now()
        assert mount.stop(15) == 0
    finally:
        sidecar.signal(signal.SIGCONT)
        run("fsfreeze", "--unfreeze", root)
    assert "ending without the sidecar" in log_of(mount)
    assert not is_mounted(mount.path)
