"""A datastore's root with a directory for lock files; no test leaves a descriptor open."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.locks.support import open_descriptors


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path


@pytest.fixture
def root_fd(root: Path) -> Iterator[int]:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    before = open_descriptors()
    yield fd
    assert open_descriptors() == before, "a descriptor was leaked"
    os.close(fd)
