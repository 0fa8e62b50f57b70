"""What stat shows of a directory or a file, before it is put in the form of a libfuse."""

import stat
from dataclasses import dataclass
from typing import NamedTuple

# Tools size their buffers by it: one write of 1 MiB costs a request what one of 4 KiB does.
BLOCK_SIZE = 1 << 20
SECTOR = 512


class Attributes(NamedTuple):
    mode: int
    inode: int
    links: int
    uid: int
    gid: int
    size: int
    sectors: int  # of 512 bytes: what the file takes on its datastore
    accessed_ns: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom everything in the mount belongs to, and which permissions are taken away."""

    uid: int
    gid: int
    umask: int = 0

    def directory(
        self, inode: int, *, subdirectories: int = 0, modified_ns: int = 0, accessed_ns: int = 0
    ) -> Attributes:
        mode = stat.S_IFDIR | (0o755 & ~self.umask)
        accessed = accessed_ns or modified_ns
        return Attributes(mode, inode, 2 + subdirectories, self.uid, self.gid, 0, 0, accessed, modified_ns)

    def file(self, inode: int, size: int, allocated: int, modified_ns: int, *, writable: bool = False) -> Attributes:
        mode = stat.S_IFREG | ((0o644 if writable else 0o444) & ~self.umask)
        sectors = -(-allocated // SECTOR)
        return Attributes(mode, inode, 1, self.uid, self.gid, size, sectors, modified_ns, modified_ns)
