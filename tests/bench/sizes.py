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
