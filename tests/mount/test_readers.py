"""A file that is read directly is the one that the index shows, or it is not read."""

import os
from pathlib import Path

import pytest

from fusefs.provenance import Generation
from fusefs.reading import LocalReader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a-flat.vmdk"
    path.write_bytes(b"first")
    return path


def generation_of(path: Path) -> Generation:
    status = path.stat()
    return Generation(status.st_ino, status.st_mtime_ns, status.st_size)


def test_reads_the_file_that_is_known(path: Path) -> None:
    reader = LocalReader(str(path), generation_of(path))
    assert reader.read(100, 1) == b"irst"
    reader.close()


def test_a_file_that_was_changed_in_its_place_is_not_taken_for_the_known_one(path: Path) -> None:
    known = generation_of(path)
    path.write_bytes(b"other")
    os.utime(path, ns=(known.modified_ns, known.modified_ns + 1))
    assert generation_of(path)._replace(modified_ns=known.modified_ns) == known
    with pytest.raises(FileNotFoundError):
        LocalReader(str(path), known)


def test_a_file_that_was_replaced_is_not_taken_for_the_known_one(path: Path) -> None:
    known = generation_of(path)
    kept = path.rename(path.with_name("kept"))
    path.write_bytes(b"other")
    os.utime(path, ns=(known.modified_ns, known.modified_ns))
    with pytest.raises(FileNotFoundError):
        LocalReader(str(path), known)
    assert kept.read_bytes() == b"first"


def test_a_source_that_cannot_be_read_is_not_equal_and_fails_nobody_elses_write(path: Path) -> None:
    """What is compared with it would not be written, and its writer would go on behind a gap."""
    reader = LocalReader(str(path), generation_of(path))
    assert reader.equals(memoryview(b"first"), 0)
    unreadable = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(unreadable, reader._fd)
    os.close(unreadable)
    assert not reader.equals(memoryview(b"first"), 0)
    reader.close()
    assert not reader.equals(memoryview(b"first"), 0)
