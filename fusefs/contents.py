"""The bytes of a staged file: in the staging directory itself where this host may write there, else over the wire."""

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from fusefs.errors import fail
from fusefs.pulse import Pulse
from fusefs.reading import NOT_FROM_HERE, LocalReader, Reader, RemoteReader, Shared
from sidecar.client import SidecarClient, Staging
from sidecar.errors import (
    DatastoreUnavailable,
    DeadlineExceeded,
    FileNotInImage,
    InternalError,
    OperationCancelled,
    SidecarUnavailable,
    StagingNotFound,
)

_log = logging.getLogger(__name__)

_SPACE_CHECK_BYTES = 16 << 20
_CLOSED = -1
# After these nobody knows: FileNotInImage is the answer to a request that is repeated, too.
_MAY_BE_DONE = (
    DatastoreUnavailable,
    DeadlineExceeded,
    FileNotInImage,
    InternalError,
    OperationCancelled,
    SidecarUnavailable,
)
_WRITE_BACK_BYTES = 512 << 10


class Status(NamedTuple):
    size: int
    allocated: int
    modified_ns: int
    inode: int = 0  # of the file in the datastore; 0: not known


class NamesUnknownError(OSError):
    """A change of a name was sent to the sidecar, and nobody knows whether it was made."""


class Content(Protocol):
    """The bytes of one staged file."""

    block_size: int  # what is shared begins at a multiple of it
    shares: bool  # whether it may be that something can be shared

    def status(self) -> Status: ...
    def read(self, size: int, offset: int) -> bytes: ...
    def write(self, data: memoryview, offset: int) -> None: ...
    def share(self, source: Reader, offset: int, length: int) -> bool:
        """Takes a range from the same place of an image's file without moving a byte; False where that cannot be."""

    def truncate(self, size: int) -> None: ...
    def allocate(self, offset: int, length: int) -> None: ...
    def seek(self, offset: int, whence: int) -> int: ...
    def sync(self) -> None: ...
    def set_times(self, accessed_ns: int, modified_ns: int) -> None: ...
    def changed_elsewhere(self) -> None:
        """The sidecar wrote to the file."""

    def close(self) -> None: ...


class Place(Protocol):
    """Where the files of one staging directory are made."""

    def create(self, name: str) -> Content: ...
    def remove(self, name: str) -> None: ...
    def rename(self, old: str, new: str) -> None:
        """In place of a file that has the new name. NamesUnknownError, where an answer may be lost."""

    def close(self) -> None: ...


class LocalPlace:
    """The staging directory of the sidecar, on this host.

    Its name is the sidecar's, and random: where a directory of that name is, it is that one.
    """

    def __init__(self, path: str, room_for_images: Callable[[int], int]) -> None:
        """`room_for_images` tells from a descriptor how many bytes are left. OSError when one cannot write there."""
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._room_for_images = room_for_images
        if not os.access(path, os.W_OK | os.X_OK):
            self.close()
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    def create(self, name: str) -> Content:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return LocalContent(os.open(name, flags, 0o644, dir_fd=self._fd), self._room_for_images)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._fd)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def close(self) -> None:
        self._fd = _closed(self._fd)


class LocalContent:
    def __init__(self, fd: int, room_for_images: Callable[[int], int]) -> None:
        self._fd = fd
        self._room_for_images = room_for_images
        self._unchecked_room = 0  # bytes that may be written before the room is looked at again
        self.block_size = os.fstatvfs(fd).f_bsize
        self.shares = True  # until it was tried in vain: most file systems cannot

    def status(self) -> Status:
        status = os.fstat(self._fd)
        return Status(status.st_size, status.st_blocks * 512, status.st_mtime_ns, status.st_ino)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def write(self, data: memoryview, offset: int) -> None:
        self._check_space(len(data))
        self._give_back_beyond_end(offset)
        start = offset
        while data:
            done = os.pwrite(self._fd, data, offset)
            data = data[done:]
            offset += done
        if offset - start >= _WRITE_BACK_BYTES:
            # What is dirty begins to be written back (and stays cached): publishing then waits for the last write only.
            os.posix_fadvise(self._fd, start, offset - start, os.POSIX_FADV_DONTNEED)

    def share(self, source: Reader, offset: int, length: int) -> bool:
        if not (self.shares and isinstance(source, LocalReader)):
            return False
        self._give_back_beyond_end(offset)
        shared = source.share(self._fd, offset, length)
        self.shares = shared is not Shared.NONE
        return shared is Shared.THIS

    def truncate(self, size: int) -> None:
        self._give_back_beyond_end(size)
        # Of the size that it has: XFS would write zeroes behind its end, and the last block would be shared no more.
        if os.fstat(self._fd).st_size != size:
            os.ftruncate(self._fd, size)

    def allocate(self, offset: int, length: int) -> None:
        if self._room_for_images(self._fd) < length:
            fail(errno.ENOSPC, "only the datastore's reserve is left")
        os.posix_fallocate(self._fd, offset, length)

    def seek(self, offset: int, whence: int) -> int:
        return os.lseek(self._fd, offset, whence)

    def sync(self) -> None:
        os.fsync(self._fd)

    def set_times(self, accessed_ns: int, modified_ns: int) -> None:
        os.utime(self._fd, ns=(accessed_ns, modified_ns))

    def changed_elsewhere(self) -> None:
        pass  # the same file

    def close(self) -> None:
        self._fd = _closed(self._fd)

    def _give_back_beyond_end(self, offset: int) -> None:
        """Before the file goes on after a gap: the file system frees what it allocated beyond the end in advance.

        XFS does that for files that grow, as much as they have; in the gap, it would stay with the image.
        """
        size = os.fstat(self._fd).st_size
        if size < offset:
            os.ftruncate(self._fd, size)

    def _check_space(self, coming: int) -> None:
        """The datastore's reserve is not for images; the file system itself would let us have it."""
        if self._unchecked_room < coming:
            room = self._room_for_images(self._fd)
            if room < coming:
                fail(errno.ENOSPC, "only the datastore's reserve is left")
            self._unchecked_room = min(room, max(coming, _SPACE_CHECK_BYTES))
        self._unchecked_room -= coming


class RemotePlace:
    """A staging directory on the sidecar's host. Names are made and changed one at a time."""

    def __init__(self, client: SidecarClient, pulse: Pulse, staging: Staging) -> None:
        self._client = client
        self._pulse = pulse
        self._staging = staging
        self._contents: dict[str, RemoteContent] = {}

    def create(self, name: str) -> Content:
        self._pulse.require()
        self._staging.write_file(name, [], size=0)
        self._contents[name] = RemoteContent(self._client, self._staging, name)
        return self._contents[name]

    def remove(self, name: str) -> None:
        self._pulse.require()
        # Removed, and not told so; or all that was staged is gone.
        with _names_known(), contextlib.suppress(FileNotInImage, StagingNotFound):
            self._staging.remove_file(name)
        self._contents.pop(name).renamed("")

    def rename(self, old: str, new: str) -> None:
        self._pulse.require()
        with _names_known():
            self._staging.rename_file(old, new)
        if replaced := self._contents.pop(new, None):
            replaced.renamed("")
        self._contents[new] = self._contents.pop(old)
        self._contents[new].renamed(new)

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _names_known() -> Iterator[None]:
    try:
        yield
    except _MAY_BE_DONE as error:
        raise NamesUnknownError(error.errno, error.message) from error


class RemoteContent:
    block_size = 4096  # of no account
    shares = False

    def __init__(self, client: SidecarClient, staging: Staging, name: str) -> None:
        self._staging = staging
        self._name = name
        self._lock = threading.Lock()  # guards _size
        self._size = 0
        self._modified_ns = time.time_ns()
        self._reader = RemoteReader(client, staging, self._current_name, lambda: self._size)

    def renamed(self, name: str) -> None:
        """The file has that name now; none when it was removed."""
        self._name = name

    def _current_name(self) -> str:
        # By its name, who still has it open would get, or make, another file.
        return self._name or fail(errno.ESTALE, "the file was removed where it is staged, on another host")

    def status(self) -> Status:
        return Status(self._size, self._size, self._modified_ns)

    def read(self, size: int, offset: int) -> bytes:
        return self._reader.read(size, offset)

    def write(self, data: memoryview, offset: int) -> None:
        with self._lock:
            self._note_size(self._staging.write_file(self._current_name(), [(offset, bytes(data))]).size_bytes)

    def share(self, source: Reader, offset: int, length: int) -> bool:
        return False

    def truncate(self, size: int) -> None:
        with self._lock:
            self._note_size(self._staging.write_file(self._current_name(), [], size=size).size_bytes)

    def allocate(self, offset: int, length: int) -> None:
        fail(errno.EOPNOTSUPP)

    def seek(self, offset: int, whence: int) -> int:
        return self._reader.seek(offset, whence)

    def sync(self) -> None:
        pass  # publishing makes it durable

    def set_times(self, accessed_ns: int, modified_ns: int) -> None:
        self._modified_ns = modified_ns

    def changed_elsewhere(self) -> None:
        with self._lock:
            self._note_size(self._staging.write_file(self._current_name(), []).size_bytes)

    def close(self) -> None:
        self._reader.close()

    def _note_size(self, size: int) -> None:
        self._size = size
        self._modified_ns = time.time_ns()
        self._reader.forget()


def _closed(fd: int) -> int:
    """Closes a descriptor, once; what stands for it then is none, while its number may soon be another file's."""
    if fd != _CLOSED:
        os.close(fd)
    return _CLOSED


def open_place(client: SidecarClient, pulse: Pulse, staging: Staging, root_path: str, reserve_bytes: int) -> Place:
    """The staging directory as a place to write to: its own path when it can be reached from here."""

    def room_for_images(fd: int) -> int:
        status = os.fstatvfs(fd)
        return status.f_bavail * status.f_frsize - reserve_bytes

    if root_path and staging.directory:
        path = os.path.join(root_path, staging.directory)
        try:
            return LocalPlace(path, room_for_images)
        except OSError as error:
            level = logging.DEBUG if error.errno in NOT_FROM_HERE else logging.WARNING
            _log.log(level, "not opened locally, writing by way of the sidecar path=%s cause=%s", path, error)
    return RemotePlace(client, pulse, staging)
