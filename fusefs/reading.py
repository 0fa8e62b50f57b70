"""Reading files of images: from the datastore itself where this host sees it, else from the sidecar.

Never over stale data: a reader belongs to one generation of a file (inode, time, size). A local file is opened only
if it is that one; a remote one is read only while the index says that it still is.
"""

import enum
import errno
import fcntl
import logging
import os
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from fusefs.errors import errno_of, fail
from fusefs.holding import Hold, Holding
from fusefs.provenance import Generation
from fusefs.tree import IndexedDatastore, IndexedFile, IndexedImage
from sidecar.client import ImageFile, ImageRef, SidecarClient, Staging
from sidecar.errors import DatastoreNotFound, FileNotInImage, ImageInUse, ImageNotFound, ImagesError

_log = logging.getLogger(__name__)

# QEMU's byte for readers of an image: whoever asks for a write lock on the file learns that it is in use.
READER_BYTE = 100
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid

_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)
_CLONE_RANGE = struct.Struct("=qQQQ")  # source descriptor, its offset, length, offset
_CANNOT_SHARE = {errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.ENOSYS}
_CANNOT_SHARE_THIS = {errno.EINVAL, errno.EPERM, errno.ETXTBSY}

_FIRST_WINDOW = 1 << 20
_LARGEST_WINDOW = 8 << 20


class Reader(Protocol):
    """An open file of an image."""

    closed: bool

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills the buffer from `offset` on; returns how many bytes that were."""

    def seek(self, offset: int, whence: int) -> int:
        """The next data or hole at or after `offset`; OSError with ENXIO when there is none."""

    def equals(self, data: memoryview, offset: int) -> bool:
        """Whether the file has these bytes there; False once it is closed, and where it cannot be read.

        For requests of another open file, which are not to fail with this one.
        """

    def close(self) -> None: ...


class Shared(enum.Enum):
    """Whether extents are shared; where they are not, nothing was changed."""

    THIS = enum.auto()
    NOT_THIS = enum.auto()  # not made of whole blocks, or the source is closed
    NONE = enum.auto()  # the file systems cannot


class LocalReader:
    """The file itself, locked as in use while it is open."""

    def __init__(self, path: str, generation: Generation) -> None:
        """Opens the file; FileNotFoundError when the path leads to another one, or to one that is being purged."""
        self._closing = threading.Lock()  # held by whoever uses the file for another one's request
        self.closed = False
        self._compared = bytearray()  # kept: new memory for each large request costs more than reading into it
        # O_NONBLOCK: a FIFO that took the place of the file would be waited for, by an unmount too, for ever.
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _lock_shared(self._fd, path)
            # Looked at only now: from here on nobody can take the file away unnoticed.
            status = os.stat(path, follow_symlinks=False)
            opened = os.fstat(self._fd)
            if (status.st_dev, status.st_ino) != (opened.st_dev, opened.st_ino) or not _is(opened, generation):
                raise FileNotFoundError(errno.ENOENT, "not the file that the sidecar knows", path)
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def seek(self, offset: int, whence: int) -> int:
        with self._closing:
            if self.closed:
                fail(errno.EBADF)
            # The descriptor's own position is used by nobody.
            return os.lseek(self._fd, offset, whence)

    def equals(self, data: memoryview, offset: int) -> bool:
        with self._closing:
            if self.closed:
                return False
            buffer = self._compared if len(self._compared) == len(data) else bytearray(len(data))
            if len(buffer) > len(self._compared):
                self._compared = buffer
            try:
                read = os.preadv(self._fd, [buffer], offset)
            except OSError as error:
                _log.warning("not compared offset=%s cause=%s", offset, error)
                return False
            # The bytearray goes first: a memoryview would compare one number after the other.
            return read == len(data) and buffer == data

    def share(self, target: int, offset: int, length: int) -> Shared:
        """Gives a range of the file to the same place of the open file `target`, by sharing extents: no byte moves."""
        with self._closing:
            if self.closed:
                return Shared.NOT_THIS
            try:
                fcntl.ioctl(target, _FICLONERANGE, _CLONE_RANGE.pack(self._fd, offset, length, offset))
            except OSError as error:
                if error.errno in _CANNOT_SHARE:
                    return Shared.NONE
                if error.errno in _CANNOT_SHARE_THIS:
                    return Shared.NOT_THIS
                raise
            return Shared.THIS

    def close(self) -> None:
        with self._closing:
            self.closed = True
            os.close(self._fd)


class _Window(NamedTuple):
    """A part of a file."""

    start: int
    data: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def has(self, offset: int) -> bool:
        return self.start <= offset < self.end


_NOTHING = _Window(0, b"")


class RemoteReader:
    """A file read through the sidecar, a growing window ahead of a reader that goes through it in order.

    `check` raises when the file is not the one that was opened any more, as far as the index knows. `generation` is
    what the sidecar is to compare it with, which knows of a change before the index does; None for a staged file.
    """

    def __init__(
        self,
        client: SidecarClient,
        source: ImageRef | Staging,
        name: Callable[[], str],
        size: Callable[[], int],
        check: Callable[[], None] = lambda: None,
        generation: Generation | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._source = source
        self._name = name
        self._size = size
        self._check = check
        self._expected = expected_file(generation) if generation is not None else None
        self._on_close = on_close
        self._lock = threading.Lock()  # guards the windows
        # The last one, and the one before: what a copier writes has been read some time ago.
        self._windows = (_NOTHING, _NOTHING)
        self._length = _FIRST_WINDOW
        self.closed = False

    def read(self, size: int, offset: int) -> bytes:
        with self._lock:
            return self._read(offset, min(offset + size, self._size()))

    def read_into(self, buffer: memoryview, offset: int) -> int:
        data = self.read(len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int) -> int:
        return seek_without_holes(self._size(), offset, whence)

    def equals(self, data: memoryview, offset: int) -> bool:
        with self._lock:
            if self.closed or offset + len(data) > self._size():
                return False
            try:
                return self._read(offset, offset + len(data)) == bytes(data)
            except (OSError, ImagesError) as error:
                _log.warning("not compared file=%s offset=%s cause=%s", self._name(), offset, error)
                return False

    def forget(self) -> None:
        """Drops what was read ahead: the file was written to."""
        with self._lock:
            self._windows = (_NOTHING, _NOTHING)

    def close(self) -> None:
        self.forget()
        self.closed = True
        self._on_close()

    def _read(self, offset: int, end: int) -> bytes:
        self._check()
        parts = []
        while offset < end:
            window = next((each for each in self._windows if each.has(offset)), None) or self._fetch(offset, end)
            part = window.data[offset - window.start : end - window.start]
            if not part:
                break
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def _fetch(self, offset: int, end: int) -> "_Window":
        in_order = offset == self._windows[0].end
        self._length = min(self._length * 2, _LARGEST_WINDOW) if in_order else _FIRST_WINDOW
        length = min(max(self._length, end - offset), self._size() - offset)
        window = bytearray(length)
        got = 0
        answers = self._client.read_file(self._source, self._name(), offset, length, expected=self._expected)
        for answer in answers:
            at = answer.offset - offset
            window[at : at + len(answer.data)] = answer.data
            got = max(got, at + len(answer.data), at + answer.hole_bytes)
        self._check()
        fetched = _Window(offset, bytes(window[:got]))
        self._windows = (fetched, self._windows[0])
        return fetched


# What tells that a path is another host's, or another image's by now. Whatever else keeps a file from being opened here
# makes reading slow, and the image is not seen to be in use: somebody should know.
NOT_FROM_HERE = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ESTALE}


# What a file is that the sidecar cannot hold any more, as to who opens it by path.
_GONE = (ImageNotFound, FileNotInImage, DatastoreNotFound, ImageInUse)


class Opener:
    """Opens files of images, which are in use for as long as they are open. Safe to share between threads."""

    def __init__(self, client: SidecarClient, holding: Holding) -> None:
        self._client = client
        self._holding = holding

    def open(
        self,
        datastore: IndexedDatastore,
        image: IndexedImage,
        file: IndexedFile,
        current: Callable[[], Generation | None],
    ) -> Reader:
        """A reader of the image's file; `current` is the generation that the index shows at its path now.

        Raises OSError: FileNotFoundError when the file is known to be gone, ESTALE when it is another one by now.
        """
        root = datastore.info.root_path
        if root and file.inode:
            path = os.path.join(root, image.directory, file.name)
            try:
                return LocalReader(path, file.generation)
            except OSError as error:
                # Another host's path, or not ours to read; a purged image's file is not there for the sidecar either.
                level = logging.DEBUG if error.errno in NOT_FROM_HERE else logging.WARNING
                _log.log(level, "not opened locally, reading by way of the sidecar path=%s cause=%s", path, error)

        what = f"{datastore.name}/{image.image_id}/{file.name}"

        def check() -> None:
            if current() != file.generation:
                fail(errno.ESTALE, f"{what} is not the file that was opened")

        ref = ImageRef(datastore=datastore.name, image_id=image.image_id)
        # Before anything is read: what is gone by then is refused.
        hold = self._hold(ref, file, what)
        return RemoteReader(
            self._client,
            ref,
            lambda: file.name,
            lambda: file.size,
            check,
            file.generation,
            lambda: self._holding.release(hold),
        )

    def _hold(self, ref: ImageRef, file: IndexedFile, what: str) -> Hold:
        try:
            return self._holding.hold(ref, file.name, expected_file(file.generation))
        except _GONE as error:
            raise FileNotFoundError(errno.ENOENT, error.message, what) from error
        except ImagesError as error:
            raise OSError(errno_of(error), error.message, what) from error


def expected_file(generation: Generation) -> ImageFile:
    """As the sidecar is told which file is meant."""
    file = ImageFile(inode=generation.inode, size_bytes=generation.size)
    file.modify_time.FromNanoseconds(generation.modified_ns)
    return file


def seek_without_holes(size: int, offset: int, whence: int) -> int:
    """What lseek answers for a file of which only the size is known."""
    if not 0 <= offset < size:
        fail(errno.ENXIO)
    return size if whence == os.SEEK_HOLE else offset


def _is(status: os.stat_result, generation: Generation) -> bool:
    return generation == (status.st_ino, status.st_mtime_ns, status.st_size)


def _lock_shared(fd: int, path: str) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, READER_BYTE, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise FileNotFoundError(errno.ENOENT, "the image is being purged", path) from None
        _log.warning("use of the file cannot be noted: file system without locks path=%s cause=%s", path, error)
