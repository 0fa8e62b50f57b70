"""Where a file has data: every byte of it, and no error is taken for a hole."""

import errno
import os
from pathlib import Path

import pytest

from sidecar.holes import data_ranges, seek_in

MIB = 1024**2


def test_the_data_and_not_the_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        os.pwrite(file.fileno(), b"a" * MIB, 4 * MIB)
        os.pwrite(file.fileno(), b"b" * MIB, 12 * MIB)
        file.truncate(20 * MIB)
        found = seek_in(file.fileno())
        assert list(data_ranges(found, 0, 20 * MIB)) == [(4 * MIB, 5 * MIB), (12 * MIB, 13 * MIB)]
        assert list(data_ranges(found, 4 * MIB + 10, 12 * MIB + 10)) == [
            (4 * MIB + 10, 5 * MIB),
            (12 * MIB, 12 * MIB + 10),
        ]
        assert list(data_ranges(found, 6 * MIB, 11 * MIB)) == []
        assert list(data_ranges(found, 14 * MIB, 20 * MIB)) == []


def test_an_error_is_not_taken_for_a_hole() -> None:
    """The rest of the disk would be imported, or copied, as zeroes."""

    def failing(offset: int, whence: int) -> int:
        if offset >= 100:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return 0 if whence == os.SEEK_DATA else 100

    with pytest.raises(OSError, match="Input/output error"):
        list(data_ranges(failing, 0, 200))


def test_all_is_data_where_the_file_system_cannot_tell() -> None:
    def unable(offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    assert list(data_ranges(unable, 10, 200)) == [(10, 200)]
