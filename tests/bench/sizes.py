"""How large a measurement of the mount is: as large as is promised, or small, to see that it works."""

from dataclasses import dataclass

from tests.bench.command import MIB
from tests.bench.disks import DENSE, SPARSE, Disk

# For the smallest file system that mkfs.xfs makes, and what it needs for itself.
_ROOM = 512 * MIB
# Of an image's three files with their directory on XFS, rounded up.
_PLANTED_BYTES = 10 * 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    images: int = 10_000
    many_images: int = 100_000
    dense: Disk = DENSE
    sparse: Disk = SPARSE
    random_seconds: int = 1
    idle_seconds: float = 10.0

    @staticmethod
    def file_system(*, images: int = 0, data: int = 0) -> int:
        """Bytes of a file system that has room for so many images of no data, and so many bytes of data."""
        return _ROOM + images * _PLANTED_BYTES + data


SMALL = Disk("small", "64 MiB dense", 64 * MIB, MIB, 64)
TINY = Disk("tiny", "2 MiB dense", 2 * MIB, MIB, 2)
LARGE = Disk("large", "256 MiB dense", 256 * MIB, 8 * MIB, 32)


@dataclass(frozen=True, slots=True)
class LoadSizes:
    """How large a load is."""

    seconds: float = 60.0
    clients: int = 64
    processes: int = 4
    # On each datastore, to be touched and listed.
    images: int = 200
    # What the clients copy.
    small: Disk = SMALL
    # Of each contender that touches; it does so beside that many copies of a larger image.
    touch_seconds: float = 5.0
    copies: int = 16
    large: Disk = LARGE

    @property
    def written_bytes(self) -> int:
        """Of a file system on which all copies are written out."""
        data = max((self.clients + 1) * self.small.size, (self.copies + 1) * self.large.size)
        return Sizes.file_system(images=self.images, data=int(1.1 * data))

    @property
    def shared_bytes(self) -> int:
        """Of a file system on which copies share their extents."""
        return Sizes.file_system(images=self.images, data=2 * (self.small.size + self.large.size))


@dataclass(frozen=True, slots=True)
class ServerSizes:
    """How much is asked of a server."""

    images: int = 1000
    # In each image, counted by turns.
    files: tuple[int, int] = (3, 30)
    # What is imported, copied and so on, and counted; and what is copied against the clock.
    small: Disk = TINY
    large: Disk = LARGE
    # How often each of those is counted: the least is told, which no look at the datastores' state fell into.
    times: int = 3
