"""Paths stay beneath their root, and no descriptor stays behind."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.beneath import open_beneath, open_directory_beneath, parent_of


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_text("deep")
    (root / "file").write_text("shallow")
    return root


@pytest.fixture
def root_fd(root: Path) -> Iterator[int]:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    before = open_descriptors()
    yield fd
    assert open_descriptors() == before, "a descriptor was leaked"
    os.close(fd)


@pytest.mark.parametrize(("path", "content"), [("file", b"shallow"), ("a/b/file", b"deep")])
def test_opens_a_file_and_nothing_is_inherited(root_fd: int, path: str, content: bytes) -> None:
    fd = open_beneath(root_fd, path, os.O_RDONLY)
    assert os.read(fd, 100) == content
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_creates_with_the_mode(root: Path, root_fd: int) -> None:
    os.close(open_beneath(root_fd, "a/new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    assert (root / "a" / "new").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "/", "/file", "a//file", "a/", "./file", "a/./b", "../outside/secret", "a/../file", "a/b/..", "f\0",
     "\0", "a/\ud800"],
)  # fmt: skip
def test_a_path_that_is_not_plain_is_refused(root_fd: int, path: str) -> None:
    for attempt in (open_beneath, parent_of):
        with pytest.raises(OSError) as caught:
            if attempt is open_beneath:
                open_beneath(root_fd, path, os.O_RDONLY)
            else:
                with parent_of(root_fd, path):
                    pass
        assert caught.value.errno == errno.EINVAL
        assert caught.value.filename == path


@pytest.mark.parametrize("target", ["../outside", "a"])
def test_a_link_planted_as_a_parent_is_refused(root: Path, root_fd: int, target: str) -> None:
    (root / "link").symlink_to(target)
    (root / "a" / "secret").write_text("inside")
    with pytest.raises(NotADirectoryError) as caught:
        open_beneath(root_fd, "link/secret", os.O_RDONLY)
    assert caught.value.filename == "link/secret"
    with pytest.raises(NotADirectoryError):
        open_directory_beneath(root_fd, "link")


@pytest.mark.parametrize("target", ["../outside/secret", "file", "absent"])
def test_a_link_planted_as_the_file_is_refused_and_not_written_through(root: Path, root_fd: int, target: str) -> None:
    (root / "a" / "link").symlink_to(target)
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(OSError) as caught:
            open_beneath(root_fd, "a/link", flags)
        assert caught.value.errno == errno.ELOOP
    assert not (root / "a" / "absent").exists()


def test_errors_name_the_whole_path(root_fd: int) -> None:
    for path in ("a/b/absent", "a/absent/file"):
        with pytest.raises(FileNotFoundError) as caught:
            open_beneath(root_fd, path, os.O_RDONLY)
        assert caught.value.filename == path
    with pytest.raises(NotADirectoryError) as caught_parent, parent_of(root_fd, "file/b/c"):
        pass
    assert caught_parent.value.filename == "file/b/c"


def test_a_directory_can_be_listed_and_synced(root_fd: int) -> None:
    fd = open_directory_beneath(root_fd, "a/b")
    assert os.listdir(fd) == ["file"]
    os.fsync(fd)
    os.close(fd)
    with pytest.raises(NotADirectoryError):
        open_directory_beneath(root_fd, "a/b/file")


def test_the_parent_serves_calls_with_dir_fd(root: Path, root_fd: int) -> None:
    with parent_of(root_fd, "a/b/file") as (directory_fd, name):
        os.rename(name, "renamed", src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        os.fsync(directory_fd)
    assert (root / "a" / "b" / "renamed").exists()


def test_the_root_itself_stays_open(root_fd: int) -> None:
    with parent_of(root_fd, "file") as (directory_fd, name):
        assert (directory_fd, name) == (root_fd, "file")
    os.fstat(root_fd)


def test_an_error_of_the_block_passes_unchanged(root_fd: int) -> None:
    with pytest.raises(FileNotFoundError) as caught, parent_of(root_fd, "a/b/absent") as (directory_fd, name):
        os.unlink(name, dir_fd=directory_fd)
    assert caught.value.filename == "absent"
