"""Where this host has images mounted, and who has a file open in there.

Nothing here asks the mounts themselves, which would wait for their daemons: only /proc.
"""

import os
import re
from dataclasses import dataclass

FILE_SYSTEM_TYPE = "fuse.image-mount"
DELETED = ".deleted"

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class ImageMount:
    """A mount of images. `connection` is the number of its connection to the daemon."""

    mountpoint: str
    connection: int

    def image_in(self, path: str) -> tuple[str, str, str] | None:
        """The datastore, the image id and the rest that an absolute path leads to; None for what is no image's."""
        if not path.startswith(f"{self.mountpoint}/"):
            return None
        parts = path[len(self.mountpoint) + 1 :].split("/")
        if len(parts) > 1 and parts[1] == DELETED:
            del parts[1]
        return (parts[0], parts[1], "/".join(parts[2:])) if len(parts) > 1 else None


def image_mounts() -> list[ImageMount]:
    """Those that this process sees."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, _, more = line.partition(" - ")
            if more.split(" ", 1)[0] == FILE_SYSTEM_TYPE:
                _, _, device, _, mountpoint, *_ = fields.split(" ")
                major, minor = device.split(":")
                number = os.makedev(int(major), int(minor))
                found.append(ImageMount(_OCTAL.sub(lambda match: chr(int(match[1], 8)), mountpoint), number))
    return found
