"""A datastore of a vSphere server that this host does not see as a directory: everything is asked of the server.

What is durable, and what others see, is the server's to do: it has answered when it is done, so there is nothing to
sync here but what is staged on this host. Files of an image in use are known of this process alone; that a VM uses one
is known by the server's inventory.
"""

import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress

from sidecar.datastores.api_locks import LockDirectories
from sidecar.datastores.api_readable import ApiFiles, ApiReadable, entry_of
from sidecar.datastores.interface import (
    Capacity,
    ChangeWatcher,
    Datastore,
    DiskCopier,
    Entry,
    EntryKind,
    OpenDirectory,
    ReadableFile,
    VmServer,
    WritableFile,
)
from sidecar.datastores.open_here import OpenHere
from sidecar.datastores.server_copy import server_copier
from sidecar.datastores.server_vms import ServerVms
from sidecar.datastores.spool import Spool, SpooledFile, SpooledReadable, SpooledWritable
from sidecar.errors import (
    DatastoreUnavailable,
    DiskFileFault,
    ImagesError,
    InvalidRequest,
    LockTimeout,
    NoSpace,
    OperationCancelled,
)
from sidecar.locks.directories import DirectoryLocks, is_made_for
from sidecar.locks.interface import HeldLock, LockHolder
from sidecar.vsphere.disks import (
    DESCRIPTOR_BYTES,
    DatastoreAddress,
    copy_task,
    move_disk,
    names_other_directories,
    remove_disk,
)
from sidecar.vsphere.files import ServerFile, ServerFiles
from sidecar.vsphere.folder import Folder
from sidecar.vsphere.inventory import ServerDatastore
from sidecar.vsphere.known import KnownDatastore
from sidecar.vsphere.tasks import Follow

_LOCK_SUFFIX = ".ec_lock"
_TRIES = 8  # to remove a directory while others do, or use it
_WHOLE = 1 << 20  # of reads in order, each piece of what a download brings

_log = logging.getLogger(__name__)


class VsphereApiDatastore:
    """A datastore reached by its server's API alone. Safe for use by several threads."""

    type = "vsphere"
    root_path = ""
    shared = True
    reflink = False
    fills_holes = True

    def __init__(self, name: str, address: DatastoreAddress) -> None:
        """Asks nothing of the server yet: one that is away now may come back."""
        self.name = name
        self.address = address
        self.volume = address.datastore.rpartition("/")[2]
        self.known = KnownDatastore(address)
        self._files = ServerFiles(address.connection, self.known)
        self._folder = Folder(address.connection, self.known)
        self._spool = Spool(name)
        self._locks = DirectoryLocks(LockDirectories(self._files, self._folder), name, wait=self._wait_for_lock)
        self._interrupted = threading.Event()
        self._open_here = OpenHere(name)
        self._readable = ApiFiles(name, address.connection, self.known, self._files, self._folder, self._open_here)

    def close(self) -> None:
        self._spool.close()

    def tree(self) -> dict[str, OpenDirectory] | None:
        return {path: _Listed(self, path, files) for path, files in self._files.tree().items()}

    def open_directory(self, path: str) -> OpenDirectory:
        return _Listed(self, path, self._list(path), self._spooled(path))

    def names(self, path: str) -> list[str]:
        with closing(self.open_directory(path)) as directory:
            return directory.names()

    def entries(self, path: str) -> list[Entry]:
        with closing(self.open_directory(path)) as directory:
            return directory.entries()

    def entry(self, path: str) -> Entry:
        with self._spool.using(path) as spooled:
            if spooled:
                return spooled.entry(path.rpartition("/")[2])
        if not path:
            return Entry("", EntryKind.DIRECTORY, 0, 0, 0, 0, 0)
        return entry_of(self._files.entry(path))

    def read_file(self, path: str, limit: int) -> bytes:
        return self.read_range(path, 0, limit)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        with self._spool.using(path) as spooled:
            return spooled.read(offset, length) if spooled else self._folder.read(path, offset, length)

    def look_ahead(self, path: str) -> None:
        """Nothing is fetched in advance."""

    def write_file(self, path: str, content: bytes) -> None:
        directory = path.rpartition("/")[0]
        temporary = f"{directory}/.{uuid.uuid4().hex}"
        self._require_directory(directory)
        try:
            self._put(temporary, content)
            self._files.move(temporary, path, replace=True)
        except BaseException:
            with suppress(Exception):
                self._files.remove(temporary)
            raise

    def create_file(self, path: str, modified_ns: int | None = None) -> None:
        """The server sets the time: its clock is the datastore's."""
        self._require_directory(path.rpartition("/")[0])
        if modified_ns is None:
            with suppress(FileNotFoundError):
                self._files.entry(path)
                return
        self._put(path, b"")

    @contextmanager
    def set_modified(self, path: str, modified_ns: int) -> Iterator[int]:
        """Writes the file anew, which must be empty: the time is that of the server's clock."""
        with self._spool.using(path) as spooled:
            if spooled:
                os.utime(spooled.fd, ns=(modified_ns, modified_ns))
                spooled.note_change()  # the time of what the server has is that of when it came there
                self._send(spooled)
                yield modified_ns
                return
        before = self._files.entry(path)
        if before.size or before.is_directory:
            raise InvalidRequest(f"{self.name}: {path} is not an empty file: its time cannot be set by the server")
        self._put(path, b"")
        yield self._files.entry(path).modified_ns

    def make_directory(self, path: str, *, parents: bool = False) -> None:
        try:
            self._files.make_directory(path)
        except FileNotFoundError:
            parent = path.rpartition("/")[0]
            if not (parents and parent):
                raise
            with suppress(FileExistsError):
                self.make_directory(parent, parents=True)
            self._files.make_directory(path)

    def rename(self, source: str, destination: str) -> None:
        """What is staged of a directory, or of a file that gets to another one, is given up in any case: it was sent,
        and nobody stages more in what was to be published."""
        stays = source.rpartition("/")[0] == destination.rpartition("/")[0]
        if stays and self._spool.has(destination):
            raise FileExistsError(destination)
        with self._spool.using(source) as spooled:
            if spooled and stays:
                if spooled.on_server:
                    self._move_staged(source, destination, spooled)
                else:
                    self._require_absent(destination)
                self._spool.rename(source, destination)
                return
        self._give_up_staged(source, destination)
        self._move(source, destination)

    def _give_up_staged(self, source: str, destination: str) -> None:
        with self._spool.using(source) as spooled:
            if spooled and spooled.changed:
                raise InvalidRequest(f"{self.name}: {source} is not complete: it cannot be moved to {destination}")
        self._spool.drop(source)

    def _require_absent(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._files.entry(path)
            raise FileExistsError(path)

    def _move_staged(self, source: str, destination: str, spooled: SpooledFile) -> None:
        try:
            self._move(source, destination)
        except FileNotFoundError:
            if not spooled.changed:
                raise

    def move_disk(self, source: str, destination: str) -> None:
        for path in (source, _data_of(source)):
            self._give_up_staged(path, destination)
        found = self.known()
        try:
            self._move(source, destination, lambda: move_disk(self.address.connection, found, source, destination))
        except (FileNotFoundError, DiskFileFault):
            # A server may have it that a disk of this kind is none, or miss its data.
            if not self._was_moved(source, destination):
                self._move(source, destination)

    def remove_file(self, path: str) -> None:
        dropped = self._spool.drop(path)
        try:
            self._files.remove(path)
        except FileNotFoundError:
            if not dropped:
                raise

    def remove_directory(self, path: str) -> None:
        """Under the lock in it: the server removes whatever is there, and who puts something there has that lock.

        Those who only try to take it find that there is nothing to be locked.
        """
        lock = f"{path}/lock{_LOCK_SUFFIX}"

        def require_empty() -> None:
            if not all(is_made_for(lock, file.name) for file in self._list(path)):
                raise FileExistsError(path)

        for _ in range(_TRIES):
            require_empty()
            try:
                with self.lock(lock, "remove", timeout=0):
                    require_empty()
                    self._files.remove(path)
                    return
            except LockTimeout:
                # Who had it may have let go of it since, and left the directory, as this try to take it was in there.
                if lock.rpartition("/")[2] in self.names(path):
                    break
        raise FileExistsError(path)

    def remove_tree(self, path: str) -> int:
        self._spool.drop(path)
        try:
            freed = self._size_of(path)
            try:
                self._files.remove(path)
            except DiskFileFault:
                if not self._files.entry(path).is_directory:
                    raise
                # Of some servers it is reported that they remove no directory with disks in it.
                self._remove_disks_below(path)
                self._files.remove(path)
        except FileNotFoundError:
            return 0
        return freed

    def _remove_disks_below(self, path: str) -> None:
        for directory, files in self._files.tree(path).items():
            # A descriptor has a shorter name than what it names, which goes with it.
            for name in sorted((file.name for file in files if file.name.endswith(".vmdk")), key=len):
                with suppress(FileNotFoundError):
                    self._remove_disk_file(f"{directory}/{name}")

    def _remove_disk_file(self, path: str) -> None:
        try:
            self._files.remove(path)
        except DiskFileFault:
            self.remove_disk(path)

    def remove_disk(self, path: str) -> None:
        with suppress(FileNotFoundError):  # of what it names, too
            if not names_other_directories(self.read_file(path, DESCRIPTOR_BYTES)):
                remove_disk(self.address.connection, self.known(), path)
        with suppress(FileNotFoundError):
            self._files.remove(path)

    def sync_file(self, path: str) -> None:
        with self._spool.using(path) as spooled:
            if spooled:
                self._send(spooled)

    def sync_directory(self, path: str) -> None:
        """The server has done what it was asked for."""

    def open_readable(self, path: str) -> ReadableFile:
        if spooled := self._spool.take(path):
            return SpooledReadable(spooled)
        return self._readable.open(path)

    def open_writable(self, path: str) -> WritableFile:
        return SpooledWritable(self._spool.take(path) or self._spool_file(path), self._send, self._lend)

    def shares_extents_with(self, other: Datastore) -> bool:
        return False

    def disk_copier(self, source: Datastore) -> DiskCopier | None:
        return server_copier(source, self)

    def vm_server(self) -> VmServer:
        return ServerVms(self.address.connection)

    def is_proved(self, found: ServerDatastore) -> bool:
        return True

    def require_same(self, found: ServerDatastore, directory: str, follow: Follow) -> None:
        """The server is asked for it in any case."""

    def lock(self, path: str, operation: str, timeout: float, check: Callable[[], None] = lambda: None) -> HeldLock:
        return self._locks.acquire(path, operation, timeout, check)

    def free_lock(self, path: str) -> None:
        if self._files.entry(path).is_directory and not self._list(path):
            with suppress(FileExistsError):  # not empty any more
                self.remove_directory(path)
        else:
            self.lock(path, "reap", timeout=0).release()

    def lock_holder(self, path: str) -> LockHolder | None:
        return self._locks.holder(path)

    def interrupt(self) -> None:
        self._interrupted.set()

    def _wait_for_lock(self, seconds: float) -> None:
        if self._interrupted.wait(seconds):
            raise OperationCancelled(f"{self.name}: no longer waiting for a lock: the sidecar is shutting down")

    def users(self, paths: Sequence[str], image_id: str) -> list[str]:
        return self._open_here.users(paths)

    def exclude_users(self, paths: Sequence[str], image_id: str) -> AbstractContextManager[None]:
        return self._open_here.excluded(paths)

    def watcher(self) -> ChangeWatcher | None:
        return None

    def capacity(self) -> Capacity:
        return Capacity(*self.known.capacity())

    def unsent(self, directory: str) -> int:
        return self._spool.unsent(directory)

    def check(self) -> Capacity:
        found = self.known.refresh()
        self._locks.let_go_of_left()
        return Capacity(found.capacity, found.free)

    def require_in_place(self) -> None:
        """The server finds the datastore by what it is, not by a path that something else may be mounted over."""

    def _list(self, path: str) -> list[ServerFile]:
        try:
            return self._files.entries(path)
        except DatastoreUnavailable:
            # To a server, a file is no such directory, or an argument that it does not understand.
            if path and not self._files.entry(path).is_directory:
                raise InvalidRequest(f"{self.name}: {path} is not a directory") from None
            return self._files.entries(path)  # it may be one since; else this says what is wrong

    def _spooled(self, directory: str) -> list[Entry]:
        found = []
        for name in self._spool.names(directory):
            with self._spool.using(f"{directory}/{name}") as spooled:
                if spooled:
                    found.append(spooled.entry(name))
        return found

    def _require_directory(self, path: str) -> None:
        """FileNotFoundError when it is not there: some servers make it for a file that is put into it."""
        if path and not self._files.entry(path).is_directory:
            raise InvalidRequest(f"{self.name}: {path} is not a directory")

    def _size_of(self, path: str) -> int:
        try:
            found = self._files.tree(path)
        except (FileNotFoundError, DatastoreUnavailable):
            # To a server, a file is no such directory, or an argument that it does not understand.
            entry = self._files.entry(path)
            if entry.is_directory:
                raise
            return entry.size
        return sum(file.size for files in found.values() for file in files if not file.is_directory)

    def _spool_file(self, path: str) -> SpooledFile:
        """The file as it is on the server; empty when there is none."""
        try:
            entry = self._files.entry(path)
        except FileNotFoundError:
            return self._spool.make(path, (), on_server=False)
        if entry.is_directory:
            raise InvalidRequest(f"{self.name}: {path} is not a regular file")
        return self._spool.make(path, self._content(path) if entry.size else (), on_server=True)

    def _content(self, path: str) -> Iterator[bytes]:
        with closing(self._folder.open(path, 0)) as download:
            while piece := download.read(_WHOLE):
                yield piece

    def _move(self, source: str, destination: str, move: Callable[[], None] | None = None) -> None:
        try:
            move() if move else self._files.move(source, destination)
        except DatastoreUnavailable as error:
            if not self._was_moved(source, destination):
                raise
            _log.info("moved without an answer datastore=%s path=%s error=%s", self.name, destination, error)

    def _was_moved(self, source: str, destination: str) -> bool:
        """As far as can be told now; nothing was there before, or that would have been the answer."""
        with suppress(ImagesError, FileNotFoundError):
            self._files.entry(destination)
            try:
                self._files.entry(source)
            except FileNotFoundError:
                return True
        return False

    def _put(self, path: str, content: bytes) -> None:
        self._folder.write(path, len(content), lambda: [content])

    def _send(self, file: SpooledFile) -> None:
        with file.sending() as needed:
            if not needed:
                return
            self._require_directory(file.path.rpartition("/")[0])
            source = file.wholly_borrowed()
            if isinstance(source, ApiReadable):
                self._copy_on_server(source, file)
            else:
                file.fill()
                self._upload(file)

    def _upload(self, file: SpooledFile) -> None:
        path, size = file.path, file.size
        try:
            self._folder.write(path, size, lambda: file.pieces(size))
        except DatastoreUnavailable as error:
            if not isinstance(error.__cause__, TimeoutError):  # or who waits for silence would wait twice
                self._require_room(path, size, error)
            raise

    def _require_room(self, path: str, size: int, error: DatastoreUnavailable) -> None:
        """NoSpace when that is why an upload broke off: a server whose datastore is full may just hang up."""
        arrived = 0
        try:
            with suppress(FileNotFoundError):
                arrived = self._folder.size(path)
            free = self.capacity().free
        except ImagesError:
            return
        if size - arrived > free:
            raise NoSpace(
                f"{self.name} is full: of {size} bytes of {path} it has {arrived}, and {free} are free; purge images "
                "that are not needed, or make the datastore larger"
            ) from error

    def _lend(self, source: ReadableFile) -> ApiReadable | None:
        if isinstance(source, ApiReadable) and source.origin.connection is self.address.connection:
            return source.again()
        return None

    def _copy_on_server(self, source: ApiReadable, file: SpooledFile) -> None:
        """Has the server copy a file; the data of a disk is copied with its descriptor, which is put right then."""
        if not self._copied_with_descriptor(source, file):
            self._files.copy(source.origin.known(), source.path, file.path, self._require_not_ended)
        source.note_read()
        source.require_same()
        arrived = self._folder.size(file.path)
        if arrived != file.size:
            raise DiskFileFault(f"{self.name}: {file.path} has {arrived} bytes, and {source.path} {file.size}")

    def _copied_with_descriptor(self, source: ApiReadable, file: SpooledFile) -> bool:
        descriptor, source_descriptor = _descriptor_of(file.path), _descriptor_of(source.path)
        with self._spool.using(descriptor) as spooled:
            if spooled is None or not source_descriptor:
                return False
            try:
                self._copy_disk(source.origin.known(), source_descriptor, descriptor, file.size)
            except FileNotFoundError:
                return False  # the descriptor of that data has another name
            spooled.note_change()
            self._send(spooled)
            return True

    def _copy_disk(self, source: ServerDatastore, source_path: str, path: str, size: int) -> None:
        for name in (path, _data_of(path)):
            with suppress(FileNotFoundError):
                self._files.remove(name)
        task = copy_task(self.address.connection, source, source_path, self.known(), path, size=size)
        task.run(self._require_not_ended)

    def _require_not_ended(self, percent: int) -> None:
        self._wait_for_lock(0)


class _Listed:
    """A directory as it was listed."""

    def __init__(
        self,
        datastore: VsphereApiDatastore,
        path: str,
        files: Sequence[ServerFile],
        spooled: Sequence[Entry] = (),
    ) -> None:
        self._datastore, self._path = datastore, path
        self._entries = {entry.name: entry for entry in (*map(entry_of, files), *spooled)}

    def entry(self) -> Entry:
        return Entry("", EntryKind.DIRECTORY, 0, 0, 0, 0, 0)

    def names(self) -> list[str]:
        return list(self._entries)

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if name in self._entries and self._entries[name].kind is not EntryKind.FILE:
            raise InvalidRequest(f"{self._datastore.name}: {self._path}/{name} is not a regular file")
        return self._datastore.read_range(f"{self._path}/{name}", offset, length)

    def close(self) -> None:
        """Nothing is held."""


def _data_of(descriptor: str) -> str:
    """Where ESX puts the data of a disk."""
    return f"{descriptor.removesuffix('.vmdk')}-flat.vmdk"


def _descriptor_of(path: str) -> str:
    """Of the disk whose data is at the path, by the names that ESX gives both; empty for any other file."""
    return f"{path.removesuffix('-flat.vmdk')}.vmdk" if path.endswith("-flat.vmdk") else ""
