"""Locks that lie on the datastore: a lock file that its holder opened and removes. What all kinds of them share.

The rules that keep it to one holder:

- The lock is what the system grants on the open file, not the file: one that a dead process left behind is taken.
- Only the holder unlinks the file, and does so before letting go. So whoever gets the lock may have got it on a file
  that is no longer at the path, while a third creates and locks a new one. After getting it, and before believing it,
  the file is compared with the one at the path; they differ: start again.
- Each kind has one error that means "held". All others say nothing about who holds the lock, and are raised.
- The lock belongs to the open file: each attempt opens its own, so two threads exclude each other as two processes
  do, and the system lets go when the holder dies.
"""

import errno
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self

from sidecar.beneath import open_beneath, open_directory_beneath, parent_of
from sidecar.errors import LockTimeout
from sidecar.locks.directories import PATIENCE_SECONDS, DirectoryLocks, what_to_do
from sidecar.locks.identity import Identity, process_name
from sidecar.locks.interface import MAX_HOLDER_BYTES, HeldLock, LockHolder, LockPath

FIRST_WAIT, LONGEST_WAIT = 0.001, 0.1  # seconds between two tries: doubles from one to the other
# Who asks for the holder of a lock that nobody holds has it for microseconds, and longer when its thread is not run:
# nobody is refused because of that.
ASKED_SECONDS = 0.2
TRIES_AT_A_MOVING_PATH = 32

OPEN_TO_READ = os.O_RDONLY | os.O_NONBLOCK  # should a FIFO stand at the path, opening it does not hang

_log = logging.getLogger(__name__)


class LockKind(Protocol):
    """One way to get a file for oneself alone. Threads may share it.

    Every method raises OSError for what does not mean "held", and leaves no descriptor open then.
    """

    def take(self, root_fd: int, path: LockPath) -> int | LockHolder:
        """The lock file's descriptor, locked, and made when there was no file; or who has it."""

    def holder(self, root_fd: int, path: LockPath) -> LockHolder | None:
        """Who has the lock file; None when nobody has. FileNotFoundError when there is no such file."""

    def is_at(self, root_fd: int, path: LockPath, fd: int) -> bool:
        """Whether the file that is open and locked is the one at the path."""

    def write(self, fd: int, content: bytes) -> None:
        """Puts the holder's name into the lock file, which is empty, for others to read."""

    def let_go(self, fd: int) -> None:
        """Unlocks what is closed next, also where a forked child has a copy of the descriptor."""


class FileLocks:
    """The locks of one kind, of the datastore whose root directory is open as `root_fd`, which outlives this object.

    `directories` frees what hosts without a path have left, by its own rules: their locks are directories. `monotonic`
    and `wait` (seconds) are the clock of the timeout, `now` that of the holder's `since`.
    """

    def __init__(
        self,
        root_fd: int,
        kind: LockKind,
        directories: DirectoryLocks | None = None,
        *,
        host: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._root_fd = root_fd
        self._kind = kind
        self._directories = directories
        self._host = host or socket.gethostname()
        self._monotonic = monotonic
        self._wait = wait
        self._now = now

    def acquire(
        self, path: LockPath, operation: str, timeout: float, check: Callable[[], None] = lambda: None
    ) -> HeldLock:
        """See DatastoreLocks. A parent or a lock file that is a symbolic link is refused (OSError)."""
        began = self._monotonic()
        delay = FIRST_WAIT
        while isinstance(taken := self._try_once(path), LockHolder):
            patience = PATIENCE_SECONDS if taken.ended else ASKED_SECONDS
            left = began + max(timeout, patience) - self._monotonic()
            if left <= 0:
                advice = "try again when that is done, or end that process if it hangs (its lock goes with it)"
                if self._holder_in_directory(path):
                    advice = what_to_do(taken)
                raise LockTimeout(
                    f"lock {self._full_path(path)} is held by {taken}; gave up after {timeout:g} s: {advice}"
                )
            self._wait(min(delay, left))
            check()
            delay = min(2 * delay, LONGEST_WAIT)
        held = _HeldFileLock(self._root_fd, self._kind, path, taken)
        try:
            self._write_holder(taken, LockHolder(self._host, os.getpid(), process_name(), operation, self._now()))
        except BaseException:
            held.release()
            raise
        return held

    def holder(self, path: LockPath) -> LockHolder | None:
        """See DatastoreLocks."""
        try:
            if holder := self._holder_in_directory(path):
                return self._directories.holder(path) if self._directories else holder
            return self._kind.holder(self._root_fd, path)
        except FileNotFoundError:
            return None

    def _try_once(self, path: LockPath) -> int | LockHolder:
        """The descriptor of the lock file, locked and at its path; or who holds it."""
        # The limit is for a file system whose inode numbers do not last: there, no lock is better than a false one.
        for _ in range(TRIES_AT_A_MOVING_PATH):
            try:
                taken = self._kind.take(self._root_fd, path)
            except IsADirectoryError:
                if (holder := self._holder_in_directory(path)) is None:
                    raise
                if self._directories and (holder := self._directories.free_ended(path)) is None:
                    continue
                return holder
            if isinstance(taken, LockHolder):
                return taken
            keep = False
            try:
                if not stat.S_ISREG(os.fstat(taken).st_mode):
                    raise OSError(errno.EISDIR, "the lock file is not a regular file", path)
                keep = self._kind.is_at(self._root_fd, path, taken)
                if keep:
                    return taken
            finally:
                if not keep:
                    os.close(taken)
        return LockHolder.unknown(self._now())

    def _holder_in_directory(self, path: LockPath) -> LockHolder | None:
        """Who has a lock that is a directory, as hosts without a path to the datastore make them; None for no such."""
        try:
            fd = open_directory_beneath(self._root_fd, path)
        except (NotADirectoryError, FileNotFoundError):
            return None
        try:
            names = os.listdir(fd)
            if not names and not self._is_at(path, fd):
                return LockHolder.unknown(self._now())  # let go of since it was opened
            if len(names) != 1 or Identity.parse(names[0]) is None:
                return None
            file = open_beneath(fd, names[0], OPEN_TO_READ)
            try:
                return read_holder(file)
            finally:
                os.close(file)
        except FileNotFoundError:
            return LockHolder.unknown(self._now())  # just let go of
        finally:
            os.close(fd)

    def _is_at(self, path: LockPath, fd: int) -> bool:
        with parent_of(self._root_fd, path) as (directory_fd, name):
            return os.path.samestat(os.stat(name, dir_fd=directory_fd, follow_symlinks=False), os.fstat(fd))

    def _write_holder(self, fd: int, holder: LockHolder) -> None:
        try:
            # Not a new file, which is empty: ext4 writes out what was truncated when it is closed, and the holder would
            # wait for the disk to let go of it.
            if os.fstat(fd).st_size:
                os.ftruncate(fd, 0)
            self._kind.write(fd, holder.to_bytes())
        except OSError as error:
            # Deleting on a full datastore has to work: the lock is held, only its holder stays unnamed.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _full_path(self, path: LockPath) -> str:
        try:
            return f"{os.readlink(f'/proc/self/fd/{self._root_fd}')}/{path}"
        except OSError:
            return path


class _HeldFileLock:
    def __init__(self, root_fd: int, kind: LockKind, path: LockPath, fd: int) -> None:
        self._root_fd = root_fd
        self._kind = kind
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
                    self._kind.let_go(fd)
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


def read_holder(fd: int) -> LockHolder:
    """Who wrote the lock file last, which is open to read; an unknown when it does not say so."""
    holder = LockHolder.from_bytes(os.pread(fd, MAX_HOLDER_BYTES + 1, 0))
    return holder or LockHolder.unknown(datetime.fromtimestamp(os.fstat(fd).st_mtime, UTC))
