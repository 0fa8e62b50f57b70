"""The disks that are copied and read."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.bench.command import GIB, MIB
from tests.support.processes import run

_BUFFER = 8 * MIB


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of `size` bytes, with `pieces` of `piece` bytes of data, spread evenly."""

    name: str
    title: str
    size: int
    piece: int
    pieces: int

    def make(self, directory: Path) -> None:
        """`NAME.vmdk` and `NAME-flat.vmdk`, with random bytes for data, in a directory that is there."""
        options = ("-f", "vmdk", "-o", "subformat=monolithicFlat")
        run("qemu-img", "create", "-q", *options, directory / f"{self.name}.vmdk", str(self.size))
        with (directory / f"{self.name}-flat.vmdk").open("r+b", buffering=0) as file:
            for number in range(self.pieces):
                file.seek(number * (self.size // self.pieces))
                file.write(os.urandom(self.piece))


DENSE = Disk("dense", "2 GiB dense", 2 * GIB, 8 * MIB, 256)
SPARSE = Disk("sparse", "20 GiB, 256 MiB of data", 20 * GIB, 1 * MIB, 256)


def read_data(directory: Path) -> None:
    """Puts the data of every file of the directory into the page cache."""
    buffer = bytearray(_BUFFER)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            _read_file(file.fileno(), buffer)


def _read_file(fd: int, buffer: bytearray) -> None:
    position, size = 0, os.fstat(fd).st_size
    while position < size:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # a hole up to the end
            return
        end = os.lseek(fd, position, os.SEEK_HOLE)
        while position < end:
            position += os.preadv(fd, [memoryview(buffer)[: end - position]], position)
