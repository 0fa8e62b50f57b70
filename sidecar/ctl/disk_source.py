"""A VMDK on this machine that is to become an image: its files, checked, and their data and holes.

A disk is a descriptor with its extents beside it, or a single file; any of the files may be gzipped, and is then named
with `.gz` after the name that the disk has for it.
"""

import gzip
import os
import shlex
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sidecar import errors
from sidecar.client import Hole, Part
from sidecar.holes import data_ranges, seek_in
from sidecar.images import vmdk
from sidecar.images.disk_formats import other_format
from sidecar.images.vmdk_descriptor import shown

GZIP_MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 1 << 20
# A run of zeroes in the data is left out when it is at least one of these, and starts at a multiple of it.
BLOCK_BYTES = 64 << 10
# A hole is given in pieces of this size, so that endless zeroes come with signs of life.
HOLE_BYTES = 256 << 20
HEAD_BYTES = vmdk.MAX_DESCRIPTOR_BYTES + 1
# What a file whose size the descriptor does not fix may have beyond the disk's capacity: tables, and padding.
SLACK_BYTES = 64 << 20

_ZEROES = bytes(CHUNK_BYTES)
_VMDK_MAGICS = (b"KDMV", b"COWD", b"\xbe\xba\xfe\xca")


@dataclass(slots=True)
class SourceFile:
    """One file of the disk. `name` is what the disk calls it, `path` where it is."""

    name: str
    path: str
    compressed: bool
    size: int | None
    """In bytes; of a compressed file not known before it was read, by `parts`."""
    source_bytes: int
    """What has to be read: data, or compressed bytes."""
    limit: int | None = None
    """More than this does not come out of a compressed file of this disk; its size, when `exact`."""
    exact: bool = False

    @property
    def known_bytes(self) -> int:
        known = self.limit if self.exact else self.size
        return self.source_bytes if known is None else known

    def parts(self, advance: Callable[[int], None]) -> Iterator[Part]:
        """Data and holes, in order; `advance` is told how many of the `source_bytes` are read since the last time.

        Raises DiskFileFault where the file cannot be read, InvalidDisk where it is damaged.
        """
        try:
            yield from self._decompressed(advance) if self.compressed else self._plain(advance)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise errors.InvalidDisk(f"{self.path} is damaged: {error}") from None
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _plain(self, advance: Callable[[int], None]) -> Iterator[Part]:
        assert self.size is not None
        holes = _Holes()
        with open(self.path, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            for start, stop in data_ranges(seek_in(file.fileno()), 0, self.size):
                for offset in range(start, stop, CHUNK_BYTES):
                    wanted = min(CHUNK_BYTES, stop - offset)
                    chunk = os.pread(file.fileno(), wanted, offset)
                    yield from holes.between(_without_zeroes(chunk, offset))
                    advance(wanted)
            after = os.fstat(file.fileno())
            if after.st_mtime_ns != before.st_mtime_ns or not before.st_size == after.st_size == self.size:
                raise errors.DiskFileFault(
                    f"{self.path} changed while it was read: import it when nothing writes to it"
                )
        yield from holes.up_to(self.size)

    def _decompressed(self, advance: Callable[[int], None]) -> Iterator[Part]:
        holes = _Holes()
        position = consumed = 0
        with open(self.path, "rb") as raw, gzip.GzipFile(fileobj=raw, mode="rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                if self.limit is not None and position + len(chunk) > self.limit:
                    raise errors.InvalidDisk(
                        f"{self.path} decompresses to more than the {self.limit} bytes that {self.name} can have"
                    )
                yield from holes.between(_without_zeroes(chunk, position))
                position += len(chunk)
                if position - holes.end >= HOLE_BYTES:
                    yield from holes.up_to(position)
                advance(raw.tell() - consumed)
                consumed = raw.tell()
        yield from holes.up_to(position)
        if self.exact and position != self.limit:
            raise errors.InvalidDisk(
                f"{self.path} decompresses to {position} bytes, and {self.name} has {self.limit}: it is not whole"
            )
        self.size = position


class _Holes:
    """Fills what is between the data with holes."""

    def __init__(self) -> None:
        self.end = 0
        """Everything before this was given."""

    def between(self, data: Iterator[tuple[int, bytes]]) -> Iterator[Part]:
        for offset, piece in data:
            yield from self.up_to(offset)
            yield offset, piece
            self.end = offset + len(piece)

    def up_to(self, offset: int) -> Iterator[Part]:
        if offset > self.end:
            yield Hole(self.end, offset - self.end)
            self.end = offset


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """A disk of this machine. `files` in the order to send them: the extents, then the descriptor."""

    stem: str
    files: tuple[SourceFile, ...]

    @property
    def source_bytes(self) -> int:
        return sum(file.source_bytes for file in self.files)

    @property
    def known_bytes(self) -> int:
        """With holes; of a compressed file whose size is not known, what has to be read."""
        return sum(file.known_bytes for file in self.files)


def open_disk(path: str) -> SourceDisk:
    """The disk whose descriptor, or whose one file, is at `path`; it and all that it names is there, and is whole.

    Whether a compressed file is whole shows when it is read. Raises InvalidDisk, or DiskFileFault for what cannot be
    read, and reads no more than the disk's structures.
    """
    head, compressed = _read_head(path)
    _require_vmdk(path, head)
    directory, name = os.path.split(path)
    if compressed:
        name = name.removesuffix(".gz")
    # The sidecar knows the descriptor by its ending.
    name = f"{name[:-5] if name.casefold().endswith('.vmdk') else name}.vmdk"
    reader = _Directory(directory, {name: (path, compressed)})
    try:
        disk = vmdk.read_disk(name, reader)
        vmdk.require_standalone(disk.descriptor)
        missing = [file for file in disk.file_names if not reader.finds(file)]
        if missing:
            named = ", ".join(os.path.join(directory, file) for file in missing)
            raise errors.InvalidDisk(f"{path} names what is not there: {named}")
        for extent in disk.files:
            _require_size(extent, *reader.located(extent.name), reader.size(extent.name), path)
        if not any(reader.located(file)[1] for file in disk.file_names):
            vmdk.check_disk(name, reader)
    except errors.InvalidDisk as error:
        raise errors.InvalidDisk(reader.with_paths(error.message)) from None
    except OSError as error:
        raise unreadable(error.filename or path, error) from error
    bounds = {file.name: file for file in disk.files}
    return SourceDisk(
        name[: -len(".vmdk")],
        tuple(
            _source_file(file, *reader.located(file), bounds.get(file), disk.capacity_bytes)
            for file in (*disk.file_names[1:], name)
        ),
    )


def _require_size(extent: vmdk.DiskFile, path: str, compressed: bool, size: int, descriptor: str) -> None:
    if not compressed and not extent.fits(size):
        expected = f"{'' if extent.exact else 'at least '}{extent.minimum_size_bytes}"
        raise errors.InvalidDisk(
            f"{path} has {size} bytes, and {expected} by its descriptor, {descriptor}: copy it again, "
            "whole, from where it came"
        )


def unreadable(path: str, error: OSError) -> errors.DiskFileFault:
    return errors.DiskFileFault(f"cannot read {path}: {error.strerror or error}")


def _source_file(name: str, path: str, compressed: bool, bounds: vmdk.DiskFile | None, capacity: int) -> SourceFile:
    try:
        # Not UTF-8: the name cannot be sent, and would be an image's file that not everybody can name.
        name.encode()
    except UnicodeEncodeError:
        raise errors.InvalidDisk(f"the name {name!a} is not UTF-8: rename the file first") from None
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if not compressed:
                data = sum(stop - start for start, stop in data_ranges(seek_in(file.fileno()), 0, size))
                return SourceFile(name, path, False, size, data)
    except OSError as error:
        raise unreadable(path, error) from error
    limit = vmdk.MAX_DESCRIPTOR_BYTES
    if bounds is not None:
        limit = bounds.minimum_size_bytes
        if not bounds.exact:
            limit = max(limit, capacity) * 17 // 16 + SLACK_BYTES
    return SourceFile(name, path, True, None, size, limit, bounds is not None and bounds.exact)


class _Directory:
    """The files beside a descriptor, plain or gzipped; of a gzipped one no more than the head can be read."""

    def __init__(self, directory: str, known: dict[str, tuple[str, bool]]) -> None:
        self._directory = directory
        self._known = known
        # Links to a disk that is all in one directory are as good as that.
        self._places = {os.path.realpath(directory or "."), *(_directory_of(path) for path, _ in known.values())}
        self._heads: dict[str, bytes] = {}

    def located(self, name: str) -> tuple[str, bool]:
        """Where the file is, and whether it is compressed; raises FileNotFoundError."""
        if name not in self._known:
            path = os.path.join(self._directory, name)
            plain = os.path.lexists(path) or not os.path.lexists(f"{path}.gz")
            path = path if plain else f"{path}.gz"
            _require_file(path, os.stat(path))
            self._require_beside(path)
            self._known[name] = (path, not plain)
        return self._known[name]

    def _require_beside(self, path: str) -> None:
        """InvalidDisk for a link to elsewhere: an archive may have one to a secret of whoever imports it."""
        target = os.path.realpath(path)
        if os.path.dirname(target) not in self._places:
            raise errors.InvalidDisk(f"{path} is a link to {target}, in another directory than the disk: copy the file")

    def finds(self, name: str) -> bool:
        try:
            self.located(name)
        except FileNotFoundError:
            return False
        return True

    def with_paths(self, message: str) -> str:
        """A message with the paths of the files in it instead of their names: the disk may call one something else."""
        for name, (path, _) in self._known.items():
            message = message.replace(shown(name), path)
        return message

    def size(self, name: str) -> int:
        path, compressed = self.located(name)
        return len(self._head(name, path)) if compressed else os.stat(path).st_size

    def read(self, name: str, offset: int, length: int) -> bytes:
        path, compressed = self.located(name)
        if compressed:
            return self._head(name, path)[offset : offset + length]
        with open(path, "rb", buffering=0) as file:
            return _pread(file.fileno(), length, offset)

    def _head(self, name: str, path: str) -> bytes:
        if name not in self._heads:
            self._heads[name] = _read_head(path)[0]
        return self._heads[name]


def _directory_of(path: str) -> str:
    return os.path.dirname(os.path.realpath(path))


def _pread(fd: int, length: int, offset: int) -> bytes:
    pieces = []
    while length and (piece := os.pread(fd, length, offset)):
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return b"".join(pieces)


def _read_head(path: str) -> tuple[bytes, bool]:
    """The first bytes of a file, decompressed where it is gzipped, and whether it is."""
    try:
        _require_file(path, os.stat(path))
        with open(path, "rb") as file:
            if file.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
                file.seek(0)
                return file.read(HEAD_BYTES), False
            file.seek(0)
            with gzip.GzipFile(fileobj=file, mode="rb") as stream:
                return stream.read(HEAD_BYTES), True
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise errors.InvalidDisk(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise unreadable(path, error) from error


def _require_file(path: str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise errors.InvalidDisk(f"{path} is a directory: name the VMDK in it")
    if not stat.S_ISREG(status.st_mode):
        raise errors.InvalidDisk(f"{path} is not a file: {_convert(path)}")


def _require_vmdk(path: str, head: bytes) -> None:
    """Raises InvalidDisk, saying what the file is and what to do, for what is certainly no VMDK."""
    if not head:
        raise errors.InvalidDisk(f"{path} is empty, so it is not a VMDK")
    if (other := other_format(head)) is not None:
        remedy = "unpack it first" if other.is_archive else _convert(path)
        raise errors.InvalidDisk(f"{path} is {other.what}, not a VMDK: {remedy}")
    text = len(head) < HEAD_BYTES and b"\0" not in vmdk.without_padding(head)
    if head.startswith(_VMDK_MAGICS) or text:
        return
    plain = path.removesuffix(".gz")
    extent_of = vmdk.descriptor_of(plain)
    descriptor = extent_of or f"{plain}.vmdk"
    if os.path.exists(descriptor):
        raise errors.InvalidDisk(f"{path} is the data of a VMDK: import its descriptor, {descriptor}")
    if extent_of is not None:
        raise errors.InvalidDisk(
            f"{path} is the data of a VMDK, and its descriptor, {descriptor}, is missing: put it there, import that; "
            f"if there is none, {_convert(path)}"
        )
    raise errors.InvalidDisk(f"{path} is not a VMDK; if it is a disk, a raw one, {_convert(path)}")


def _convert(path: str) -> str:
    stem, ending = os.path.splitext(path.removesuffix(".gz"))
    target = f"{stem}-converted.vmdk" if ending == ".vmdk" else f"{stem}.vmdk"
    return f"convert it with qemu-img convert -O vmdk {shlex.quote(path)} {shlex.quote(target)}"


def _without_zeroes(chunk: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    """The data of a chunk, whose first byte is at `position`, in runs between the blocks of zeroes."""
    if chunk == _ZEROES:
        return
    start = 0
    for offset in range(0, len(chunk), BLOCK_BYTES):
        block = chunk[offset : offset + BLOCK_BYTES]
        if block == _ZEROES[: len(block)]:
            if start < offset:
                yield position + start, chunk[start:offset]
            start = offset + len(block)
    if start < len(chunk):
        yield position + start, chunk[start:] if start else chunk
