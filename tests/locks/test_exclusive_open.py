"""What is the ESX locks' own; what they share with the others is in test_conformance."""

import errno
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sidecar.errors import LockTimeout
from sidecar.locks.exclusive_open import O_EXCLUSIVE_LOCK, ExclusiveOpen
from sidecar.locks.files import FileLocks
from sidecar.locks.interface import LockHolder
from tests.locks.support import LOCK, esx_open


def test_a_system_that_ignores_the_flag_gives_no_lock_to_anybody(root: Path, root_fd: int) -> None:
    # This one, Linux: two would hold the lock, and neither would know.
    locks = FileLocks(root_fd, ExclusiveOpen())
    for _ in range(2):
        with pytest.raises(OSError, match="this system has no exclusive open") as caught:
            locks.acquire(LOCK, "try", 0)
        assert caught.value.errno == errno.ENOLCK
        assert caught.value.filename == LOCK


def test_the_flags_are_those_of_esx_and_the_name_is_written_in_one_block(root: Path, root_fd: int) -> None:
    asked: list[int] = []
    emulated = esx_open()

    def recording(path: str, flags: int, mode: int, *, dir_fd: int) -> int:
        asked.append(flags)
        return emulated(path, flags, mode, dir_fd=dir_fd)

    with FileLocks(root_fd, ExclusiveOpen(recording)).acquire(LOCK, "touch ab", 0):
        assert O_EXCLUSIVE_LOCK == 0x10000000
        assert all(flags & 0x10000000 and flags & os.O_DIRECT for flags in asked)
        content = (root / LOCK).read_bytes()
        assert len(content) == 4096
        holder = LockHolder.from_bytes(content)
        assert holder is not None
        assert (holder.pid, holder.operation) == (os.getpid(), "touch ab")


def test_where_nobody_else_can_read_a_locked_file_its_holder_is_unknown(root_fd: int) -> None:
    locks = FileLocks(root_fd, ExclusiveOpen(esx_open(readable=False)))
    with locks.acquire(LOCK, "touch ab", 0):
        with pytest.raises(LockTimeout, match="is held by a process that left no name, since"):
            locks.acquire(LOCK, "try", 0)
        holder = locks.holder(LOCK)
        assert holder is not None
        assert holder.process == "unknown"
        assert abs(holder.since - datetime.now(UTC)) < timedelta(minutes=5)
    locks.acquire(LOCK, "again", 0).release()


def test_a_holder_that_lets_go_while_we_read_its_name_is_unknown(root: Path, root_fd: int) -> None:
    def refuse(path: str, flags: int, mode: int, *, dir_fd: int) -> int:
        (root / LOCK).unlink(missing_ok=True)
        raise OSError(errno.EBUSY if flags & O_EXCLUSIVE_LOCK else errno.ENOENT, "refused")

    (root / LOCK).touch()
    holder = FileLocks(root_fd, ExclusiveOpen(refuse)).holder(LOCK)
    assert holder is not None
    assert holder.process == "unknown"


def test_a_holder_s_name_that_cannot_be_read_for_another_reason_is_an_error(root: Path, root_fd: int) -> None:
    def fail(path: str, flags: int, mode: int, *, dir_fd: int) -> int:
        raise OSError(errno.EBUSY if flags & O_EXCLUSIVE_LOCK else errno.EIO, "refused")

    locks = FileLocks(root_fd, ExclusiveOpen(fail))
    for attempt in (lambda: locks.acquire(LOCK, "try", 0), lambda: locks.holder(LOCK)):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EIO
