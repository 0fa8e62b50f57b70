"""A datastore of a vSphere server that this host sees as a directory, too: it copies disks, and knows its VMs.

What else is done with it is done through the directory. It is another way to the same files, and the only one with
locks that every host knows.
"""

from sidecar.datastores.interface import Datastore, DiskCopier, Transfer, VmServer
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.server_vms import ServerVms
from sidecar.datastores.writers import Writers
from sidecar.errors import DatastoreUnavailable, DiskFileFault
from sidecar.locks.files import LockKind
from sidecar.vsphere.disks import DatastoreAddress, copy_disk


class VsphereDatastore(PosixDatastore):
    """A posix datastore whose server copies disks from it, and from others of the same server."""

    def __init__(
        self, name: str, root_path: str, lock_kind: LockKind, writers: Writers, address: DatastoreAddress
    ) -> None:
        super().__init__(name, root_path, "vsphere", lock_kind, writers)
        self.volume = address.datastore.rpartition("/")[2]
        self.address = address

    def disk_copier(self, source: Datastore) -> DiskCopier | None:
        if isinstance(source, VsphereDatastore) and source.address.connection is self.address.connection:
            return _ServerCopier(source, self)
        return None

    def shares_extents_with(self, other: Datastore) -> bool:
        return self.disk_copier(other) is None and super().shares_extents_with(other)

    def vm_server(self) -> VmServer:
        return ServerVms(self.address.connection)


class _ServerCopier:
    def __init__(self, source: VsphereDatastore, destination: VsphereDatastore) -> None:
        self._source, self._destination = source, destination

    def copy(self, source_path: str, path: str, size: int, transfer: Transfer) -> None:
        done = 0

        def follow(percent: int) -> None:
            nonlocal done
            so_far = size * percent // 100
            done, more = so_far, so_far - done
            transfer.advance(more)

        # The server replaces nothing. What is there is of a copy that was begun by other means. It is listed, not asked
        # for by name: an NFS client remembers what it did not find, and would not see what the server makes.
        directory, _, name = path.rpartition("/")
        for each in {name, f"{name.removesuffix('.vmdk')}-flat.vmdk"}.intersection(self._destination.names(directory)):
            self._destination.remove_tree(f"{directory}/{each}")
        try:
            copy_disk(self._source.address, source_path, self._destination.address, path, follow)
        except FileNotFoundError as error:
            # The source is open here, and the destination's directory is held.
            raise DatastoreUnavailable(
                f"{error}, but it is there on this host: the path {self._source.root_path} or "
                f"{self._destination.root_path} is not where the server has its datastore"
            ) from error
        except FileExistsError as error:
            raise DiskFileFault(
                f"{error}, and it was not there on this host before: look whether another program writes to "
                f"{self._destination.root_path}/{directory}, and try again"
            ) from error
        transfer.advance(size - done)
