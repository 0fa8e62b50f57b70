"""What is the flock locks' own; what they share with the others is in test_conformance."""

import fcntl
from pathlib import Path

from sidecar.locks.files import FileLocks
from sidecar.locks.flock import Flock
from tests.locks.support import LOCK, forked_with_a_copy_of


def test_a_released_file_is_unlocked_though_a_forked_child_has_a_copy_of_the_descriptor(
    root: Path, root_fd: int
) -> None:
    held = FileLocks(root_fd, Flock()).acquire(LOCK, "parent", 0)
    (root / "alias").hardlink_to(root / LOCK)
    with forked_with_a_copy_of(held):
        held.release()
        with (root / "alias").open("rb") as same_file:
            fcntl.flock(same_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
