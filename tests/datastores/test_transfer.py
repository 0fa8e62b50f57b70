"""Ranges of files, moved on real file systems: the same bytes, the same holes, whatever the way."""

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.datastores import transfer
from sidecar.datastores.writers import LEAST, MOST, Writers
from sidecar.errors import OperationCancelled
from sidecar.images.progress import Progress
from tests.support.disks import MIB, allocated, digest, pseudo_random
from tests.support.processes import loop_mount, run

SIZE = 48 * MIB + 777
# Aligned and large, small, and one that ends with the file in the middle of a sector.
DATA = ((0, 17 * MIB), (20 * MIB, 4096), (24 * MIB + 4096, 3 * MIB), (46 * MIB, 2 * MIB + 777))


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that cannot clone, on a block device."""
    directory = tmp_path_factory.mktemp("ext4")
    with loop_mount(directory, 256 * MIB, ("mkfs.ext4", "-q", "-m", "0")) as mountpoint:
        with (mountpoint / "source").open("wb") as file:
            for offset, length in DATA:
                file.seek(offset)
                file.write(pseudo_random(length, offset))
        yield mountpoint


def move(source: Path, target: Path, progress: Progress, *, start: int = 0, offset: int = 0, length: int = SIZE) -> int:
    source_fd = os.open(source, os.O_RDONLY)
    target_fd = os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        return transfer.transfer_range(source_fd, start, target_fd, offset, length, progress, Writers())
    finally:
        os.close(source_fd)
        os.close(target_fd)


def in_page_cache(path: Path) -> int:
    return int(run("fincore", "--bytes", "--noheadings", "--output", "RES", path).stdout)


@pytest.fixture
def target(ext4: Path) -> Iterator[Path]:
    path = ext4 / "target"
    yield path
    path.unlink(missing_ok=True)


def test_a_copy_has_the_bytes_and_the_holes_of_its_source(ext4: Path, target: Path) -> None:
    progress = Progress()
    assert move(ext4 / "source", target, progress) == SIZE
    assert digest(target) == digest(ext4 / "source")
    assert allocated(target) < allocated(ext4 / "source") + 64 * 1024  # the map of its extents may be larger
    assert progress.amount.done == SIZE


def test_a_large_copy_does_not_push_out_of_the_cache_what_running_vms_read(ext4: Path, target: Path) -> None:
    move(ext4 / "source", target, Progress())
    assert in_page_cache(target) < 1 * MIB


@pytest.mark.parametrize(
    ("start", "offset"), [(0, 4096), (4096, 0), (100, 100), (0, 100), (100, 0), (4096, 512), (16 * MIB, 1)]
)
def test_a_range_that_fits_no_sector_arrives_whole_and_where_it_belongs(
    ext4: Path, target: Path, start: int, offset: int
) -> None:
    target.write_bytes(b"\xff" * (32 * MIB))
    length = 9 * MIB + 13
    assert move(ext4 / "source", target, Progress(), start=start, offset=offset, length=length) == length
    wanted, found = (ext4 / "source").read_bytes()[start : start + length], target.read_bytes()
    assert found[offset : offset + length] == wanted
    assert set(found[:offset]) <= {0xFF}
    assert set(found[offset + length :]) == {0xFF}


def test_a_file_that_takes_no_direct_io_is_copied_all_the_same(ext4: Path) -> None:
    target = Path("/dev/shm") / f"transfer-{os.getpid()}"
    try:
        assert move(ext4 / "source", target, Progress()) == SIZE
        assert digest(target) == digest(ext4 / "source")
    finally:
        target.unlink(missing_ok=True)


def test_a_cancelled_copy_stops_within_a_chunk(ext4: Path, target: Path) -> None:
    progress = Progress()
    progress.cancel()
    with pytest.raises(OperationCancelled):
        move(ext4 / "source", target, progress)
    assert progress.amount.done <= transfer.CHUNK


def test_a_full_disk_is_told_as_that(ext4: Path, tmp_path: Path) -> None:
    with (
        loop_mount(tmp_path, 16 * MIB, ("mkfs.ext4", "-q", "-m", "0")) as small,
        pytest.raises(OSError, match="No space left"),
    ):
        move(ext4 / "source", small / "target", Progress())


def test_a_source_that_cannot_be_mapped_is_copied_all_the_same(
    ext4: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert move(ext4 / "source", target, Progress()) == SIZE
    assert digest(target) == digest(ext4 / "source")


def test_copies_to_one_device_share_what_one_may_write_at_a_time() -> None:
    writers = Writers()
    with writers.writing(1) as first, writers.writing(2) as elsewhere:
        assert first() == elsewhere() == MOST
        with writers.writing(1) as second:
            assert first() + second() <= MOST
            with contextlib.ExitStack() as stack:
                shares = [first, second, *(stack.enter_context(writers.writing(1)) for _ in range(14))]
                assert sum(share() for share in shares) <= MOST
                more = [stack.enter_context(writers.writing(1)) for _ in range(100)]
                assert {share() for share in more} == {LEAST}
        assert first() == elsewhere() == MOST
