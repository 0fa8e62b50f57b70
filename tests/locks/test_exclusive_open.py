"""What is the ESX locks' own; what they share with the others is in test_conformance."""

import contextlib
import errno
import os
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sidecar.datastores.posix import PosixDatastore
from sidecar.errors import DatastoreUnavailable, ImagesError, LockTimeout, NoSpace
from sidecar.images.copying import copy_image
from sidecar.images.deletion import delete_image, purge_image, restore_image
from sidecar.images.layouts import LAYOUTS as LAYOUT_KINDS
from sidecar.images.locked import held_locks
from sidecar.images.progress import Progress
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from sidecar.locks.exclusive_open import O_EXCLUSIVE_LOCK, ExclusiveOpen
from sidecar.locks.files import FileLocks
from sidecar.locks.interface import LockHolder
from tests.locks.support import LOCK, esx_open
from tests.support.places import LAYOUTS, Place, flat_files


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


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.items())
def test_images_live_under_these_locks_in_every_layout(tmp_path: Path, name: str, layout: str) -> None:
    place = Place(name, layout, tmp_path / name)
    place.plant("a")
    with ExitStack() as stack:
        # Two sidecars, as on two hosts.
        one, other = (stack.enter_context(contextlib.closing(vmfs(place))) for _ in range(2))
        here, there = (ImageStore(datastore, LAYOUT_KINDS[layout]) for datastore in (one, other))
        copy_image(here, "a", here, "b", Progress())
        with StagingDirectory(here, "new", "import"), here.lock("a", "touch"):
            assert [(held.staging, held.holder.operation) for held in held_locks(there)] == [
                (False, "touch a"),
                (True, "import new"),
            ]
            with pytest.raises(LockTimeout, match=r"pid \d+ on .* for touch a, since"):
                delete_image(there, "a", lock_timeout=0)
        assert held_locks(there) == []
        delete_image(there, "a")
        restore_image(here, "a")
        delete_image(here, "b")
        purge_image(there, "b")
    place.assert_holds({"a": flat_files("a")})


def vmfs(place: Place) -> PosixDatastore:
    return PosixDatastore(place.name, str(place.root), "vmfs", ExclusiveOpen(esx_open()))


@pytest.mark.parametrize(
    ("error", "raised"),
    [(errno.EIO, DatastoreUnavailable), (errno.ESTALE, DatastoreUnavailable), (errno.ENOSPC, NoSpace)],
)
def test_what_the_storage_says_instead_of_held_is_the_datastore_s_error(
    root: Path, error: int, raised: type[ImagesError]
) -> None:
    def fail() -> None:
        raise OSError(error, os.strerror(error))

    (root / LOCK).touch()
    with contextlib.closing(PosixDatastore("one", str(root), "vmfs", ExclusiveOpen(esx_open(fail)))) as datastore:
        for call in (lambda: datastore.lock(LOCK, "try", 0), lambda: datastore.lock_holder(LOCK)):
            with pytest.raises(raised, match=os.strerror(error)):
                call()
