"""Stopping a sidecar where a test wants it: in the middle of a copy, however fast the disk is."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.crash.support import TIMESTAMP, image_directory, image_lock, staging_directories
from tests.support.disks import MIB, allocated
from tests.support.processes import Sidecar, wait_until


@contextmanager
def held_back(root: Path, layout: str, image_id: str) -> Iterator[None]:
    """Nobody publishes the image before the block ends: its lock is held. A copy can be late, never too early."""
    lock = image_lock(root, layout, image_id)
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def stop_in_the_middle(sidecar: Sidecar, root: Path, layout: str, image_id: str) -> Path | None:
    """Stops the process (SIGSTOP) when some of the image's bytes are staged: the staging directory.

    None when it was too fast and has published the image; see `held_back`.
    """

    def begun() -> bool:
        try:
            return any(allocated(directory) > 4 * MIB for directory in staging_directories(root))
        except FileNotFoundError:
            return False

    published = image_directory(root, layout, image_id) / TIMESTAMP
    wait_until(lambda: begun() or published.exists(), "some bytes are staged")
    sidecar.stop_now()
    if published.exists():
        return None
    (staging,) = staging_directories(root)
    return staging
