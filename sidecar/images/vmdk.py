"""A VMDK disk as a whole: the descriptor, the files that it names, whether they are all there, and their new names.

Works on bytes and on a FileReader, so that a directory, an archive and a remote datastore are read alike. Symbolic
links, and whatever else a name may lead to, are the reader's matter. A disk is one of
- a text descriptor, and flat or sparse extents beside it;
- a single sparse file (monolithicSparse, streamOptimized), which has the descriptor embedded.
"""

import re
from dataclasses import dataclass

from sidecar.errors import InvalidDisk
from sidecar.images.disk_formats import other_format
from sidecar.images.vmdk_descriptor import (
    MAX_CAPACITY_BYTES,
    MAX_DESCRIPTOR_BYTES,
    SECTOR,
    Access,
    Descriptor,
    Extent,
    Kind,
    check_file_name,
    embedded_text,
    parse_descriptor,
    require_standalone,
    rewrite_descriptor,
    rewrite_embedded,
    shown,
    without_padding,
)
from sidecar.images.vmdk_sparse import SPARSE_MAGIC, FileReader, SparseHeader, check_sparse_file, read_exactly

__all__ = [
    "MAX_CAPACITY_BYTES",
    "MAX_DESCRIPTOR_BYTES",
    "SECTOR",
    "Access",
    "Descriptor",
    "Disk",
    "DiskFile",
    "Extent",
    "FileReader",
    "Kind",
    "SparseHeader",
    "check_disk",
    "check_file_name",
    "descriptor_of",
    "parse_descriptor",
    "read_disk",
    "renamed_files",
    "require_standalone",
    "rewrite_descriptor",
    "rewrite_embedded",
    "without_padding",
]

_EMBEDDING_TYPES = ("monolithicsparse", "streamoptimized")
_SPLIT_TYPES = ("twogbmaxextentflat", "2gbmaxextentflat")
_EMBEDDED_OFFSET = 1
_EXTENT_NAME = re.compile(r"(.+)-(?:flat|[fs][0-9]{3})\.vmdk", re.DOTALL)


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A file that extents are in. It has `minimum_size_bytes`, and when `exact` not one byte more."""

    name: str
    kind: Kind
    minimum_size_bytes: int
    exact: bool

    def fits(self, size_bytes: int) -> bool:
        return size_bytes == self.minimum_size_bytes if self.exact else size_bytes >= self.minimum_size_bytes


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk, as its descriptor says it is.

    `name` is the file with the descriptor, which is the `descriptor_length` bytes at `descriptor_offset` of it: the
    whole of a text file, the area to give to `rewrite_embedded` of a sparse one. `files` are the files of the extents,
    each once; an embedded descriptor's is the file itself, whatever name the descriptor has for it.
    """

    name: str
    descriptor: Descriptor
    embedded: bool
    descriptor_offset: int
    descriptor_length: int
    capacity_bytes: int
    files: tuple[DiskFile, ...]

    @property
    def file_names(self) -> tuple[str, ...]:
        """Every file of the disk, the one with the descriptor first."""
        return tuple(dict.fromkeys((self.name, *(file.name for file in self.files))))

    @property
    def is_as_esx_makes_them(self) -> bool:
        """A text descriptor, and one flat extent, all of a file that is named for it."""
        extents = [(each.kind.is_flat, each.file_name, each.offset_sectors) for each in self.descriptor.extents]
        return not self.embedded and extents == [(True, f"{self.name.removesuffix('.vmdk')}-flat.vmdk", 0)]


def read_disk(name: str, reader: FileReader) -> Disk:
    """The disk whose descriptor is in, or is, the file `name`. Looks at no other file, and reads at most 1 MiB of it.

    Raises InvalidDisk when it is not a disk that can be an image. OSErrors of `reader` pass, FileNotFoundError too.
    """
    check_file_name(name)
    size = reader.size(name)
    try:
        start = reader.read(name, 0, SECTOR)
        if start[:4] == SPARSE_MAGIC:
            return _read_embedded(name, size, SparseHeader.parse(start), reader)
        if start[:4] in (b"COWD", b"\xbe\xba\xfe\xca"):
            SparseHeader.parse(start)
        if (other := other_format(start)) is not None:
            remedy = "unpack it" if other.is_archive else "convert it with qemu-img convert -O vmdk"
            raise InvalidDisk(f"{other.what}, not a VMDK: {remedy}")
        if size > MAX_DESCRIPTOR_BYTES:
            raise InvalidDisk(f"not a VMDK descriptor: {size} bytes, and one has at most {MAX_DESCRIPTOR_BYTES}")
        return _described(name, size, parse_descriptor(read_exactly(reader, name, 0, size)))
    except InvalidDisk as fault:
        raise _within(name, fault) from None


def check_disk(name: str, reader: FileReader) -> Disk:
    """`read_disk`, and then every file of it: that it is there, has its size, and, when sparse, is whole.

    Raises InvalidDisk with the file, what was expected and what was found. OSErrors of `reader` pass, so that a storage
    outage is never taken for a fault of the disk; only a FileNotFoundError for the size of an extent is one. The parent
    is left to `require_standalone`.
    """
    disk = read_disk(name, reader)
    sizes: dict[str, int] = {}
    for file in disk.files:
        try:
            sizes[file.name] = size = reader.size(file.name)
        except FileNotFoundError:
            raise InvalidDisk(f"{shown(name)} names the extent {shown(file.name)}, which is not there") from None
        if not file.fits(size):
            quantity = "exactly" if file.exact else "at least"
            raise InvalidDisk(
                f"{shown(file.name)} has the wrong size: expected {quantity} {file.minimum_size_bytes} bytes, "
                f"found {size}"
            )
    for extent in disk.descriptor.extents:
        if extent.kind is not Kind.SPARSE or extent.file_name is None:
            continue
        file_name = disk.name if disk.embedded else extent.file_name
        try:
            header = check_sparse_file(file_name, sizes[file_name], extent.size_sectors, reader)
            if not disk.embedded:
                _require_no_descriptor(file_name, header, reader)
        except InvalidDisk as fault:
            raise _within(file_name, fault) from None
    return disk


def descriptor_of(name: str) -> str | None:
    """What the descriptor of an extent is called that has the usual name of one; None for another name."""
    found = _EXTENT_NAME.fullmatch(name)
    return f"{found[1]}.vmdk" if found else None


def renamed_files(disk: Disk, new_id: str) -> dict[str, str]:
    """The name that each file of `disk` gets in the image `new_id`: old name to new name, all different.

    The descriptor becomes `<new_id>.vmdk`. Where an extent's name starts with that of the descriptor, less `.vmdk`, the
    new id takes its place. Other extents are named as VMware would: `-flat`, or by position `-f001` and `-s001`. Raises
    InvalidDisk when `new_id` makes no file name.
    """
    target = f"{new_id}.vmdk"
    check_file_name(target)
    stem = disk.name[: -len(".vmdk")] if disk.name.casefold().endswith(".vmdk") else disk.name
    renames = {disk.name: target}
    taken = {target}
    extents = [file for file in disk.files if file.name != disk.name]
    for file in extents:
        new_name = new_id + file.name.removeprefix(stem)
        if file.name.startswith(stem) and new_name not in taken and _is_file_name(new_name):
            renames[file.name] = new_name
            taken.add(new_name)
    numbered = len(extents) > 1 or disk.descriptor.create_type.casefold() in _SPLIT_TYPES
    number = 0
    for position, file in enumerate(extents, 1):
        if file.name in renames:
            continue
        new_name = f"{new_id}-flat.vmdk"
        if numbered or not file.kind.is_flat:
            # Never back to a lower number, so that thousands of names in the way cost one pass over them, not one each.
            letter = "f" if file.kind.is_flat else "s"
            number = max(position, number + 1)
            while (new_name := f"{new_id}-{letter}{number:03d}.vmdk") in taken:
                number += 1
        check_file_name(new_name)
        renames[file.name] = new_name
        taken.add(new_name)
    return renames


def _described(name: str, size: int, descriptor: Descriptor) -> Disk:
    if name in descriptor.file_names:
        raise InvalidDisk("the descriptor names itself as an extent")
    exact = descriptor.create_type.casefold() == "monolithicflat"
    files: dict[str, DiskFile] = {}
    for extent in descriptor.extents:
        if extent.file_name is None:
            continue
        flat = extent.kind.is_flat
        needed = (extent.offset_sectors + extent.size_sectors) * SECTOR if flat else SECTOR
        if extent.file_name in files:
            needed = max(needed, files[extent.file_name].minimum_size_bytes)
        files[extent.file_name] = DiskFile(extent.file_name, extent.kind, needed, exact and flat)
    return Disk(name, descriptor, False, 0, size, descriptor.capacity_bytes, tuple(files.values()))


def _read_embedded(name: str, size: int, header: SparseHeader, reader: FileReader) -> Disk:
    if not header.descriptor_offset:
        raise InvalidDisk("one extent of a disk, without a descriptor; name the disk's descriptor instead")
    if header.descriptor_offset != _EMBEDDED_OFFSET:
        # QEMU takes the descriptor from sector 1, whatever the header says.
        raise InvalidDisk(f"the embedded descriptor is at sector {header.descriptor_offset}, expected 1")
    offset, length = header.descriptor_offset * SECTOR, header.descriptor_size * SECTOR
    text = embedded_text(read_exactly(reader, name, offset, length))
    if not text:
        raise InvalidDisk("one extent of a disk, without a descriptor; name the disk's descriptor instead")
    descriptor = parse_descriptor(text)
    if descriptor.create_type.casefold() not in _EMBEDDING_TYPES:
        raise InvalidDisk(f"a single file of type {shown(descriptor.create_type)}, expected one of {_EMBEDDING_TYPES}")
    extent = descriptor.extents[0]
    if len(descriptor.extents) != 1 or extent.kind is not Kind.SPARSE:
        raise InvalidDisk("the embedded descriptor has other extents than the file that it is in")
    if not header.holds(extent.size_sectors):
        raise InvalidDisk(f"the header says {header.capacity} sectors, the descriptor in it {extent.size_sectors}")
    file = DiskFile(name, Kind.SPARSE, offset + length, False)
    return Disk(name, descriptor, True, offset, length, descriptor.capacity_bytes, (file,))


def _require_no_descriptor(name: str, header: SparseHeader, reader: FileReader) -> None:
    """QEMU leaves room for a descriptor in every extent, and leaves it empty. A second one would keep the old names."""
    if header.descriptor_offset and reader.read(name, header.descriptor_offset * SECTOR, 1).strip(b"\0"):
        raise InvalidDisk(f"{shown(name)} is named as an extent, and is a disk with a descriptor of its own")


def _is_file_name(name: str) -> bool:
    try:
        check_file_name(name)
    except InvalidDisk:
        return False
    return True


def _within(name: str, fault: InvalidDisk) -> InvalidDisk:
    """The fault with the file's name before it, unless it begins with that."""
    return fault if fault.message.startswith(shown(name)) else InvalidDisk(f"{shown(name)}: {fault.message}")
