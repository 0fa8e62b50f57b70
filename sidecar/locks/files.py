"""Locks of POSIX file systems: flock on a lock file that its holder removes.

The rules that keep it to one holder:

- The lock is the flock, not the file: a file that a dead process left behind is simply taken.
- Only the holder unlinks the file, and does so before letting go. So whoever gets the flock may have got it on a file
  that is no longer at the path, while a third creates and locks a new one. After getting it, and before believing it,
  the file's inode is compared with that of the path; they differ: start again.
- EWOULDBLOCK is the only refusal. ENOLCK, EIO and the rest say nothing about who holds the lock, and are raised.
- flock belongs to the open file description: each attempt opens its own, so two threads exclude each other as two
  processes do, and the kernel lets go when the holder dies.
"""

import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from sidecar.beneath import open_beneath, parent_of
from sidecar.errors import LockTimeout
from sidecar.locks.interface import MAX_HOLDER_BYTES, HeldLock, LockHolder, LockPath

FIRST_WAIT, LONGEST_WAIT = 0.001, 0.1  # seconds between two tries: doubles from one to the other
TRIES_AT_A_MOVING_PATH = 32

_OPEN_TO_LOCK = os.O_RDWR | os.O_CREAT
_OPEN_TO_READ = os.O_RDONLY | os.O_NONBLOCK  # should a FIFO stand at the path, opening it does not hang

_log = logging.getLogger(__name__)


class FileLocks:
    """The flock locks of the datastore whose root directory is open as `root_fd`, which outlives this object.

    `monotonic` and `wait` (seconds) are the clock of the timeout, `now` that of the holder's `since`.
    """

    def __init__(
        self,
        root_fd: int,
        *,
        host: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        flock: Callable[[int, int], None] = fcntl.flock,
    ) -> None:
        self._root_fd = root_fd
        self._host = host or socket.gethostname()
        self._monotonic = monotonic
        self._wait = wait
        self._now = now
        self._flock = flock

    def acquire(
        self, path: LockPath, operation: str, timeout: float, check: Callable[[], None] = lambda: None
    ) -> HeldLock:
        """See DatastoreLocks. A parent or a lock file that is a symbolic link is refused (OSError)."""
        deadline = self._monotonic() + timeout
        delay = FIRST_WAIT
        while isinstance(taken := self._try_once(path), LockHolder):
            left = deadline - self._monotonic()
            if left <= 0:
                raise LockTimeout(
                    f"lock {self._full_path(path)} is held by {taken}; gave up after {timeout:g} s: "
                    "try again when that is done, or end that process if it hangs (its lock goes with it)"
                )
            self._wait(min(delay, left))
            check()
            delay = min(2 * delay, LONGEST_WAIT)
        held = _HeldFileLock(self._root_fd, path, taken)
        try:
            _write_holder(taken, LockHolder(self._host, os.getpid(), _process_name(), operation, self._now()))
        except BaseException:
            held.release()
            raise
        return held

    def holder(self, path: LockPath) -> LockHolder | None:
        """Who holds the lock `path` now; None when nobody does, whether or not a file was left behind.

        For showing, not for deciding: it may have changed on return. Raises OSError when the datastore could not say.
        Asking takes a shared flock for a few microseconds: an `acquire` with timeout 0 at that very moment is refused.
        """
        try:
            fd = open_beneath(self._root_fd, path, _OPEN_TO_READ)
        except FileNotFoundError:
            return None
        try:
            if not self._lock_now(fd, fcntl.LOCK_SH):
                return _read_holder(fd)
            fcntl.flock(fd, fcntl.LOCK_UN)
            return None
        finally:
            os.close(fd)

    def _try_once(self, path: LockPath) -> int | LockHolder:
        """The descriptor of the lock file, locked and at its path; or who holds it."""
        # The limit is for a file system whose inode numbers do not last: there, no lock is better than a false one.
        for _ in range(TRIES_AT_A_MOVING_PATH):
            fd = open_beneath(self._root_fd, path, _OPEN_TO_LOCK)
            keep = False
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(errno.EISDIR, "the lock file is not a regular file", path)
                if not self._lock_now(fd, fcntl.LOCK_EX):
                    return _read_holder(fd)
                keep = self._is_at(path, fd)
                if keep:
                    return fd
            finally:
                if not keep:
                    os.close(fd)
        return LockHolder.unknown(self._now())

    def _lock_now(self, fd: int, kind: int) -> bool:
        """Whether the flock was got; raises every error that does not mean "held"."""
        try:
            self._flock(fd, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            return False
        return True

    def _is_at(self, path: LockPath, fd: int) -> bool:
        # By opening it anew, from the root: over NFS a stat may be answered from this host's cache, an open asks the
        # server; and a parent directory may have been moved away together with the lock file.
        try:
            at_path = open_beneath(self._root_fd, path, _OPEN_TO_READ)
        except FileNotFoundError:
            return False
        try:
            return os.path.sameopenfile(at_path, fd)
        finally:
            os.close(at_path)

    def _full_path(self, path: LockPath) -> str:
        try:
            return f"{os.readlink(f'/proc/self/fd/{self._root_fd}')}/{path}"
        except OSError:
            return path


class _HeldFileLock:
    def __init__(self, root_fd: int, path: LockPath, fd: int) -> None:
        self._root_fd = root_fd
        self._path = path
        self._fd: int | None = fd
        self._owner_pid = os.getpid()

    @property
    def path(self) -> LockPath:
        return self._path

    def release(self) -> None:
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            # A forked child has a copy of the lock: when it leaves the block, the lock is still its parent's.
            if os.getpid() == self._owner_pid:
                with self._logged("left behind"):
                    self._unlink(fd)
                with self._logged("not unlocked"):
                    # Not left to close: a forked child's copy of the descriptor would keep the lock.
                    fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            with self._logged("closed with an error"):
                os.close(fd)

    def _unlink(self, fd: int) -> None:
        """Remove the lock file. As long as we hold the lock, nobody puts another at its path: see the rules above."""
        with suppress(FileNotFoundError), parent_of(self._root_fd, self._path) as (directory_fd, name):
            at_path = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
            if os.path.samestat(at_path, os.fstat(fd)):
                os.unlink(name, dir_fd=directory_fd)

    @contextmanager
    def _logged(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _log.warning("lock file %s path=%s error=%s", what, self._path, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _write_holder(fd: int, holder: LockHolder) -> None:
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, holder.to_bytes(), 0)
        # NFS sends it to the server, for the other hosts to read, when any copy of the descriptor is closed.
        os.close(os.dup(fd))
    except OSError as error:
        # Deleting on a full datastore has to work: the lock is held, only its holder stays unnamed.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _read_holder(fd: int) -> LockHolder:
    holder = LockHolder.from_bytes(os.pread(fd, MAX_HOLDER_BYTES + 1, 0))
    return holder or LockHolder.unknown(datetime.fromtimestamp(os.fstat(fd).st_mtime, UTC))


def _process_name() -> str:
    with open("/proc/self/comm", encoding="utf-8", errors="replace") as comm:
        return comm.read().strip()
