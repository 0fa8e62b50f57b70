"""In use through a mount: the mount's daemon has the file open, for a process that has it open in the mount.

Found by what /proc says of open files: nothing is asked of the mount, which may hang, or wait for who asks.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from sidecar.datastores.mounts import Mount, mounts
from sidecar.datastores.open_files import FileUser, user_of

_DEVICE = "/dev/fuse"
_CONNECTION = "fuse_connection:"
_UNLINKED = " (deleted)"


def with_openers(users: Sequence[FileUser], datastore: str, image_id: str) -> tuple[FileUser, ...]:
    """The users of an image's files; in place of a mount's daemon, those who have the image open through it.

    A daemon stays as it is where none of them can be seen, such as one that mapped the file and closed it.
    """
    try:
        of_images = [mount for mount in mounts() if mount.is_of_images]
    except OSError:
        of_images = []
    found: list[FileUser] = []
    for user in users:
        mounted = _mounts_of(user.pid, of_images) if user.pid is not None and of_images else []
        openers = [pid for pid in _openers(mounted, datastore, image_id) if pid != user.pid]
        found += [replace(user_of(pid), through=user) for pid in openers] or [user]
    return tuple(found)


def _mounts_of(pid: int, of_images: Iterable[Mount]) -> list[Mount]:
    """Those that a process is the daemon of."""
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return []
    mounted = []
    for descriptor in descriptors:
        with suppress(OSError, ValueError):
            if os.readlink(f"/proc/{pid}/fd/{descriptor}") == _DEVICE:
                mounted += _mounts_at(pid, descriptor, of_images)
    return mounted


def _mounts_at(pid: int, descriptor: str, of_images: Iterable[Mount]) -> list[Mount]:
    with open(f"/proc/{pid}/fdinfo/{descriptor}", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith(_CONNECTION):
                number = int(line.removeprefix(_CONNECTION))
                return [mount for mount in of_images if mount.device == number]
    # Older kernels do not tell it: the daemon was started with the mountpoint as an argument.
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        arguments = [os.fsdecode(argument) for argument in file.read().split(b"\0")]
    ends = {os.path.normpath(argument) for argument in arguments if argument}
    return [mount for mount in of_images if any(mount.mountpoint.endswith(f"/{end.lstrip('/')}") for end in ends)]


def _openers(mounted: Sequence[Mount], datastore: str, image_id: str) -> Iterator[int]:
    if not mounted:
        return
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with suppress(OSError):  # ended, or another user's
            if any(_is_in(path, mounted, datastore, image_id) for path in _open_paths(pid)):
                yield pid


def _open_paths(pid: int) -> Iterator[str]:
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            yield os.readlink(f"/proc/{pid}/fd/{descriptor}").removesuffix(_UNLINKED)


def _is_in(path: str, mounted: Sequence[Mount], datastore: str, image_id: str) -> bool:
    for mount in mounted:
        found = mount.image_in(path)
        if found and found[:2] == (datastore, image_id) and found[2]:
            return True
    return False
