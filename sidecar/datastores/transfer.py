"""Moving the bytes of one file to another on this host: shared extents, else in the kernel, else through memory.

Holes stay holes at every stage. The order is by cost. A clone is nothing and takes no space. Direct I/O from the
source's pages in the cache copies no byte in memory, and leaves in the cache what running VMs read: on ext4, 2 GiB took
0.5 s, of it 0.1 s of a processor, where copy_file_range took 1.1 s and 0.7 s. copy_file_range lets a file server do it.
Reading and writing works everywhere.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable

from sidecar.datastores.interface import Transfer
from sidecar.datastores.writers import Writers
from sidecar.holes import data_ranges, seek_in

CHUNK = 16 * 1024 * 1024  # bytes between two looks at cancellation
FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)
_CANNOT_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
_CANNOT_COPY_IN_KERNEL = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS}
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
_SYNC_FILE_RANGE_WRITE = 0x02
_DIRECT_UNIT = mmap.ALLOCATIONGRANULARITY  # a page: no device has larger sectors
_DIRECT_MINIMUM = 256 * 1024  # below, preparing it costs more than it saves
_READ_AHEAD = 256 * 1024  # of one advice; of larger ones some devices read only the beginning
# Direct I/O that this file system, device or memory does not do, and a fault in the source, which reading it will name.
_CANNOT_WRITE_DIRECTLY = {errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT, errno.EIO, errno.EAGAIN}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def data_in(fd: int, offset: int, length: int) -> list[tuple[int, int]]:
    """The (offset, length) of what is not a hole in that range of an open file; all of it where nobody can tell."""
    end = min(offset + length, os.fstat(fd).st_size)
    return [(start, stop - start) for start, stop in data_ranges(seek_in(fd), offset, end)]


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
    source: int,
    source_offset: int,
    destination: int,
    offset: int,
    length: int,
    transfer: Transfer,
    writers: Writers,
) -> int:
    """Makes a range of one open file equal to one of another; returns the bytes done, fewer at the source's end.

    `writers`: all copies that it shares the disk with.
    """
    length = min(length, os.fstat(source).st_size - source_offset)
    if length <= 0:
        return 0
    if _clone(source, source_offset, destination, offset, length):
        transfer.advance(length, cloned=length)
        return length
    shift = offset - source_offset
    position = source_offset
    for start, size in data_in(source, source_offset, length):
        if start > position:
            punch_hole(destination, position + shift, start - position)
            transfer.advance(start - position)
        _copy_data(source, start, destination, start + shift, size, transfer, writers)
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


def _copy_data(
    source: int,
    source_offset: int,
    destination: int,
    offset: int,
    length: int,
    transfer: Transfer,
    writers: Writers,
) -> None:
    done = _copy_directly(source, source_offset, destination, offset, length, transfer, writers)
    in_kernel = True
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


def _copy_directly(
    source: int,
    source_offset: int,
    destination: int,
    offset: int,
    length: int,
    transfer: Transfer,
    writers: Writers,
) -> int:
    """Writes the source's pages past the page cache; returns the bytes done, fewer or 0 where that cannot be.

    What is left is for the other ways, which also say what was wrong.
    """
    length -= length % _DIRECT_UNIT
    if length < _DIRECT_MINIMUM or source_offset % _DIRECT_UNIT or offset % _DIRECT_UNIT:
        return 0
    # Not on a block device of its own: a file server may copy by itself, and btrfs or tmpfs gain nothing.
    if os.major(os.fstat(destination).st_dev) == 0:
        return 0
    try:
        # Opened anew: others may write through this descriptor at the same time, and not in whole sectors.
        direct = os.open(f"/proc/self/fd/{destination}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        with writers.writing(os.fstat(destination).st_dev) as piece:
            return _write_pieces(source, source_offset, direct, offset, length, piece, transfer)
    finally:
        os.close(direct)


def _write_pieces(
    source: int,
    source_offset: int,
    direct: int,
    offset: int,
    length: int,
    piece: Callable[[], int],
    transfer: Transfer,
) -> int:
    """Bytes done, fewer where direct writes are not made. `piece`: how many may be written at a time, as of now."""
    done = advised = 0
    while done < length:
        # The next chunk is read while this one is written; without, a cold source is read a few pages at a time.
        while advised < min(done + 2 * CHUNK, length):
            os.posix_fadvise(source, source_offset + advised, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
            advised += _READ_AHEAD
        moved = _write_pages(source, source_offset + done, direct, offset + done, min(piece(), length - done))
        done += moved
        transfer.advance(moved)
        if not moved or moved % _DIRECT_UNIT:
            break
    return done


def _write_pages(source: int, source_offset: int, direct: int, offset: int, length: int) -> int:
    """One direct write from the source's pages; 0 when it cannot be made.

    Only the kernel reads the pages, so what is wrong with one is an error here and never a signal.
    """
    try:
        mapped = mmap.mmap(source, length, prot=mmap.PROT_READ, offset=source_offset)
    except (OSError, ValueError):  # not on this file system, or the source is shorter by now
        return 0
    with mapped as pages:
        try:
            return os.pwrite(direct, pages, offset)
        except OSError as error:
            if error.errno in _CANNOT_WRITE_DIRECTLY:
                return 0
            raise
