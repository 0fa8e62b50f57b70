"""Moving the bytes of one file to another on this host: shared extents, else in the kernel, else through memory.

Holes stay holes at every stage. The order is that of images on disk today: a clone costs nothing and takes no space,
copy_file_range keeps the bytes out of this process, reading and writing works everywhere.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct

from sidecar.datastores.interface import Transfer

CHUNK = 8 * 1024 * 1024  # bytes between two looks at cancellation
FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)
_CANNOT_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
_CANNOT_COPY_IN_KERNEL = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS}
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
_SYNC_FILE_RANGE_WRITE = 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def data_ranges(fd: int, offset: int, length: int) -> list[tuple[int, int]]:
    """The (offset, length) of what is not a hole in that range; all of it where the file system cannot tell."""
    end = min(offset + length, os.fstat(fd).st_size)
    ranges = []
    position = offset
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole up to the end of the file
                break
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return [(offset, end - offset)]
            raise
        if start >= end:
            break
        position = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        ranges.append((start, position - start))
    return ranges


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Makes the range, up to the end of the file, read as zeroes; writes them where the file system cannot punch."""
    length = min(offset + length, os.fstat(fd).st_size) - offset
    if length <= 0:
        return
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) == 0:
        return
    problem = ctypes.get_errno()
    if problem not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(problem, os.strerror(problem))
    zeroes = bytes(min(length, CHUNK))
    while length > 0:
        written = os.pwrite(fd, zeroes[:length], offset)
        offset, length = offset + written, length - written


def transfer_range(
    source: int, source_offset: int, destination: int, offset: int, length: int, transfer: Transfer
) -> int:
    """Makes a range of one open file equal to one of another; returns the bytes done, fewer at the source's end."""
    length = min(length, os.fstat(source).st_size - source_offset)
    if length <= 0:
        return 0
    if _clone(source, source_offset, destination, offset, length):
        transfer.advance(length, cloned=length)
        return length
    shift = offset - source_offset
    position = source_offset
    for start, size in data_ranges(source, source_offset, length):
        if start > position:
            punch_hole(destination, position + shift, start - position)
            transfer.advance(start - position)
        _copy_data(source, start, destination, start + shift, size, transfer)
        position = start + size
    end = source_offset + length
    if position < end:
        punch_hole(destination, position + shift, end - position)
        transfer.advance(end - position)
    if os.fstat(destination).st_size < end + shift:
        os.ftruncate(destination, end + shift)
    return length


def can_clone(directory: int) -> bool:
    """Whether files of the file system that an open directory is on can share extents; tried on unnamed files."""
    with contextlib.ExitStack() as stack:
        try:
            files = []
            for _ in range(2):
                fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
                stack.callback(os.close, fd)
                files.append(fd)
            os.write(files[0], b"x" * 4096)
            return _clone(files[0], 0, files[1], 0, 4096)
        except OSError:
            return False  # the answer only spares a space check: a copy tries again by itself


def _clone(source: int, source_offset: int, destination: int, offset: int, length: int) -> bool:
    try:
        fcntl.ioctl(destination, FICLONERANGE, struct.pack("=qQQQ", source, source_offset, length, offset))
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def _copy_data(source: int, source_offset: int, destination: int, offset: int, length: int, transfer: Transfer) -> None:
    in_kernel = True
    done = 0
    while done < length:
        wanted = min(CHUNK, length - done)
        moved = 0
        if in_kernel:
            try:
                moved = os.copy_file_range(source, destination, wanted, source_offset + done, offset + done)
            except OSError as error:
                if error.errno not in _CANNOT_COPY_IN_KERNEL:
                    raise
            # Some file systems answer 0 instead of an error; what is left is read, which tells the two apart.
            in_kernel = moved > 0
        if not moved:
            block = os.pread(source, wanted, source_offset + done)
            if not block:
                raise OSError(errno.EIO, "the source file ended before its size")
            view = memoryview(block)
            while moved < len(block):
                moved += os.pwrite(destination, view[moved:], offset + done + moved)
        # Start writing back now: the fsync at the end then waits for the last chunk, not for the whole disk.
        _libc.sync_file_range(destination, offset + done, moved, _SYNC_FILE_RANGE_WRITE)
        done += moved
        transfer.advance(moved)
