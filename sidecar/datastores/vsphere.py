"""A datastore of a vSphere server that this host sees as a directory, too: disks are copied by the server.

What else is done with it is done through the directory. It is another way to the same files, and the only one with
locks that every host knows.
"""

import contextlib
import logging
import time
import uuid

from sidecar.datastores.interface import Datastore, DiskCopier, Transfer
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.writers import Writers
from sidecar.errors import DatastoreUnavailable, DiskFileFault
from sidecar.locks.files import LockKind
from sidecar.vsphere.disks import DatastoreAddress, copy_task, find_all, may_preallocate
from sidecar.vsphere.faults import printable
from sidecar.vsphere.inventory import ServerDatastore
from sidecar.vsphere.sight import is_seen
from sidecar.vsphere.tasks import ServerTask

# For what was made here to come into sight of the server, where it reaches the datastore over NFS.
_APPEARING_SECONDS = 5.0
_LOOK_SECONDS = 0.2

_log = logging.getLogger(__name__)


class VsphereDatastore(PosixDatastore):
    """A posix datastore whose server copies disks from it, and from others of the same server."""

    def __init__(
        self, name: str, root_path: str, lock_kind: LockKind, writers: Writers, address: DatastoreAddress
    ) -> None:
        super().__init__(name, root_path, "vsphere", lock_kind, writers)
        self.volume = address.datastore.rpartition("/")[2]
        self.address = address
        # What the server had there when it was last looked at, and was proved to be this directory.
        self._proved: tuple[object, ...] | None = None

    def disk_copier(self, source: Datastore) -> DiskCopier | None:
        if isinstance(source, VsphereDatastore) and source.address.connection is self.address.connection:
            return _ServerCopier(source, self)
        return None

    def shares_extents_with(self, other: Datastore) -> bool:
        return self.disk_copier(other) is None and super().shares_extents_with(other)

    def require_same(self, found: ServerDatastore, directory: str, transfer: Transfer) -> None:
        """DatastoreUnavailable unless what the server has there is this directory, and not another of such names.

        Asked once, and again when the server has another datastore there: by a file in the image's directory
        `directory`, named as what the reaper frees there after a crash.
        """
        now = (found.datastore._GetMoId(), found.url, found.path)
        if now == self._proved:
            return
        name = f".{uuid.uuid4().hex}"
        self.create_file(f"{directory}/{name}")
        try:
            seen = self._is_seen_in_time(found, directory, name, transfer)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self.remove_file(f"{directory}/{name}")
        if not seen:
            raise DatastoreUnavailable(
                f"datastore {self.name}: a file that was made in {self.root_path}/{directory} is not in "
                f"{printable(found.path)} of the server {self.address.connection.server.name}: the path "
                f"{self.root_path} is not where the server has its datastore; put right the path, or the datastore"
            )
        self._proved = now
        _log.info(
            "datastore found name=%s server=%s path=%s url=%s type=%s",
            *(self.name, self.address.connection.server.name, printable(found.path), printable(found.url), found.type),
        )

    def _is_seen_in_time(self, found: ServerDatastore, directory: str, name: str, transfer: Transfer) -> bool:
        until = time.monotonic() + _APPEARING_SECONDS
        while not is_seen(self.address.connection, found, directory, name, lambda percent: transfer.advance(0)):
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_SECONDS)
        return True


class _ServerCopier:
    """Of one disk."""

    def __init__(self, source: VsphereDatastore, destination: VsphereDatastore) -> None:
        self._source, self._destination = source, destination
        self._connection = destination.address.connection
        self._task: ServerTask | None = None

    @property
    def begun(self) -> bool:
        return self._task is not None and self._task.begun

    def may_preallocate(self) -> bool:
        return may_preallocate(self._connection)

    def copy(self, source_path: str, path: str, size: int, adapter_type: str | None, transfer: Transfer) -> None:
        done = 0

        def follow(percent: int) -> None:
            nonlocal done
            so_far = size * percent // 100
            done, more = so_far, so_far - done
            transfer.advance(more)

        source, destination = find_all(self._source.address, self._destination.address)
        # Not the destination: its directory has a name that there is nowhere else, and the server writes into no other.
        self._source.require_same(source, source_path.rpartition("/")[0], transfer)
        self._task = copy_task(
            self._connection, source, source_path, destination, path, size=size, adapter_type=adapter_type
        )
        self._remove_what_is_there(path)
        try:
            self._task.run(follow)
        except FileNotFoundError as error:
            # The source is open here, and the destination's directory is held.
            raise DatastoreUnavailable(
                f"{error}, but it is there on this host: the path {self._source.root_path} or "
                f"{self._destination.root_path} is not where the server has its datastore"
            ) from error
        except FileExistsError as error:
            raise DiskFileFault(
                f"{error}, and it was not there on this host before: look whether another program writes to "
                f"{self._destination.root_path}/{path.rpartition('/')[0]}, and try again"
            ) from error
        transfer.advance(size - done)

    def _remove_what_is_there(self, path: str) -> None:
        """The server replaces nothing. What is there is of a copy that was begun by other means.

        It is listed, not asked for by name: an NFS client remembers what it did not find, and would not see what the
        server makes.
        """
        directory, _, name = path.rpartition("/")
        for each in {name, f"{name.removesuffix('.vmdk')}-flat.vmdk"}.intersection(self._destination.names(directory)):
            self._destination.remove_tree(f"{directory}/{each}")
