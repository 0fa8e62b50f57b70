"""A datastore of a vSphere server that this host sees as a directory, too: it copies disks, and knows its VMs.

What else is done with it is done through the directory. It is another way to the same files, and the only one with
locks that every host knows.
"""

import contextlib
import logging
import time
import uuid

from sidecar.datastores.interface import Datastore, DiskCopier, VmServer
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.server_copy import server_copier
from sidecar.datastores.server_vms import ServerVms
from sidecar.datastores.writers import Writers
from sidecar.errors import DatastoreUnavailable
from sidecar.locks.files import LockKind
from sidecar.vsphere.disks import DESCRIPTOR_BYTES, DatastoreAddress, names_other_directories, remove_disk
from sidecar.vsphere.faults import printable
from sidecar.vsphere.inventory import ServerDatastore
from sidecar.vsphere.sight import is_seen
from sidecar.vsphere.tasks import Follow

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
        return server_copier(source, self)

    def shares_extents_with(self, other: Datastore) -> bool:
        return self.disk_copier(other) is None and super().shares_extents_with(other)

    def remove_disk(self, path: str) -> None:
        if not path.endswith(".vmdk") or path.rpartition("/")[2] not in self.names(path.rpartition("/")[0]):
            return
        with contextlib.suppress(FileNotFoundError):  # of what it names
            if not names_other_directories(self.read_file(path, DESCRIPTOR_BYTES)):
                found = self.address.find()
                self.require_same(found, path.rpartition("/")[0], lambda percent: None)
                remove_disk(self.address.connection, found, path)
        self.remove_tree(path)

    def vm_server(self) -> VmServer:
        return ServerVms(self.address.connection)

    def is_proved(self, found: ServerDatastore) -> bool:
        return self._proved == _identity(found)

    def require_same(self, found: ServerDatastore, directory: str, follow: Follow) -> None:
        """DatastoreUnavailable unless what the server has there is this directory, and not another of such names.

        FileNotFoundError when the image's directory vanishes meanwhile.

        Asked once, and again when the server has another datastore there: by a file in the image's directory
        `directory`, named as what the reaper frees there after a crash.
        """
        if self.is_proved(found):
            return
        name = f".{uuid.uuid4().hex}"
        self.create_file(f"{directory}/{name}")
        try:
            seen = self._is_seen_in_time(found, directory, name, follow)
            if not seen:
                self.entry(f"{directory}/{name}")  # or it was taken away with its directory
        finally:
            with contextlib.suppress(FileNotFoundError):
                self.remove_file(f"{directory}/{name}")
        if not seen:
            raise DatastoreUnavailable(
                f"datastore {self.name}: a file that was made in {self.root_path}/{directory} is not in "
                f"{printable(found.path)} of the server {self.address.connection.server.name}: the path "
                f"{self.root_path} is not where the server has its datastore; put right the path, or the datastore"
            )
        self._proved = _identity(found)
        _log.info(
            "datastore found name=%s server=%s path=%s url=%s type=%s",
            *(self.name, self.address.connection.server.name, printable(found.path), printable(found.url), found.type),
        )

    def _is_seen_in_time(self, found: ServerDatastore, directory: str, name: str, follow: Follow) -> bool:
        until = time.monotonic() + _APPEARING_SECONDS
        while not is_seen(self.address.connection, found, directory, name, follow):
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_SECONDS)
        return True


def _identity(found: ServerDatastore) -> tuple[object, ...]:
    return found.datastore._GetMoId(), found.url, found.path
