"""The directory that is mounted on: whether it may be, and what a daemon that died left there."""

import contextlib
import ctypes
import errno
import logging
import os
import shlex
import subprocess

from fusefs.options import FILE_SYSTEM_NAME

_log = logging.getLogger(__name__)

_MNT_DETACH = 2
# What the kernel answers for a daemon that has died, and for one that died before it answered.
_DEAD = {errno.ENOTCONN, errno.ECONNABORTED}
_ESCAPES = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}


class MountpointError(Exception):
    """Nothing can be mounted there: why, and what to do."""


def prepare(mountpoint: str, *, may_cover_files: bool) -> str:
    """The absolute path of a directory that can be mounted on; clears a mount whose daemon died.

    Raises MountpointError.
    """
    path = os.path.abspath(mountpoint)
    try:
        os.statvfs(path)  # the kernel answers a stat for a daemon that died, for as long as it remembers
    except OSError as error:
        if error.errno not in _DEAD:
            hint = ": make the directory first" if error.errno == errno.ENOENT else ""
            raise MountpointError(f"cannot mount at {path}: {os.strerror(error.errno or 0)}{hint}") from None
        if not is_ours(path):
            raise MountpointError(
                f"cannot mount at {path}: another file system's daemon died there; unmount it"
            ) from None
        _log.info("clearing a mount whose daemon died mountpoint=%s", path)
        unmount(path, lazily=True)
    path = os.path.realpath(path)
    if is_ours(path):
        raise MountpointError(f"{path} is mounted already: unmount it with fusermount3 -u {shlex.quote(path)}")
    if not os.path.isdir(path):
        raise MountpointError(f"cannot mount at {path}: not a directory")
    try:
        occupied = bool(os.listdir(path))
    except OSError as error:
        raise MountpointError(f"cannot mount at {path}: {error.strerror}") from None
    if occupied and not may_cover_files:
        raise MountpointError(f"cannot mount at {path}: not empty; mount at an empty directory, or use -o nonempty")
    return path


def is_ours(path: str) -> bool:
    """Whether the last thing that was mounted at the path is an image-mount."""
    kind, _ = _last_mounted(path)
    return kind == f"fuse.{FILE_SYSTEM_NAME}"


def device_of(path: str) -> int:
    """The number of the device that was mounted last at the path; 0 for none. Whoever serves it is not asked."""
    _, device = _last_mounted(path)
    return device


def _last_mounted(path: str) -> tuple[str, int]:
    kind, device = "", 0
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if _unescaped(before.split()[4]) == path:
                major, _, minor = before.split()[2].partition(":")
                kind, device = after.split()[0], os.makedev(int(major), int(minor))
    return kind, device


def unmount(path: str, *, lazily: bool) -> None:
    """Takes the mount away, by the kernel as root and by fusermount else; raises MountpointError."""
    if os.geteuid() == 0:
        library = ctypes.CDLL(None, use_errno=True)
        if library.umount2(os.fsencode(path), _MNT_DETACH if lazily else 0) == 0:
            return
        raise MountpointError(f"cannot unmount {path}: {os.strerror(ctypes.get_errno())}")
    command = ["fusermount3", "-u", *(["-z"] if lazily else []), path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MountpointError(f"cannot unmount {path}: {command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise MountpointError(f"cannot unmount {path}: {done.stderr.strip()}")


def raise_read_ahead(path: str, kib: int = 1024) -> None:
    """Lets the kernel read further ahead in the mount, where we may say so."""
    device = os.stat(path).st_dev
    with (
        contextlib.suppress(OSError),
        open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w") as file,
    ):
        file.write(f"{kib}\n")


def _unescaped(text: str) -> str:
    for escape, character in _ESCAPES.items():
        text = text.replace(escape, character)
    return text
