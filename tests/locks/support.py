"""The kinds of datastore lock as the tests use them, and other processes that hold one."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sidecar
from sidecar.beneath import OpenCall
from sidecar.locks.exclusive_open import O_EXCLUSIVE_LOCK, ExclusiveOpen
from sidecar.locks.files import LockKind
from sidecar.locks.flock import Flock
from sidecar.locks.interface import HeldLock

REPOSITORY = Path(sidecar.__file__).parents[1]
LOCK = "images/ab.ec_lock"

# Holds a lock until its stdin ends. Arguments: the kind, the root, the path.
HOLD = """
import os, sys
from sidecar.locks.files import FileLocks
from tests.locks.support import KINDS
_, kind, root, path = sys.argv
locks = FileLocks(os.open(root, os.O_RDONLY), KINDS[kind].make(), host="otherhost")
held = locks.acquire(path, "copy image ab", 10)
print("held", flush=True)
sys.stdin.read()
held.release()
"""


def nothing() -> None: ...


def flock(before: Callable[[], None] = nothing, after: Callable[[], None] = nothing) -> LockKind:
    """The real one. `before` is what happens between the open of the lock file and its flock, `after` after that."""

    def call(fd: int, operation: int) -> None:
        before()
        fcntl.flock(fd, operation)
        after()

    return Flock(call)


def esx_open(
    before: Callable[[], None] = nothing, after: Callable[[], None] = nothing, *, readable: bool = True
) -> OpenCall:
    """open(2) as ESX has it: the flag excludes every second exclusive open, and unless `readable` all others too.

    Made with the kernel's flock. `before` comes between the open and the exclusion, `after` after that.
    """

    def call(path: str, flags: int, mode: int, *, dir_fd: int) -> int:
        exclusive = bool(flags & O_EXCLUSIVE_LOCK)
        fd = os.open(path, flags & ~O_EXCLUSIVE_LOCK, mode, dir_fd=dir_fd)
        try:
            if exclusive:
                assert flags & os.O_DIRECT
                before()
            if exclusive or not readable:
                _exclude(fd)
            if exclusive:
                after()
        except BaseException:
            os.close(fd)
            raise
        return fd

    return call


def _exclude(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY)) from None


def exclusive_open(before: Callable[[], None] = nothing, after: Callable[[], None] = nothing) -> LockKind:
    return ExclusiveOpen(esx_open(before, after))


@dataclass(frozen=True)
class Kind:
    """`make` takes what happens before and after the system call that locks; `held` is the errno for "held"."""

    id: str
    make: Callable[..., LockKind]
    held: int


KINDS = {
    kind.id: kind
    for kind in (
        Kind("flock", flock, errno.EWOULDBLOCK),
        Kind("exclusive-open", exclusive_open, errno.EBUSY),
    )
}


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


@contextmanager
def other_process_holding(root: Path, path: str = LOCK, kind: str = "flock") -> Iterator[subprocess.Popen[str]]:
    with start(HOLD, kind, str(root), path) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def forked_with_a_copy_of(held: HeldLock) -> Iterator[None]:
    """A child, forked by us, that has left the lock's block, and keeps a copy of its descriptor until the end."""
    end_read, end_write = os.pipe()
    left_read, left_write = os.pipe()
    copy = os.dup(held._fd)  # type: ignore[attr-defined]  # the child keeps this one, as a library's fork might
    child = os.fork()
    if child == 0:
        try:
            os.close(end_write)
            held.release()
            os.write(left_write, b"x")
            os.read(end_read, 1)
        finally:
            os._exit(0)
    os.close(copy)
    os.read(left_read, 1)
    try:
        yield
    finally:
        for fd in (end_read, end_write, left_read, left_write):
            os.close(fd)
        os.waitpid(child, 0)
