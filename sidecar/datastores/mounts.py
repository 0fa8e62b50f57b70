"""What is mounted where on this host, and the mounts of images among that.

Nothing here asks the mounts themselves, which would wait for their daemons: only /proc.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE_MOUNT_TYPE = "fuse.image-mount"
DELETED = ".deleted"

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount. `root` is the directory of its file system that is at the mountpoint: another than / in a bind mount.

    `device` is the number of the file system; of a FUSE one also that of the connection to its daemon.
    """

    mountpoint: str
    device: int
    root: str
    type: str

    @property
    def is_of_images(self) -> bool:
        return self.type == IMAGE_MOUNT_TYPE

    def holds(self, path: str) -> bool:
        return path == self.mountpoint or path.startswith(f"{self.mountpoint.rstrip('/')}/")

    def within(self, path: str) -> str:
        """A path that it holds, in its file system."""
        return f"{self.root.rstrip('/')}{path[len(self.mountpoint.rstrip('/')) :]}"

    def image_in(self, path: str) -> tuple[str, str, str] | None:
        """Of a mount of images: the datastore, the image id and the rest of an absolute path; None for no image's."""
        if not self.is_of_images or not self.holds(path):
            return None
        parts = self.within(path).strip("/").split("/")
        if len(parts) > 1 and parts[1] == DELETED:
            del parts[1]
        return (parts[0], parts[1], "/".join(parts[2:])) if len(parts) > 1 else None


def mounts() -> list[Mount]:
    """Those that this process sees, in the order in which they were made: a later one hides what is below it."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, _, more = line.partition(" - ")
            _, _, device, root, mountpoint, *_ = fields.split(" ")
            major, minor = device.split(":")
            number = os.makedev(int(major), int(minor))
            found.append(Mount(_plain(mountpoint), number, _plain(root), more.partition(" ")[0]))
    return found


def mount_of(path: str, found: Sequence[Mount]) -> Mount | None:
    """The one that an absolute path without links is in."""
    return max((mount for mount in reversed(found) if mount.holds(path)), key=lambda m: len(m.mountpoint), default=None)


def _plain(path: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), path)
