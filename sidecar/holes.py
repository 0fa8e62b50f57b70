"""Where a file has data, and where it has holes, which read as zeroes and take no space."""

import errno
import os
from collections.abc import Callable, Iterator

Seek = Callable[[int, int], int]

_CANNOT_TELL = {errno.EINVAL, errno.EOPNOTSUPP}


def data_ranges(seek: Seek, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The [start, end) of what is not a hole, in order, out of that range; all of it where the file system cannot tell.

    `seek` is lseek on the file: an offset, and SEEK_DATA or SEEK_HOLE. `end` is at most the file's size. Raises OSError
    when it fails: an I/O error is no hole.
    """
    position = start
    while position < end:
        try:
            found = seek(position, os.SEEK_DATA)
            after = seek(found, os.SEEK_HOLE) if found < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole up to the end of the file
                return
            if error.errno not in _CANNOT_TELL:
                raise
            found, after = position, end
        if found >= end:
            return
        position = min(after, end)
        yield found, position


def seek_in(fd: int) -> Seek:
    """`seek` of an open file."""
    return lambda offset, whence: os.lseek(fd, offset, whence)
