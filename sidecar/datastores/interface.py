"""What the algorithms need of a place that holds images.

Paths are relative to the datastore's root, with `/` between their parts; `""` is the root. Methods raise
FileNotFoundError when a path is not there and FileExistsError when one that must be new is; every other failure is an
ImagesError that names the datastore, so an I/O error is never taken for "not there".
"""

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from sidecar.locks.interface import HeldLock, LockHolder


class EntryKind(enum.Enum):
    FILE = "file"
    DIRECTORY = "directory"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory. Sizes are bytes, times nanoseconds since the epoch."""

    name: str
    kind: EntryKind
    size: int
    allocated: int
    modified_ns: int
    changed_ns: int
    inode: int  # 0 where the datastore has no such number
    links: int = 1
    """How many names the file has, on the whole file system."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bytes; `free` is what an ordinary writer may still use."""

    capacity: int
    free: int


class Transfer(Protocol):
    """Where a copy says how far it is, and learns that it has to end."""

    def advance(self, done: int, *, cloned: int = 0) -> None:
        """Counts bytes that are done; raises OperationCancelled when nobody wants them any more."""


class DiskCopier(Protocol):
    """Copies one whole disk from one datastore to another by other means than its files."""

    @property
    def begun(self) -> bool:
        """After an error of `copy`: parts of the new disk may be there, or still come."""

    def may_preallocate(self) -> bool:
        """Whether the new disk may take the space of all its bytes, also where the source has holes."""

    def copy(self, source_path: str, path: str, size: int, adapter_type: str | None, transfer: Transfer) -> None:
        """Copies the disk whose descriptor, with that adapter type, is at `source_path`.

        `size` bytes are in its files, for `transfer`. Files that are at the new disk's paths are replaced. The new disk
        has one flat extent, named for its descriptor; which name the descriptor has for it is not said.
        """


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """Where a file of a VM's disk is: a path from the root of each of these datastores, by their names on this host."""

    datastores: tuple[str, ...]
    path: str


@dataclass(frozen=True, slots=True)
class KnownDisk:
    """A disk of a VM: what its server calls it, and where its own file and all its parents are."""

    name: str
    places: tuple[DiskPlace, ...]


@dataclass(frozen=True, slots=True)
class KnownVm:
    """A VM that a server knows; `unknown`: why it is not known what its disks are, else empty."""

    name: str
    disks: tuple[KnownDisk, ...]
    unknown: str


class VmServer(Protocol):
    """A server that knows VMs, running or not; equal to itself for all datastores that are its own."""

    @property
    def name(self) -> str: ...

    def vms(
        self, datastores: Sequence["Datastore"], image_directories: Callable[["Datastore"], Iterable[str]]
    ) -> list[KnownVm]:
        """Its VMs that have files on these, or may have; some requests to the server, however many there are.

        `image_directories` of one of them are what its VMs may use, those first that stay for a while. An ImagesError
        when the server does not tell all VMs, since one that is not told may use any image; or when what it has there
        are other directories than these.
        """


class OpenDirectory(Protocol):
    """A directory that is held while it is read: every answer is of that one, whatever comes to its path meanwhile."""

    def entry(self) -> Entry:
        """The directory itself, without a name."""

    def names(self) -> list[str]:
        """The names in it, without reading any attribute."""

    def entries(self) -> list[Entry]:
        """The names in it with their attributes; names that vanish meanwhile are left out."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset` of a regular file in it, without marking it as in use."""

    def close(self) -> None: ...


class ReadableFile(Protocol):
    """An open file of a datastore. While it is open, its image is in use."""

    inode: int  # 0 where the datastore has no such number
    modified_ns: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; empty at the end of the file."""

    def data_ranges(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """The (offset, length) of what is not a hole in that range, in order; where holes cannot be told, all of it."""

    def require_same(self) -> None:
        """Raises FileChanged when what was read of it may be of another file than the one that was opened."""

    def close(self) -> None: ...


class WritableFile(Protocol):
    """A staged file that is being written."""

    def write(self, offset: int, data: bytes) -> None: ...

    def make_hole(self, offset: int, length: int) -> None:
        """That range reads as zeroes and, where the file system can, takes no space."""

    def resize(self, size: int) -> None: ...

    def size(self) -> int: ...

    def sync(self) -> None: ...

    def clone(self, source: ReadableFile, source_offset: int, offset: int, length: int, transfer: Transfer) -> int:
        """Makes the range equal to the source's: extents shared where possible, else copied with holes kept.

        Returns the bytes done from the start of the range, holes included; fewer than `length` at the source's end.
        """

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Changes:
    """Directories in which something changed, each with the names that did; `lost`: look at everything again."""

    names: dict[str, set[str]]
    lost: bool


class ChangeWatcher(Protocol):
    """Tells of changes in directories, whoever makes them. One thread waits; others may call `wake`."""

    def watch(self, path: str) -> bool:
        """Begins with a directory, before it is read. False when changes there cannot be told: look again and again."""

    def wait(self, timeout: float) -> Changes:
        """Waits for changes, up to `timeout` seconds or until `wake`."""

    def wake(self) -> None: ...

    def close(self) -> None: ...


class Datastore(Protocol):
    """A place that holds images. Safe for use by several threads."""

    name: str
    type: str
    root_path: str
    """Its directory on this host; empty when there is none: then its server alone knows its VMs."""
    shared: bool
    """Other hosts may change it too."""
    fills_holes: bool
    """A hole in what is put there by this host takes space, as zeroes do."""
    volume: str
    """What ESX calls it, below /vmfs/volumes and in brackets: VMs name their disks so."""

    @property
    def reflink(self) -> bool:
        """Copies inside it share their extents with the source."""

    def open_directory(self, path: str) -> OpenDirectory: ...

    def tree(self) -> Mapping[str, OpenDirectory] | None:
        """Every directory by its path, as they are listed all at once; None where one at a time is as fast.

        Staging directories are as the datastore has them, without what is staged elsewhere.
        """

    def names(self, path: str) -> list[str]:
        """Those of `open_directory`, in one call."""

    def entries(self, path: str) -> list[Entry]:
        """Those of `open_directory`, in one call."""

    def entry(self, path: str) -> Entry: ...

    def read_file(self, path: str, limit: int) -> bytes:
        """The first `limit` bytes of a regular file."""

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset` of a regular file, without marking it as in use."""

    def look_ahead(self, path: str) -> None:
        """Fetches the start of a file that is read soon, and what leads to it. A hint: nothing depends on it."""

    def write_file(self, path: str, content: bytes) -> None:
        """Puts a whole file there, durably; an older one is replaced at once, never seen half written."""

    def create_file(self, path: str, modified_ns: int | None = None) -> None:
        """Makes an empty file durably, or leaves one that is there; sets its mtime when given."""

    def set_modified(self, path: str, modified_ns: int) -> AbstractContextManager[int]:
        """Sets a file's mtime, and gives it as it is there, which may be coarser.

        Everybody sees it in the block, and it is durable when that has ended without an error.
        The file is held meanwhile: what becomes durable is that one's, whatever is at the path by then.
        """

    def make_directory(self, path: str, *, parents: bool = False) -> None: ...

    def rename(self, source: str, destination: str) -> None:
        """Moves without replacing: FileExistsError when the destination is there. Durable after sync_directory."""

    def move_disk(self, source: str, destination: str) -> None:
        """`rename` of the disk whose descriptor is at `source`, as the datastore has to be asked for that.

        What the descriptor names may go with it, or stay.
        """

    def remove_file(self, path: str) -> None: ...

    def remove_directory(self, path: str) -> None:
        """Removes an empty directory; FileExistsError when it is not empty."""

    def remove_tree(self, path: str) -> int:
        """Removes a file, or a directory with all in it, following no link; gone already is no error.

        Returns the allocated bytes.
        """

    def remove_disk(self, path: str) -> None:
        """Removes the disk whose descriptor is at the path, as the datastore has to be asked for that.

        What the descriptor names may go with it, or stay; gone already is no error.
        """

    def sync_file(self, path: str) -> None: ...

    def sync_directory(self, path: str) -> None: ...

    def open_readable(self, path: str) -> ReadableFile:
        """Opens a regular file and marks it as in use until it is closed; ImageInUse when it is being removed.

        It was still there when it was marked: it is not removed while it is open.
        """

    def open_writable(self, path: str) -> WritableFile:
        """Opens a regular file, made when it is not there; InvalidRequest when it has another name, maybe elsewhere."""

    def shares_extents_with(self, other: "Datastore") -> bool:
        """Copies from there to here share their bytes instead of taking space."""

    def disk_copier(self, source: "Datastore") -> DiskCopier | None:
        """What copies disks with one flat extent from there to here; None: their files are cloned, as all others."""

    def vm_server(self) -> VmServer | None:
        """Who knows the VMs of the datastore, besides what their files there tell; None when nobody does."""

    def lock(self, path: str, operation: str, timeout: float, check: Callable[[], None] = lambda: None) -> HeldLock:
        """Takes the datastore's lock of that path, waiting up to `timeout` seconds; LockTimeout names who holds it.

        `check` is called several times a second while it waits: what that raises ends the wait, and passes.
        """

    def free_lock(self, path: str) -> None:
        """Takes away what is left of a lock that somebody died over or only began to make; LockTimeout when it is held.

        What is at the path and no lock stays.
        """

    def lock_holder(self, path: str) -> LockHolder | None:
        """Who holds that lock, for showing; None when nobody does, also where a dead process left its file."""

    def interrupt(self) -> None:
        """Ends every wait for a lock, those to come too, with OperationCancelled. Free locks can be had still."""

    def users(self, paths: Sequence[str], image_id: str) -> list[str]:
        """Who has one of these files of an image open, in words; empty when nobody has."""

    def exclude_users(self, paths: Sequence[str], image_id: str) -> AbstractContextManager[None]:
        """Keeps every new reader of these files of an image out until the end; ImageInUse, in words, when one is there.

        The image's id is what mounts have the files under: who has one open in there is named, too.
        """

    def watcher(self) -> ChangeWatcher | None:
        """None where changes by others cannot be told, as on NFS."""

    def capacity(self) -> Capacity: ...

    def unsent(self, directory: str) -> int:
        """Bytes staged elsewhere for the files in that directory, which are to come there yet."""

    def check(self) -> Capacity:
        """Raises DatastoreUnavailable when the datastore cannot be used now."""

    def require_in_place(self) -> None:
        """The part of `check` that every change can afford: DatastoreUnavailable when its path leads elsewhere."""

    def close(self) -> None: ...
