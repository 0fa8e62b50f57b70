"""Sparse VMDK files: the header, and whether everything that it leads to lies inside the file.

The format is that of VMware's "Virtual Disk Format 5.0": little-endian, offsets and sizes in sectors of 512 bytes. A
grain directory names grain tables, which name the grains; a stream-optimized file has compressed grains, and may have
its directory at the end, announced by a footer.
"""

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

from sidecar.errors import InvalidDisk
from sidecar.images.vmdk_descriptor import MAX_CAPACITY_BYTES, MAX_DESCRIPTOR_BYTES, SECTOR, shown

SPARSE_MAGIC = b"KDMV"
GRAIN_DIRECTORY_AT_END = 0xFFFFFFFFFFFFFFFF
MIN_GRAIN_SECTORS = 8
MAX_GRAIN_SECTORS = 1 << 16
MAX_TABLE_ENTRIES = 512
MAX_DIRECTORY_ENTRIES = 1 << 21
"""Reaches 64 TiB with the grain and table sizes that all writers use. The directory then takes 8 MiB, the most held."""

_REFUSED_MAGICS = {
    b"COWD": "the redo log of an ESX snapshot (COWD)",
    b"\xbe\xba\xfe\xca": "a space-efficient redo log of an ESX snapshot (SESparse)",
}
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_LINE_ENDS = b"\n \r\n"
_FLAG_LINE_ENDS = 1 << 0
_FLAG_REDUNDANT_TABLES = 1 << 1
_FLAG_MARKERS = 1 << 17
_MARKER = struct.Struct("<QII")
_MARKER_END_OF_STREAM = 0
_MARKER_FOOTER = 3
_GRAIN_MARKER = struct.Struct("<QI")
_READ_BYTES = 1 << 20


class FileReader(Protocol):
    """The files of one directory. Every error is an OSError, and is passed on as it is: it says nothing of the disk."""

    def size(self, name: str) -> int:
        """The size in bytes of the file; raises FileNotFoundError when there is none of that name."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """The `length` bytes at `offset`; fewer only where the file ends."""


@dataclass(frozen=True, slots=True)
class SparseHeader:
    """The header of a sparse file; sizes and offsets in sectors."""

    version: int
    flags: int
    capacity: int
    grain: int
    descriptor_offset: int
    descriptor_size: int
    table_entries: int
    redundant_directory_offset: int
    directory_offset: int
    overhead: int
    compressed: bool

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The header in the first 512 bytes of a sparse file. Raises InvalidDisk for anything else, and for sizes that
        would make a reader of the file work or allocate without bound."""
        if reason := _REFUSED_MAGICS.get(data[:4]):
            raise InvalidDisk(f"{reason} cannot be part of an image; flatten the disk first with vmkfstools -i")
        if data[:4] != SPARSE_MAGIC:
            raise InvalidDisk(f"not a sparse VMDK: it starts with {shown(data[:4])}, not with {shown(SPARSE_MAGIC)}")
        if len(data) < SECTOR:
            raise InvalidDisk(f"the file ends after {len(data)} bytes, inside the sparse header")
        (
            _,
            version,
            flags,
            capacity,
            grain,
            descriptor_offset,
            descriptor_size,
            table_entries,
            redundant_directory_offset,
            directory_offset,
            overhead,
            _,
            line_ends,
            compression,
        ) = _HEADER.unpack_from(data)
        if not 1 <= version <= 3:
            raise InvalidDisk(f"the sparse header is of version {version}; 1 to 3 are known")
        if flags & _FLAG_LINE_ENDS and line_ends != _LINE_ENDS:
            raise InvalidDisk("the file was damaged by a transfer as text: the line ends in its header were changed")
        if not 0 < capacity <= MAX_CAPACITY_BYTES // SECTOR:
            raise InvalidDisk(f"the sparse header has a capacity of {capacity} sectors")
        if not MIN_GRAIN_SECTORS <= grain <= MAX_GRAIN_SECTORS or grain & (grain - 1):
            raise InvalidDisk(f"the sparse header has a grain of {grain} sectors, not a power of two from 8 to 65536")
        if not 1 <= table_entries <= MAX_TABLE_ENTRIES:
            raise InvalidDisk(f"the sparse header has {table_entries} entries to a grain table, not 1 to 512")
        if compression not in (0, 1):
            raise InvalidDisk(f"the sparse header has the unknown compression {compression}")
        if descriptor_offset and not 0 < descriptor_size <= MAX_DESCRIPTOR_BYTES // SECTOR:
            raise InvalidDisk(f"the sparse header has {descriptor_size} sectors for the descriptor")
        if directory_offset == 0:
            raise InvalidDisk("the sparse header has no grain directory")
        header = cls(
            version=version,
            flags=flags,
            capacity=capacity,
            grain=grain,
            descriptor_offset=descriptor_offset,
            descriptor_size=descriptor_size if descriptor_offset else 0,
            table_entries=table_entries,
            redundant_directory_offset=redundant_directory_offset,
            directory_offset=directory_offset,
            overhead=overhead,
            compressed=compression == 1,
        )
        if header.directory_entries > MAX_DIRECTORY_ENTRIES:
            raise InvalidDisk(f"the sparse header needs a grain directory of {header.directory_entries} entries")
        return header

    @property
    def directory_entries(self) -> int:
        return -(-self.capacity // (self.grain * self.table_entries))

    def holds(self, sectors: int) -> bool:
        """Whether an extent of `sectors` can be in this file: VirtualBox rounds the header's capacity up to a grain."""
        return self.capacity in (sectors, -(-sectors // self.grain) * self.grain)


def read_exactly(reader: FileReader, name: str, offset: int, length: int) -> bytes:
    """The bytes, all of them. Raises InvalidDisk when the file ends before."""
    data = reader.read(name, offset, length)
    if len(data) != length:
        raise InvalidDisk(f"{shown(name)} ends at byte {offset + len(data)}, expected it to reach {offset + length}")
    return data


def check_sparse_file(name: str, size: int, sectors: int, reader: FileReader) -> SparseHeader:
    """Check that the file of `size` bytes is a whole sparse extent of `sectors`, with every table and grain in it.

    Reads the metadata only: the header, the grain directory, the grain tables in use, and the mark of the last grain;
    2 KiB for each 32 MiB of disk as all known writers lay it out. Returns the header, of the footer where there is one.
    Raises InvalidDisk with what is wrong; OSErrors of `reader` pass.
    """
    header = SparseHeader.parse(reader.read(name, 0, SECTOR))
    if not header.holds(sectors):
        raise InvalidDisk(f"{shown(name)} holds {header.capacity} sectors, expected {sectors} from the descriptor")
    if header.directory_offset == GRAIN_DIRECTORY_AT_END:
        header = _footer(name, size, header, reader)
    _require_inside(name, size, "its overhead", 0, header.overhead * SECTOR)
    length = header.directory_entries * 4
    if header.flags & _FLAG_REDUNDANT_TABLES and header.redundant_directory_offset:
        start = header.redundant_directory_offset * SECTOR
        _require_inside(name, size, "its redundant grain directory", start, length)
    _require_inside(name, size, "its grain directory", header.directory_offset * SECTOR, length)
    directory = read_exactly(reader, name, header.directory_offset * SECTOR, length)
    tables = sorted(offset for (offset,) in struct.iter_unpack("<I", directory) if offset)
    if any(one == following for one, following in itertools.pairwise(tables)):
        raise InvalidDisk(f"{shown(name)} is damaged: its grain directory names a grain table twice")
    table_length = header.table_entries * 4
    if tables:
        _require_inside(name, size, "a grain table", tables[-1] * SECTOR, table_length)
    last_grain = grains = 0
    for table in _tables(name, header, tables, reader):
        last_grain = max(last_grain, *table)
        grains += len(table) - table.count(0) - table.count(1)
    # Else many are one, and a file of 4 MiB is a disk of 64 GiB for whoever reads it. A compressed one has a sector.
    most = size // SECTOR // (1 if header.compressed else header.grain)
    if grains > most:
        raise InvalidDisk(f"{shown(name)} is damaged: it names {grains} grains, more than the {most} that it can hold")
    if last_grain > 1:  # 0 is no grain, 1 a grain of zeros
        _check_grain(name, size, header, last_grain, reader)
    return header


def _footer(name: str, size: int, header: SparseHeader, reader: FileReader) -> SparseHeader:
    """The header that ends a stream, between the footer's marker and the end-of-stream marker."""
    if size < 4 * SECTOR:
        raise InvalidDisk(f"{shown(name)} is truncated: its {size} bytes have no room for the footer of a stream")
    data = read_exactly(reader, name, size - 3 * SECTOR, 3 * SECTOR)
    _, before_size, before_type = _MARKER.unpack_from(data)
    end_value, end_size, end_type = _MARKER.unpack_from(data, 2 * SECTOR)
    if (before_size, before_type, data[SECTOR : SECTOR + 4]) != (0, _MARKER_FOOTER, SPARSE_MAGIC) or (
        (end_value, end_size, end_type) != (0, 0, _MARKER_END_OF_STREAM)
    ):
        raise InvalidDisk(
            f"{shown(name)} is truncated: expected a stream's footer and end-of-stream marker in the last 1536 of its "
            f"{size} bytes, found something else"
        )
    footer = SparseHeader.parse(data[SECTOR : 2 * SECTOR])
    if footer.directory_offset == GRAIN_DIRECTORY_AT_END:
        raise InvalidDisk(f"{shown(name)} is damaged: its footer does not say where the grain directory is")
    for field in ("capacity", "grain", "table_entries", "compressed"):
        if getattr(footer, field) != getattr(header, field):
            raise InvalidDisk(
                f"{shown(name)} is damaged: its footer says {field} {getattr(footer, field)}, its header "
                f"{getattr(header, field)}"
            )
    return footer


def _tables(name: str, header: SparseHeader, offsets: list[int], reader: FileReader) -> Iterator[tuple[int, ...]]:
    """The grain tables that name any grain. Tables that lie side by side, as writers leave them, are read together."""
    length = header.table_entries * 4
    step = -(-length // SECTOR)
    together = max(1, _READ_BYTES // (step * SECTOR))
    table = struct.Struct(f"<{header.table_entries}I")
    zeros = bytes(length)
    index = 0
    while index < len(offsets):
        start, count = offsets[index], 1
        while count < together and index + count < len(offsets) and offsets[index + count] == start + count * step:
            count += 1
        index += count
        data = read_exactly(reader, name, start * SECTOR, (count - 1) * step * SECTOR + length)
        for position in range(0, len(data), step * SECTOR):
            if data[position : position + length] != zeros:
                yield table.unpack_from(data, position)


def _check_grain(name: str, size: int, header: SparseHeader, offset: int, reader: FileReader) -> None:
    start = offset * SECTOR
    if not header.compressed:
        _require_inside(name, size, "a grain", start, header.grain * SECTOR)
        return
    _require_inside(name, size, "a grain", start, _GRAIN_MARKER.size)
    if header.flags & _FLAG_MARKERS:
        _, length = _GRAIN_MARKER.unpack(read_exactly(reader, name, start, _GRAIN_MARKER.size))
        _require_inside(name, size, "a grain", start, _GRAIN_MARKER.size + length)


def _require_inside(name: str, size: int, what: str, start: int, length: int) -> None:
    if start + length > size:
        raise InvalidDisk(
            f"{shown(name)} is truncated or damaged: {what} reaches to byte {start + length}, "
            f"found the file to end at {size}"
        )
