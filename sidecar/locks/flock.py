"""The locks of POSIX file systems, NFS of Linux among them: flock on the lock file. EWOULDBLOCK means held."""

import errno
import fcntl
import os
from collections.abc import Callable

from sidecar.beneath import open_beneath
from sidecar.locks.files import OPEN_TO_READ, read_holder
from sidecar.locks.interface import LockHolder, LockPath


class Flock:
    """See LockKind. `flock` is the system call."""

    def __init__(self, flock: Callable[[int, int], None] = fcntl.flock) -> None:
        self._flock = flock

    def take(self, root_fd: int, path: LockPath) -> int | LockHolder:
        fd = open_beneath(root_fd, path, os.O_RDWR | os.O_CREAT)
        keep = False
        try:
            keep = self._lock_now(fd, fcntl.LOCK_EX)
            return fd if keep else read_holder(fd)
        finally:
            if not keep:
                os.close(fd)

    def holder(self, root_fd: int, path: LockPath) -> LockHolder | None:
        # Not from /proc/locks: that has neither other hosts nor processes of other containers.
        fd = open_beneath(root_fd, path, OPEN_TO_READ)
        try:
            if not self._lock_now(fd, fcntl.LOCK_SH):
                return read_holder(fd)
            fcntl.flock(fd, fcntl.LOCK_UN)
            return None
        finally:
            os.close(fd)

    def is_at(self, root_fd: int, path: LockPath, fd: int) -> bool:
        # By opening it anew, from the root: over NFS a stat may be answered from this host's cache, an open asks the
        # server; and a parent directory may have been moved away together with the lock file.
        try:
            at_path = open_beneath(root_fd, path, OPEN_TO_READ)
        except FileNotFoundError:
            return False
        try:
            return os.path.sameopenfile(at_path, fd)
        finally:
            os.close(at_path)

    def write(self, fd: int, content: bytes) -> None:
        os.pwrite(fd, content, 0)
        # NFS sends it to the server, for the other hosts to read, when any copy of the descriptor is closed.
        os.close(os.dup(fd))

    def let_go(self, fd: int) -> None:
        # Not left to close: a forked child's copy of the descriptor would keep the lock.
        fcntl.flock(fd, fcntl.LOCK_UN)

    def _lock_now(self, fd: int, kind: int) -> bool:
        """Whether the flock was got; raises every error that does not mean "held"."""
        try:
            self._flock(fd, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            return False
        return True
