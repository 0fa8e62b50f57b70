"""Removing a directory into which somebody puts something meanwhile."""

import errno
import os
from pathlib import Path

import pytest

from sidecar.datastores.posix_files import remove_tree


def remove(parent: Path, name: str) -> int:
    fd = os.open(parent, os.O_RDONLY)
    try:
        return remove_tree(fd, name)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("times", "removed"), [(1, True), (3, True), (100, False)])
def test_a_lock_file_that_a_reap_puts_there_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, removed: bool
) -> None:
    directory = tmp_path / "staging"
    directory.mkdir()
    (directory / "a.vmdk").touch()
    left = times
    rmdir = os.rmdir

    def put_there_and_remove(path: str, *, dir_fd: int | None = None) -> None:
        nonlocal left
        if left:
            left -= 1
            (directory / "lock.ec_lock").touch()
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", put_there_and_remove)
    if removed:
        remove(tmp_path, "staging")
    else:
        with pytest.raises(OSError) as caught:
            remove(tmp_path, "staging")
        assert caught.value.errno == errno.ENOTEMPTY
    assert directory.exists() is not removed
