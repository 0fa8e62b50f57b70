"""Open files and directories of a posix datastore, and what is done with whole files and trees by their descriptors."""

import errno
import os
import stat
from collections.abc import Sequence

from sidecar.beneath import open_beneath
from sidecar.datastores.faults import Faults
from sidecar.datastores.interface import Entry, EntryKind, ReadableFile, Transfer
from sidecar.datastores.through import copy_through
from sidecar.datastores.transfer import data_in, punch_hole, transfer_range
from sidecar.datastores.writers import Writers
from sidecar.errors import InvalidRequest

_CLONE_PIECE = 256 * 1024 * 1024  # bytes cloned between two looks at cancellation
_TRIES = 8  # to remove a directory in which there is something new each time
_DEEPEST = 64  # directories in one another that are removed: each one takes a descriptor


class PosixDirectory:
    """An open directory of a posix datastore."""

    def __init__(self, faults: Faults, path: str, fd: int) -> None:
        self._faults, self._path, self._fd = faults, path, fd

    def entry(self) -> Entry:
        with self._faults.during("look at", self._path):
            return make_entry("", os.fstat(self._fd))

    def names(self) -> list[str]:
        with self._faults.during("list", self._path):
            return os.listdir(self._fd)

    def entries(self) -> list[Entry]:
        found = []
        with self._faults.during("list", self._path):
            for name in os.listdir(self._fd):
                try:
                    found.append(make_entry(name, os.stat(name, dir_fd=self._fd, follow_symlinks=False)))
                except FileNotFoundError:
                    continue
        return found

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        path = f"{self._path}/{name}"
        with self._faults.during("read", path):
            fd = open_regular(self._faults, self._fd, name, os.O_RDONLY)
            try:
                return os.pread(fd, length, offset)
            finally:
                os.close(fd)

    def close(self) -> None:
        os.close(self._fd)


class PosixReadable:
    """An open file of a posix datastore; its shared lock goes with the descriptor."""

    def __init__(self, faults: Faults, path: str, fd: int) -> None:
        self._faults, self._path, self.fd = faults, path, fd
        status = os.fstat(fd)
        self.inode = status.st_ino
        self.modified_ns = status.st_mtime_ns
        self.size = status.st_size

    def read(self, offset: int, length: int) -> bytes:
        with self._faults.during("read", self._path):
            return os.pread(self.fd, length, offset)

    def data_ranges(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        with self._faults.during("read", self._path):
            return data_in(self.fd, offset, length)

    def require_same(self) -> None:
        """What is open is that file, whatever is at its path."""

    def close(self) -> None:
        os.close(self.fd)


class PosixWritable:
    """A staged file of a posix datastore that is being written. `writers`: see transfer_range."""

    def __init__(self, faults: Faults, path: str, fd: int, writers: Writers) -> None:
        self._faults, self._path, self._fd, self._writers = faults, path, fd, writers

    def write(self, offset: int, data: bytes) -> None:
        with self._faults.during("write", self._path):
            write_all(self._fd, data, offset)

    def make_hole(self, offset: int, length: int) -> None:
        with self._faults.during("write", self._path):
            if self.size() < offset + length:
                os.ftruncate(self._fd, offset + length)
            # Also beyond what was the end: XFS allocates there in advance, and it would stay with the image.
            punch_hole(self._fd, offset, length)

    def resize(self, size: int) -> None:
        with self._faults.during("write", self._path):
            os.ftruncate(self._fd, size)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def sync(self) -> None:
        with self._faults.during("write to the disk", self._path):
            os.fsync(self._fd)

    def clone(self, source: ReadableFile, source_offset: int, offset: int, length: int, transfer: Transfer) -> int:
        if not isinstance(source, PosixReadable):
            return copy_through(source, source_offset, self, offset, length, transfer)
        done = 0
        while done < length:
            piece = min(_CLONE_PIECE, length - done)
            with self._faults.during("copy to", self._path):
                moved = transfer_range(
                    source.fd, source_offset + done, self._fd, offset + done, piece, transfer, self._writers
                )
            if not moved:
                break
            done += moved
        return done

    def close(self) -> None:
        with self._faults.during("write to the disk", self._path):  # NFS writes what is left, and says so here
            os.close(self._fd)


def open_regular(faults: Faults, directory: int, path: str, flags: int) -> int:
    """Opens what is at `path` beneath an open directory; InvalidRequest when it is no regular file."""
    # O_NONBLOCK: opening a FIFO that somebody planted must not hang.
    fd = open_beneath(directory, path, flags | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidRequest(f"{faults.name}: {path} is not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_entry(name: str, status: os.stat_result) -> Entry:
    mode = status.st_mode
    kind = EntryKind.FILE if stat.S_ISREG(mode) else EntryKind.DIRECTORY if stat.S_ISDIR(mode) else EntryKind.OTHER
    return Entry(
        name,
        kind,
        status.st_size,
        status.st_blocks * 512,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_nlink,
    )


def read_up_to(fd: int, limit: int) -> bytes:
    """What is left of an open file, `limit` bytes at most."""
    parts: list[bytes] = []
    left = limit
    while left > 0 and (part := os.read(fd, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def write_all(fd: int, data: bytes, offset: int = 0) -> None:
    """Writes all of it, in as many steps as the kernel takes."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def remove_tree(parent: int, name: str, depth: int = _DEEPEST) -> int:
    """Removes what is at `name`, following no link; another remover meanwhile is no error. Returns allocated bytes.

    What is put into a directory while it is removed goes too, unless more comes again and again.

    InvalidRequest when directories are nested deeper than `depth`: no image's are.
    """
    if not depth:
        raise InvalidRequest(f"{name}: directories nested deeper than {_DEEPEST} are not removed; remove them by hand")
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        return _remove_file(parent, name)
    freed = 0
    try:
        for last in (False,) * (_TRIES - 1) + (True,):
            freed += sum(remove_tree(fd, child, depth - 1) for child in os.listdir(fd))
            try:
                os.rmdir(name, dir_fd=parent)
                break
            except FileNotFoundError:
                break
            except OSError as error:
                # Who looks whether somebody has it, as a reap does, puts a lock file into it for a moment.
                if error.errno != errno.ENOTEMPTY or last:
                    raise
    finally:
        os.close(fd)
    return freed


def _remove_file(parent: int, name: str) -> int:
    try:
        allocated = os.stat(name, dir_fd=parent, follow_symlinks=False).st_blocks * 512
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return 0
    return allocated
