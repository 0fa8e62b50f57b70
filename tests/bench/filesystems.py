"""File systems of a benchmark's own, on loop devices, so that what is measured does not depend on what was there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import run

# No discard and nothing left for later: a block that was written once costs the same to write again.
MAKE = {
    "xfs": ("mkfs.xfs", "-q", "-K", "-m", "reflink=1"),
    "ext4": ("mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"),
}
_BLOCK = 8 * 1024 * 1024


@contextlib.contextmanager
def file_system(kind: str, directory: Path, size: int) -> Iterator[Path]:
    """A file system on a file of `directory`, mounted; all gone afterwards.

    The loop device does direct I/O: the page cache of the disk beneath neither helps nor is filled.
    """
    image, mountpoint = directory / f"{kind}.img", directory / kind
    with contextlib.ExitStack() as stack:
        stack.callback(image.unlink, missing_ok=True)
        _fill(image, size)
        run(*MAKE[kind], image)
        mountpoint.mkdir()
        device = run("losetup", "--find", "--show", "--direct-io=on", image).stdout.strip()
        # While it is mounted, this only says that it shall go with the mount.
        stack.callback(run, "losetup", "--detach", device, check=False)
        run("mount", "-t", kind, device, mountpoint)
        stack.callback(_unmount, mountpoint)
        yield mountpoint


def _fill(image: Path, size: int) -> None:
    """Writes every block: the first write into a sparse or preallocated file costs more than those that follow."""
    block = bytes(_BLOCK)
    fd = os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for offset in range(0, size, _BLOCK):
            os.pwrite(fd, block, offset)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _unmount(mountpoint: Path) -> None:
    if run("umount", mountpoint, check=False).returncode:
        run("umount", "--lazy", mountpoint)
