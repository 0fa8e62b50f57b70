"""kill -9 of the daemon, whatever it does: no tool waits for it afterwards, and its mount can be taken away."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.mount.harness import hanging, is_in_kernel_at, message_of, names
from tests.support.processes import Mount, Sidecar, background, is_mounted, loop_mount, run, stop_now, wait_until

SOON = 5.0
CONNECTIONS = "/sys/fs/fuse/connections"
_WRITER = """
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print("open", flush=True)
sys.stdin.readline()
os.write(file, b"x" * 4096)
"""


@contextmanager
def ended_by_force(mount: Mount) -> Iterator[Mount]:
    """Whatever still waits for the mount after the block goes on."""
    try:
        yield mount
    finally:
        if is_mounted(mount.path):
            subprocess.run(["umount", "--force", "--lazy", mount.path], check=False)


def pid_of(mount: Mount) -> int:
    assert mount.process is not None
    return mount.process.pid


def guard_of(pid: int) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and b"guard_process" in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:  # it has ended
            continue
    raise AssertionError(f"nobody guards process {pid}")


def is_running(pid: int) -> bool:
    """Not so for one that has ended, and of which nobody has asked with what."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def killed(mount: Mount) -> None:
    assert mount.process is not None
    mount.process.kill()
    mount.process.wait(SOON)


@pytest.fixture
def forgetting(sidecar: Sidecar, mount: Mount, stack: ExitStack) -> subprocess.Popen[bytes]:
    """An rmdir that waits for the sidecar, while the daemon waits for it: to have the kernel forget the name."""
    stack.enter_context(ended_by_force(mount))
    directory = mount.path / "one" / "new"
    directory.mkdir()
    stack.enter_context(hanging(sidecar))
    tool = stack.enter_context(background("rmdir", directory))
    wait_until(lambda: is_in_kernel_at(pid_of(mount), "fuse_reverse_inval_entry"), "it makes the kernel forget")
    return tool


def test_nobody_waits_for_a_daemon_that_was_killed_while_it_had_a_name_forgotten(
    forgetting: subprocess.Popen[bytes], mount: Mount
) -> None:
    guard = guard_of(pid_of(mount))
    killed(mount)
    _, said = forgetting.communicate(timeout=SOON)
    assert b"Software caused connection abort" in said
    assert message_of("ls", mount.path) == "Transport endpoint is not connected"
    run("umount", mount.path)
    wait_until(lambda: not is_running(guard), "its guard has ended", SOON)


def test_signals_that_are_meant_for_the_daemon_do_not_end_its_guard(
    forgetting: subprocess.Popen[bytes], mount: Mount
) -> None:
    """Ctrl-C at a terminal, the stop of a service: they come before the death."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(guard_of(pid_of(mount)), number)
    killed(mount)
    assert forgetting.wait(SOON) == 1


def test_a_mount_whose_daemon_was_killed_then_can_be_made_again(
    forgetting: subprocess.Popen[bytes], sidecar: Sidecar, mount: Mount
) -> None:
    killed(mount)
    sidecar.signal(signal.SIGCONT)
    mount.start()
    assert names(mount.path) == {"one", "two", "three"}


def test_nobody_waits_for_a_daemon_that_was_killed_while_its_datastore_hangs(tmp_path: Path, stack: ExitStack) -> None:
    datastore = stack.enter_context(loop_mount(tmp_path / "xfs", 320 << 20, ("mkfs.xfs", "-q")))
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={datastore}"))
    mount = stack.enter_context(ended_by_force(stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))))
    (mount.path / "one" / "new").mkdir()
    command = [sys.executable, "-c", _WRITER, str(mount.path / "one" / "new" / "a.vmdk")]
    writer = stack.enter_context(subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True))
    stack.callback(writer.kill)
    assert writer.stdin is not None and writer.stdout is not None
    assert writer.stdout.readline() == "open\n"
    run("fsfreeze", "--freeze", datastore)
    try:
        writer.stdin.write("go on\n")
        writer.stdin.flush()
        wait_until(lambda: is_in_kernel_at(pid_of(mount), "vfs_write"), "the daemon writes")
        assert mount.process is not None
        mount.process.kill()
        _, said = writer.communicate(timeout=SOON)
        assert "Software caused connection abort" in said
    finally:
        run("fsfreeze", "--unfreeze", datastore)
    assert mount.process.wait(SOON) == -signal.SIGKILL


@pytest.mark.parametrize("options", ["", "auto_unmount"])
def test_a_late_guard_ends_nothing_but_what_it_guards(options: str, sidecar: Sidecar, tmp_path: Path) -> None:
    """The next mount has the number of the one before, unless others were faster."""
    with Mount(tmp_path / "mnt", sidecar.address, options=options) as mount:
        guard = guard_of(pid_of(mount))
        os.kill(guard, signal.SIGSTOP)
        try:
            killed(mount)
            mount.start()
        finally:
            os.kill(guard, signal.SIGCONT)
        wait_until(lambda: not is_running(guard), "it has ended", SOON)
        assert names(mount.path) == {"one", "two", "three"}


def ended(mount: Mount) -> None:
    assert mount.stop() == 0


def unmounted(mount: Mount) -> None:
    run("fusermount3", "-u", mount.path)
    assert mount.process is not None
    assert mount.process.wait(20) == 0


@pytest.mark.parametrize("end", [ended, unmounted, killed])
def test_the_guard_ends_with_its_daemon(end: Callable[[Mount], None], mount: Mount) -> None:
    guard = guard_of(pid_of(mount))
    end(mount)
    wait_until(lambda: not is_running(guard), "it has ended", SOON)


def test_the_guard_keeps_nothing_of_the_daemon_open(mount: Mount) -> None:
    guard = Path(f"/proc/{guard_of(pid_of(mount))}")
    switch = f"/{os.minor(os.stat(mount.path).st_dev)}/abort"

    def opened() -> set[str]:
        return {os.readlink(each).partition(":[")[0].removeprefix(CONNECTIONS) for each in (guard / "fd").iterdir()}

    wait_until(lambda: opened() == {"socket", "/dev/null", switch}, f"it has what it needs, not {opened()}", SOON)
    assert os.readlink(guard / "cwd") == "/"


def test_a_start_that_waits_for_a_daemon_which_is_killed_then_goes_on(
    sidecar: Sidecar, mount: Mount, stack: ExitStack
) -> None:
    stack.enter_context(ended_by_force(mount))
    first, again = mount.process, Mount(mount.path, sidecar.address)
    assert first is not None
    stop_now(first)
    starting = threading.Thread(target=lambda: stack.enter_context(again))
    starting.start()
    wait_until(lambda: again.process is not None, "it is started")
    wait_until(lambda: is_in_kernel_at(pid_of(again), "fuse_statfs"), "it asks the mount that is there")
    first.kill()
    starting.join(20)
    assert again.process is not None and again.process.poll() is None
