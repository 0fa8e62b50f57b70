"""In use through a mount: the mount's daemon has the file open, for a process that has it open in the mount.

Found by what /proc says of open files: nothing is asked of the mount, which may hang, or wait for who asks.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from sidecar.datastores.fuse_mounts import ImageMount, image_mounts
from sidecar.datastores.open_files import FileUser, user_of

_DEVICE = "/dev/fuse"
_CONNECTION = "fuse_connection:"
_UNLINKED = " (deleted)"


def with_openers(users: Sequence[FileUser], datastore: str, image_id: str) -> tuple[FileUser, ...]:
    """The users of an image's files; in place of a mount's daemon, those who have the image open through it.

    A daemon stays as it is where none of them can be seen, such as one that mapped the file and closed it.
    """
    try:
        mounts = image_mounts()
    except OSError:
        mounts = []
    found: list[FileUser] = []
    for user in users:
        mounted = _mounts_of(user.pid, mounts) if user.pid is not None and mounts else []
        openers = [pid for pid in _openers(mounted, datastore, image_id) if pid != user.pid]
        found += [replace(user_of(pid), through=user) for pid in openers] or [user]
    return tuple(found)


def _mounts_of(pid: int, mounts: Iterable[ImageMount]) -> list[ImageMount]:
    """Those that a process is the daemon of."""
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return []
    mounted = []
    for descriptor in descriptors:
        with suppress(OSError, ValueError):
            if os.readlink(f"/proc/{pid}/fd/{descriptor}") == _DEVICE:
                mounted += _mounts_at(pid, descriptor, mounts)
    return mounted


def _mounts_at(pid: int, descriptor: str, mounts: Iterable[ImageMount]) -> list[ImageMount]:
    with open(f"/proc/{pid}/fdinfo/{descriptor}", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith(_CONNECTION):
                number = int(line.removeprefix(_CONNECTION))
                return [mount for mount in mounts if mount.connection == number]
    # Older kernels do not tell it: the daemon was started with the mountpoint as an argument.
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        arguments = [os.fsdecode(argument) for argument in file.read().split(b"\0")]
    ends = {os.path.normpath(argument) for argument in arguments if argument}
    return [mount for mount in mounts if any(mount.mountpoint.endswith(f"/{end.lstrip('/')}") for end in ends)]


def _openers(mounts: Sequence[ImageMount], datastore: str, image_id: str) -> Iterator[int]:
    if not mounts:
        return
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with suppress(OSError):  # ended, or another user's
            if any(_is_in(path, mounts, datastore, image_id) for path in _open_paths(pid)):
                yield pid


def _open_paths(pid: int) -> Iterator[str]:
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            yield os.readlink(f"/proc/{pid}/fd/{descriptor}").removesuffix(_UNLINKED)


def _is_in(path: str, mounts: Sequence[ImageMount], datastore: str, image_id: str) -> bool:
    for mount in mounts:
        found = mount.image_in(path)
        if found and found[:2] == (datastore, image_id) and found[2]:
            return True
    return False
