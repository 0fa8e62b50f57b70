"""Stopping a sidecar where a test wants it: in the middle of writing an image."""

import signal
from pathlib import Path

from tests.crash.support import staging_directories
from tests.support.disks import MIB, allocated
from tests.support.processes import Sidecar, wait_until


def stop_in_the_middle(sidecar: Sidecar, root: Path, size: int) -> Path:
    """Stops the process (SIGSTOP) when a part of the bytes is there; the staging directory."""

    def some_bytes() -> bool:
        try:
            return any(allocated(directory) > 4 * MIB for directory in staging_directories(root))
        except FileNotFoundError:
            return False

    wait_until(some_bytes, "some bytes are staged")
    sidecar.signal(signal.SIGSTOP)
    (staging,) = staging_directories(root)
    assert allocated(staging) < size, "it is in the middle: choose a larger disk where this fails"
    return staging
