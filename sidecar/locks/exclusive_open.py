"""The locks of datastores on ESX (VMFS, NFS, VSAN): a lock file that is opened exclusively. EBUSY means held.

ESX knows an open flag of its own for that, and holds the lock for as long as the descriptor is open. Direct I/O is part
of it: what the holder writes is on the datastore at once, for the other hosts to read.

Linux does not know the flag, and ignores it without a word: everyone would be a holder. So what the flag promises is
looked at once: a file that was opened exclusively has to be refused to a second open.
"""

import errno
import mmap
import os
from datetime import UTC, datetime

from sidecar.beneath import OpenCall, open_beneath, parent_of
from sidecar.locks.files import OPEN_TO_READ, read_holder
from sidecar.locks.interface import LockHolder, LockPath

O_EXCLUSIVE_LOCK = 0x10000000

# Direct I/O takes whole blocks, from memory that is aligned to them. A holder's name fits: MAX_HOLDER_BYTES.
_BLOCK_BYTES = 4096

_EXCLUSIVELY = os.O_RDWR | os.O_DIRECT | O_EXCLUSIVE_LOCK


class ExclusiveOpen:
    """See LockKind. `system_open` is the system call that opens a lock file, exclusively or to read it."""

    def __init__(self, system_open: OpenCall = os.open) -> None:
        self._open = system_open
        self._heeded = False  # the system is known to refuse the second of two exclusive opens

    def take(self, root_fd: int, path: LockPath) -> int | LockHolder:
        fd = self._open_exclusively(root_fd, path, os.O_CREAT)
        if fd is None:
            return self._read_holder(root_fd, path)
        try:
            self._require_heeded(root_fd, path, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def holder(self, root_fd: int, path: LockPath) -> LockHolder | None:
        fd = self._open_exclusively(root_fd, path)
        if fd is None:
            return self._read_holder(root_fd, path)
        os.close(fd)
        return None

    def is_at(self, root_fd: int, path: LockPath, fd: int) -> bool:
        # Not by another open: while the file is locked, the system may refuse any.
        try:
            with parent_of(root_fd, path) as (directory_fd, name):
                return os.path.samestat(os.stat(name, dir_fd=directory_fd, follow_symlinks=False), os.fstat(fd))
        except FileNotFoundError:
            return False

    def write(self, fd: int, content: bytes) -> None:
        with mmap.mmap(-1, _BLOCK_BYTES) as block:  # begins with a page
            block.write(content.ljust(_BLOCK_BYTES))
            os.pwrite(fd, block, 0)

    def let_go(self, fd: int) -> None:
        """Closing does. A forked child's copy keeps a file that is not at the path any more, and is nobody's lock."""

    def _open_exclusively(self, root_fd: int, path: LockPath, more: int = 0) -> int | None:
        """None when somebody else has it open so; raises every error that does not mean that."""
        try:
            return open_beneath(root_fd, path, _EXCLUSIVELY | more, system_open=self._open)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return None

    def _require_heeded(self, root_fd: int, path: LockPath, fd: int) -> None:
        """Raises ENOLCK when the file, which is open exclusively, can be opened so once more."""
        if self._heeded:
            return
        try:
            second = self._open_exclusively(root_fd, path)
        except FileNotFoundError:
            return  # unlinked after it was opened: it is no lock, and tells nothing
        if second is None:
            self._heeded = True
            return
        try:
            if os.path.sameopenfile(second, fd):  # else another one came to its path meanwhile
                raise OSError(errno.ENOLCK, 'this system has no exclusive open; on Linux, use locks = "flock"', path)
        finally:
            os.close(second)

    def _read_holder(self, root_fd: int, path: LockPath) -> LockHolder:
        """Of a file that somebody has open exclusively: what it says, where the system lets others read it."""
        try:
            fd = open_beneath(root_fd, path, OPEN_TO_READ, system_open=self._open)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT):
                raise
            return LockHolder.unknown(self._last_change(root_fd, path))
        try:
            return read_holder(fd)
        finally:
            os.close(fd)

    def _last_change(self, root_fd: int, path: LockPath) -> datetime:
        try:
            with parent_of(root_fd, path) as (directory_fd, name):
                modified = os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mtime
                return datetime.fromtimestamp(modified, UTC)
        except FileNotFoundError:  # just let go of
            return datetime.now(UTC)
