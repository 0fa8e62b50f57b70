"""A datastore of a vSphere server that this host sees as a directory, too: disks are copied by the server.

What else is done with it is done through the directory. It is another way to the same files, and the only one with
locks that every host knows.
"""

from sidecar.datastores.interface import Datastore, DiskCopier
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.server_copy import server_copier
from sidecar.datastores.writers import Writers
from sidecar.locks.files import LockKind
from sidecar.vsphere.disks import DatastoreAddress


class VsphereDatastore(PosixDatastore):
    """A posix datastore whose server copies disks from it, and from others of the same server."""

    def __init__(
        self, name: str, root_path: str, lock_kind: LockKind, writers: Writers, address: DatastoreAddress
    ) -> None:
        super().__init__(name, root_path, "vsphere", lock_kind, writers)
        self.volume = address.datastore.rpartition("/")[2]
        self.address = address

    def disk_copier(self, source: Datastore) -> DiskCopier | None:
        return server_copier(source, self)

    def shares_extents_with(self, other: Datastore) -> bool:
        return self.disk_copier(other) is None and super().shares_extents_with(other)
