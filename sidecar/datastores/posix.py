"""A datastore that this host sees as a directory: a local file system, or NFS.

The root is held open: when the file system below is unmounted or another one is mounted over it, operations fail
or go on where the images are; they never take an empty mount point for an empty datastore.
"""

import errno
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass

from sidecar.beneath import open_beneath, open_directory_beneath, parent_of
from sidecar.datastores import open_files
from sidecar.datastores.behind_mounts import with_openers
from sidecar.datastores.faults import Faults
from sidecar.datastores.inotify import InotifyWatcher
from sidecar.datastores.interface import (
    Capacity,
    Datastore,
    DiskCopier,
    Entry,
    EntryKind,
    OpenDirectory,
    ReadableFile,
    VmServer,
    WritableFile,
)
from sidecar.datastores.posix_files import (
    PosixDirectory,
    PosixReadable,
    PosixWritable,
    make_entry,
    open_regular,
    read_up_to,
    remove_tree,
    write_all,
)
from sidecar.datastores.renaming import rename_no_replace
from sidecar.datastores.transfer import can_clone
from sidecar.datastores.writers import Writers
from sidecar.errors import (
    DatastoreUnavailable,
    ImageInUse,
    ImagesError,
    InvalidRequest,
    OperationCancelled,
)
from sidecar.locks.directories import DirectoryLocks
from sidecar.locks.files import FileLocks, LockKind
from sidecar.locks.flock import Flock
from sidecar.locks.identity import Identity
from sidecar.locks.interface import DatastoreLocks, HeldLock, LockHolder

_LOOK_AHEAD_BYTES = 4096
# For how long a file that may just be being closed is no reason to refuse a purge.
_CLOSING_SECONDS = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Root:
    """The open root, and what was found out about the file system that it is on."""

    fd: int
    device: int
    reflink: bool
    locks: DatastoreLocks
    directories: DirectoryLocks  # of hosts without a path


class PosixDatastore:
    """A datastore on a directory of this host. Safe for use by several threads."""

    fills_holes = False

    def __init__(
        self,
        name: str,
        root_path: str,
        datastore_type: str = "local",
        lock_kind: LockKind | None = None,
        writers: Writers | None = None,
    ) -> None:
        """Opens nothing yet: a datastore that is away now may come back. The locks are flock's when not told.

        `writers` of all datastores that may lie on the same disk; without, of this one.
        """
        self.name = name
        self.type = datastore_type
        self.root_path = os.path.abspath(root_path)
        self.shared = datastore_type != "local"
        self.volume = name
        self._lock_kind = lock_kind or Flock()
        self._writers = writers or Writers()
        self._faults = Faults(name, self.root_path)
        self._opening = threading.Lock()  # guards the root
        self._root: _Root | None = None
        self._closed = False
        self._interrupted = threading.Event()

    def close(self) -> None:
        with self._opening:
            root, self._root, self._closed = self._root, None, True
        if root:
            os.close(root.fd)

    @property
    def reflink(self) -> bool:
        return self._open_root().reflink

    @property
    def _root_fd(self) -> int:
        return self._open_root().fd

    def _open_root(self) -> "_Root":
        """The root, opened on first use; DatastoreUnavailable while it is no directory that can be opened."""
        if self._root:
            return self._root
        with self._opening:
            if self._closed:
                raise DatastoreUnavailable(f"datastore {self.name} was closed: the sidecar is shutting down")
            if self._root is None:
                try:
                    fd = os.open(self.root_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError as error:
                    raise DatastoreUnavailable(
                        f"datastore {self.name}: cannot open {self.root_path}: {error.strerror}; create or mount it"
                    ) from error
                directories = DirectoryLocks(_LockDirectories(self), self.name)
                locks = FileLocks(fd, self._lock_kind, directories, wait=self._wait_for_lock)
                self._root = _Root(fd, os.fstat(fd).st_dev, can_clone(fd), locks, directories)
            return self._root

    def open_directory(self, path: str) -> OpenDirectory:
        with self._faults.during("list", path):
            return PosixDirectory(self._faults, path, self._open_directory(path))

    def tree(self) -> None:
        return None

    def names(self, path: str) -> list[str]:
        with closing(self.open_directory(path)) as directory:
            return directory.names()

    def entries(self, path: str) -> list[Entry]:
        with closing(self.open_directory(path)) as directory:
            return directory.entries()

    def entry(self, path: str) -> Entry:
        with self._faults.during("look at", path):
            if not path:
                return make_entry("", os.fstat(self._root_fd))
            with parent_of(self._root_fd, path) as (parent, name):
                return make_entry(name, os.stat(name, dir_fd=parent, follow_symlinks=False))

    def read_file(self, path: str, limit: int) -> bytes:
        with self._faults.during("read", path), self._opened(path, os.O_RDONLY) as fd:
            return read_up_to(fd, limit)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        with self._faults.during("read", path), self._opened(path, os.O_RDONLY) as fd:
            return os.pread(fd, length, offset)

    def look_ahead(self, path: str) -> None:
        with suppress(OSError, ImagesError):
            fd = open_beneath(self._root_fd, path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                os.posix_fadvise(fd, 0, _LOOK_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    def write_file(self, path: str, content: bytes) -> None:
        with self._faults.during("write", path), parent_of(self._root_fd, path) as (parent, name):
            temporary = f".{uuid.uuid4().hex}"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent)
            try:
                try:
                    write_all(fd, content)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                os.unlink(temporary, dir_fd=parent)
                raise
            os.fsync(parent)

    def create_file(self, path: str, modified_ns: int | None = None) -> None:
        with self._faults.during("create", path), parent_of(self._root_fd, path) as (parent, name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(name, flags, 0o644, dir_fd=parent)
            try:
                if modified_ns is not None:
                    os.utime(fd, ns=(modified_ns, modified_ns))
                os.fsync(fd)
            finally:
                os.close(fd)
            os.fsync(parent)

    @contextmanager
    def set_modified(self, path: str, modified_ns: int) -> Iterator[int]:
        with self._faults.during("touch", path), self._opened(path, os.O_RDONLY) as fd:
            os.utime(fd, ns=(modified_ns, modified_ns))
            yield os.fstat(fd).st_mtime_ns
            os.fsync(fd)

    def make_directory(self, path: str, *, parents: bool = False) -> None:
        with self._faults.during("make the directory", path):
            parts = path.split("/")
            if parents:
                for depth in range(1, len(parts)):
                    try:
                        self._make_one_directory("/".join(parts[:depth]))
                    except FileExistsError:
                        continue
            self._make_one_directory(path)

    def rename(self, source: str, destination: str) -> None:
        with (
            self._faults.during("move", f"{source} to {destination}"),
            parent_of(self._root_fd, source) as (source_parent, source_name),
            parent_of(self._root_fd, destination) as (parent, name),
        ):
            rename_no_replace(source_parent, source_name, parent, name)

    def move_disk(self, source: str, destination: str) -> None:
        self.rename(source, destination)

    def remove_file(self, path: str) -> None:
        with self._faults.during("remove", path), parent_of(self._root_fd, path) as (parent, name):
            os.unlink(name, dir_fd=parent)

    def remove_directory(self, path: str) -> None:
        with self._faults.during("remove", path), parent_of(self._root_fd, path) as (parent, name):
            try:
                os.rmdir(name, dir_fd=parent)
            except OSError as error:
                if error.errno == errno.ENOTEMPTY:
                    raise FileExistsError(error.errno, error.strerror, path) from None
                raise

    def remove_tree(self, path: str) -> int:
        with self._faults.during("remove", path):
            try:
                with parent_of(self._root_fd, path) as (parent, name):
                    return remove_tree(parent, name)
            except FileNotFoundError:
                return 0

    def remove_disk(self, path: str) -> None:
        self.remove_tree(path)

    def sync_file(self, path: str) -> None:
        with self._faults.during("write to the disk", path), self._opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)

    def sync_directory(self, path: str) -> None:
        with self._faults.during("write to the disk", path):
            fd = self._open_directory(path)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def open_readable(self, path: str) -> ReadableFile:
        with self._faults.during("open", path):
            fd = self._open_regular(path, os.O_RDONLY)
            try:
                open_files.share_lock(fd)
                # From here on it cannot be taken away; before, it may have been.
                self._require_at(path, fd)
                return PosixReadable(self._faults, path, fd)
            except BlockingIOError as error:
                os.close(fd)
                raise ImageInUse(f"{self.name}: {path} is being removed, or written by another process") from error
            except BaseException:
                os.close(fd)
                raise

    def open_writable(self, path: str) -> WritableFile:
        with self._faults.during("open", path):
            fd = self._open_regular(path, os.O_RDWR | os.O_CREAT)
            if os.fstat(fd).st_nlink > 1:
                os.close(fd)
                raise InvalidRequest(
                    f"{self.name}: {path} has another name, a hard link: what is written would be there"
                )
            return PosixWritable(self._faults, path, fd, self._writers)

    def shares_extents_with(self, other: Datastore) -> bool:
        if not isinstance(other, PosixDatastore):
            return False
        here, there = self._open_root(), other._open_root()
        return here.reflink and here.device == there.device

    def disk_copier(self, source: Datastore) -> DiskCopier | None:
        return None

    def vm_server(self) -> VmServer | None:
        return None

    def lock(self, path: str, operation: str, timeout: float, check: Callable[[], None] = lambda: None) -> HeldLock:
        with self._faults.during("lock", path):
            return self._open_root().locks.acquire(path, operation, timeout, check)

    def free_lock(self, path: str) -> None:
        if self.entry(path).kind is EntryKind.DIRECTORY:
            # A lock of a host without a path; or only begun, or none.
            names = self.names(path)
            if not names:
                with suppress(FileExistsError):  # not empty any more
                    self.remove_directory(path)
            if len(names) != 1 or Identity.parse(names[0]) is None:
                return
        self.lock(path, "reap", timeout=0).release()

    def lock_holder(self, path: str) -> LockHolder | None:
        with self._faults.during("ask who holds", path):
            return self._open_root().locks.holder(path)

    def interrupt(self) -> None:
        self._interrupted.set()

    def _wait_for_lock(self, seconds: float) -> None:
        if self._interrupted.wait(seconds):
            raise OperationCancelled(f"{self.name}: no longer waiting for a lock: the sidecar is shutting down")

    def users(self, paths: Sequence[str], image_id: str) -> list[str]:
        with ExitStack() as stack, self._faults.during("ask who has open", _described(paths)):
            descriptors = [self._enter_open(stack, path, os.O_RDONLY) for path in paths]
            return [str(user) for user in with_openers(open_files.open_users(descriptors), self.name, image_id)]

    @contextmanager
    def exclude_users(self, paths: Sequence[str], image_id: str) -> Iterator[None]:
        with ExitStack() as stack:
            with self._faults.during("ask who has open", _described(paths)):
                descriptors = [self._enter_open(stack, path, os.O_RDWR) for path in paths]
                try:
                    stack.enter_context(open_files.exclude_users(descriptors, patience=_CLOSING_SECONDS))
                except open_files.FilesInUse as error:
                    users = with_openers(error.users, self.name, image_id)
                    raise ImageInUse(open_files.describe(users)) from error
            yield

    def watcher(self) -> InotifyWatcher | None:
        if self.shared:
            return None
        try:
            return InotifyWatcher(self._root_fd)
        except OSError as error:  # EMFILE: fs.inotify.max_user_instances are used up
            _log.warning("no inotify datastore=%s error=%s see=fs.inotify.max_user_instances", self.name, error)
            return None

    def capacity(self) -> Capacity:
        with self._faults.during("ask for the free space"):
            status = os.fstatvfs(self._root_fd)
            return Capacity(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)

    def unsent(self, directory: str) -> int:
        return 0

    def check(self) -> Capacity:
        with self._faults.during("look at the root"):
            self._look_at_the_path()
            os.listdir(self._root_fd) if self.shared else os.fstatvfs(self._root_fd)
        self._open_root().directories.let_go_of_left()
        return self.capacity()

    def require_in_place(self) -> None:
        with self._faults.during("look at the root"):
            self._look_at_the_path()

    def _look_at_the_path(self) -> None:
        """Whether what is open is still what everybody else finds: two looks, at the descriptor and at the path."""
        held = os.fstat(self._root_fd)
        if held.st_nlink == 0:
            raise DatastoreUnavailable(f"datastore {self.name}: {self.root_path} was removed; restart the sidecar")
        try:
            if os.path.samestat(os.stat(self.root_path), held):
                return
        except (FileNotFoundError, NotADirectoryError):
            raise DatastoreUnavailable(
                f"datastore {self.name}: {self.root_path} is not there any more; move it back, and the sidecar goes on "
                "by itself some seconds later"
            ) from None
        raise DatastoreUnavailable(
            f"datastore {self.name}: another file system is mounted at {self.root_path}, or another directory is in "
            "its place; put back what was there, and the sidecar goes on by itself some seconds later; or restart it, "
            "to serve what is there now"
        )

    def _open_directory(self, path: str) -> int:
        return open_directory_beneath(self._root_fd, path) if path else os.open(".", os.O_RDONLY, dir_fd=self._root_fd)

    @contextmanager
    def _opened(self, path: str, flags: int) -> Iterator[int]:
        fd = self._open_regular(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_regular(self, path: str, flags: int) -> int:
        return open_regular(self._faults, self._root_fd, path, flags)

    def _require_at(self, path: str, fd: int) -> None:
        """FileNotFoundError when the open file is not the one at the path any more."""
        with parent_of(self._root_fd, path) as (parent, name):
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not os.path.samestat(status, os.fstat(fd)):
            raise FileNotFoundError(errno.ENOENT, "it was replaced just now", path)

    def _enter_open(self, stack: ExitStack, path: str, flags: int) -> int:
        return stack.enter_context(self._opened(path, flags))

    def _make_one_directory(self, path: str) -> None:
        with parent_of(self._root_fd, path) as (parent, name):
            os.mkdir(name, 0o755, dir_fd=parent)
            try:
                os.fsync(parent)
            except BaseException:
                # Else the next one who needs it would find it, and believe that it is durable.
                os.rmdir(name, dir_fd=parent)
                raise


class _LockDirectories:
    """What is needed to free the locks that hosts without a path to the datastore have left."""

    def __init__(self, datastore: PosixDatastore) -> None:
        self.make_directory: Callable[[str], None] = datastore.make_directory
        self.names = datastore.names
        self.read_file = datastore.read_file
        self.put_file = datastore.write_file
        self.rename = datastore.rename
        self.remove_tree = datastore.remove_tree


def _described(paths: Sequence[str]) -> str:
    """Not every path: an image may have thousands of files."""
    return f"{len(paths)} files in {paths[0].rpartition('/')[0]}" if paths else "no file"
