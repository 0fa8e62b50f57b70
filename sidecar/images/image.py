"""An image as it is on its datastore now: its state, its files, its times."""

import enum
import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace

from sidecar.datastores.interface import Datastore, Entry, EntryKind, OpenDirectory
from sidecar.errors import ImageNotFound, InvalidDisk, InvalidRequest
from sidecar.images import vmdk
from sidecar.images.layouts.interface import Layout
from sidecar.images.names import (
    LOCK_SUFFIX,
    TIMESTAMP,
    TOMBSTONE,
    UNUSED_MARKER,
    descriptor_name,
    is_bookkeeping,
)

# Two of the problems that an image may have; without its timestamp alone, it can be repaired.
NO_DESCRIPTOR = "it has no descriptor"
NO_TIMESTAMP = "its timestamp file is not there"

_MARKER_LIMIT = 64
_LATEST_SECONDS = 253_402_300_799  # the end of the year 9999, where the contract's times end
_START_BYTES = 4096
_MOST_MISPLACED = 100  # names that are told


class ImageState(enum.Enum):
    VALID = "VALID"
    INCOMPLETE = "INCOMPLETE"
    TOMBSTONED = "TOMBSTONED"


class FileKind(enum.IntEnum):
    """In the order of listing: a `cp -r` is complete with the last file that it copies, the descriptor."""

    COMPANION = 0
    EXTENT = 1
    DESCRIPTOR = 2


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Sizes are bytes, times nanoseconds since the epoch."""

    name: str
    kind: FileKind
    size: int
    allocated: int
    modified_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class ImageKey:
    """Names an image among all datastores of a sidecar."""

    datastore: str
    image_id: str

    def __str__(self) -> str:
        return f"{self.datastore}/{self.image_id}"


@dataclass(frozen=True, slots=True)
class Image:
    """One image. Times are nanoseconds since the epoch, None where there is none; sizes are bytes.

    Where they are slow to read, `details_known` may be False: then the disk was not read, so that its capacity, its
    type, which file is an extent, and what is wrong are not known; files, sizes and times may be missing, too.
    """

    key: ImageKey
    directory: str
    state: ImageState
    details_known: bool = True
    files: tuple[ImageFile, ...] = ()
    capacity: int = 0
    disk_type: str = ""
    created_ns: int | None = None
    touched_ns: int | None = None
    tombstoned_ns: int | None = None
    marked_unused_s: int | None = None
    problems: tuple[str, ...] = ()
    # What tells that the directory has changed since: its inode and ctime, and the timestamp file's mtime.
    fingerprint: tuple[int, int, int] = field(default=(0, 0, 0), compare=False)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def allocated(self) -> int:
        return sum(file.allocated for file in self.files)

    def path(self, name: str) -> str:
        return f"{self.directory}/{name}"


def image_state(names: set[str], image_id: str) -> ImageState:
    if TOMBSTONE in names:
        return ImageState.TOMBSTONED
    if descriptor_name(image_id) in names and TIMESTAMP in names:
        return ImageState.VALID
    return ImageState.INCOMPLETE


def read_image_names(datastore: Datastore, layout: Layout, image_id: str) -> Image:
    """The image's state, from the names in its directory alone; ImageNotFound when there is no image."""
    key = ImageKey(datastore.name, image_id)
    directory = layout.image_directory(image_id)
    with closing(_open_directory(datastore, directory, key)) as opened:
        place = opened.entry()
        names = set(opened.names())
    _require_something(key, names)
    return Image(key, directory, image_state(names, image_id), details_known=False, fingerprint=(place.inode, 0, 0))


def read_image(datastore: Datastore, layout: Layout, image_id: str) -> Image:
    """The image with everything that its directory and its descriptor say; ImageNotFound when there is no image.

    A disk that is not as it should be is told in `problems`; an I/O error is raised.
    """
    directory = layout.image_directory(image_id)
    with closing(_open_directory(datastore, directory, ImageKey(datastore.name, image_id))) as opened:
        return read_opened_image(datastore, layout, image_id, opened)


def read_opened_image(datastore: Datastore, layout: Layout, image_id: str, opened: OpenDirectory) -> Image:
    """As `read_image`, of its open directory."""
    key, directory = ImageKey(datastore.name, image_id), layout.image_directory(image_id)
    place = opened.entry()
    entries = {entry.name: entry for entry in opened.entries()}
    _require_something(key, set(entries))
    problems = _misplaced(entries)
    disk, fault = _read_disk(opened, image_id, entries)
    if fault:
        problems.append(fault)
    if TIMESTAMP not in entries:
        problems.append(NO_TIMESTAMP)
    marked_unused_s = _read_marker(opened, entries, problems)
    kinds = {} if disk is None else dict.fromkeys(disk.file_names, FileKind.EXTENT)
    kinds[descriptor_name(image_id)] = FileKind.DESCRIPTOR
    return replace(
        _listed(key, directory, place, entries, kinds),
        details_known=True,
        capacity=disk.capacity_bytes if disk else 0,
        disk_type=disk.descriptor.create_type if disk else "",
        marked_unused_s=marked_unused_s,
        problems=tuple(problems),
    )


def read_listed_image(datastore: Datastore, layout: Layout, image_id: str, listed: OpenDirectory) -> Image:
    """What a listing of the image's directory says, without reading anything; ImageNotFound when it is no image's."""
    key = ImageKey(datastore.name, image_id)
    entries = {entry.name: entry for entry in listed.entries()}
    _require_something(key, set(entries))
    kinds = {descriptor_name(image_id): FileKind.DESCRIPTOR}
    return _listed(key, layout.image_directory(image_id), listed.entry(), entries, kinds)


def _listed(
    key: ImageKey, directory: str, place: Entry, entries: dict[str, Entry], kinds: Mapping[str, FileKind]
) -> Image:
    files = sorted(
        (
            _image_file(entry, kinds.get(entry.name, FileKind.COMPANION))
            for entry in entries.values()
            if entry.kind is EntryKind.FILE and not is_bookkeeping(entry.name)
        ),
        key=lambda file: (file.kind, file.name),
    )
    timestamp, tombstone = entries.get(TIMESTAMP), entries.get(TOMBSTONE)
    if timestamp and timestamp.kind is not EntryKind.FILE:
        timestamp = None
    return Image(
        key,
        directory,
        image_state(set(entries) - (set() if timestamp else {TIMESTAMP}), key.image_id),
        details_known=False,
        files=tuple(files),
        created_ns=min((file.modified_ns for file in files), default=None),
        touched_ns=timestamp.modified_ns if timestamp else None,
        tombstoned_ns=tombstone.modified_ns if tombstone else None,
        fingerprint=(
            place.inode or _number_of(entries),
            place.changed_ns,
            timestamp.modified_ns if timestamp else 0,
        ),
    )


def _number_of(entries: dict[str, Entry]) -> int:
    """What stands for a directory where there are no inodes: another number when any file changed that is listed here,
    but for the time of the last use."""
    told = ((e.name, e.size, e.modified_ns) for e in entries.values() if e.kind is EntryKind.FILE)
    text = repr(sorted(each for each in told if each[0] != TIMESTAMP and not each[0].endswith(LOCK_SUFFIX)))
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=7).digest())


def not_found(key: ImageKey) -> ImageNotFound:
    return ImageNotFound(f"there is no image {key}; see `imagectl ls {key.datastore}`")


class DirectoryReader:
    """What the vmdk module needs of a directory. `sizes` are known already, so that no attribute is read twice."""

    def __init__(self, read_range: Callable[[str, int, int], bytes], sizes: dict[str, int]) -> None:
        """`read_range` of a file's name, an offset and a length."""
        self._read_range, self._sizes = read_range, sizes
        # The file read last, and its first bytes: a descriptor is read twice, its magic first.
        self._start = ("", b"")

    def size(self, name: str) -> int:
        if name not in self._sizes:
            raise FileNotFoundError(name)
        return self._sizes[name]

    def read(self, name: str, offset: int, length: int) -> bytes:
        if offset + length > _START_BYTES:
            return self._read_range(name, offset, length)
        if self._start[0] != name:
            self._start = (name, self._read_range(name, 0, _START_BYTES))
        return self._start[1][offset : offset + length]


def reader_of(datastore: Datastore, directory: str, sizes: dict[str, int]) -> DirectoryReader:
    """For whoever does not hold the directory."""
    return DirectoryReader(
        lambda name, offset, length: datastore.read_range(f"{directory}/{name}", offset, length), sizes
    )


def _open_directory(datastore: Datastore, directory: str, key: ImageKey) -> OpenDirectory:
    try:
        return datastore.open_directory(directory)
    except (FileNotFoundError, InvalidRequest):  # the latter: it is no directory
        raise not_found(key) from None


def _read_disk(directory: OpenDirectory, image_id: str, entries: dict[str, Entry]) -> tuple[vmdk.Disk | None, str]:
    """The disk, as far as it can be read, and what is wrong with it: only the presence and the sizes of its files."""
    sizes = {entry.name: entry.size for entry in entries.values() if entry.kind is EntryKind.FILE}
    try:
        disk = vmdk.read_disk(descriptor_name(image_id), DirectoryReader(directory.read_range, sizes))
    except FileNotFoundError:
        return None, NO_DESCRIPTOR
    except InvalidDisk as error:
        return None, error.message
    for file in disk.files:
        if file.name not in sizes:
            return disk, f"the extent {file.name!r} is not there"
        if not file.fits(sizes[file.name]):
            return disk, f"the extent {file.name!r} has {sizes[file.name]} bytes, not {file.minimum_size_bytes}"
    return disk, ""


def _read_marker(directory: OpenDirectory, entries: dict[str, Entry], problems: list[str]) -> int | None:
    marker = entries.get(UNUSED_MARKER)
    if marker is None or marker.kind is not EntryKind.FILE:
        return None
    try:
        # Others may write a fraction. Rounded down, that is: less is taken for unused.
        seconds = math.floor(float(directory.read_range(UNUSED_MARKER, 0, _MARKER_LIMIT)))
    except FileNotFoundError:
        return None
    except (ValueError, OverflowError, InvalidRequest):  # the last: it is no plain file any more
        seconds = -1
    if not 0 <= seconds <= _LATEST_SECONDS:
        problems.append(f"{UNUSED_MARKER} does not hold a time")
        return None
    return seconds


def _require_something(key: ImageKey, names: set[str]) -> None:
    # Staging directories and locks inside an image's directory (layout vsan) make no image.
    if not any(name in (TIMESTAMP, TOMBSTONE) or not is_bookkeeping(name) for name in names):
        raise not_found(key)


def _misplaced(entries: dict[str, Entry]) -> list[str]:
    """What is not a plain file and should be; not of every one, or nobody could be told of the image."""
    names = [entry.name for entry in entries.values() if _is_misplaced(entry)]
    problems = [f"{name!r} is not a plain file" for name in names[:_MOST_MISPLACED]]
    if more := len(names) - len(problems):
        problems.append(f"{more} more are not plain files")
    return problems


def _is_misplaced(entry: Entry) -> bool:
    if entry.kind is EntryKind.DIRECTORY:
        return not is_bookkeeping(entry.name) or entry.name in (TIMESTAMP, TOMBSTONE, UNUSED_MARKER)
    return entry.kind is EntryKind.OTHER


def _image_file(entry: Entry, kind: FileKind) -> ImageFile:
    return ImageFile(entry.name, kind, entry.size, entry.allocated, entry.modified_ns, entry.inode)
