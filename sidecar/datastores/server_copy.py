"""Disks copied by the server that has both datastores, however this host reaches them."""

from typing import Protocol

from sidecar.datastores.interface import Datastore, DiskCopier, Transfer
from sidecar.errors import DatastoreUnavailable, DiskFileFault
from sidecar.vsphere.disks import DatastoreAddress, copy_disk


class OnServer(Datastore, Protocol):
    """A datastore that a server has."""

    address: DatastoreAddress


def server_copier(source: Datastore, destination: OnServer) -> DiskCopier | None:
    """What copies disks from there to here; None when they are not of one server."""
    address = getattr(source, "address", None)
    if isinstance(address, DatastoreAddress) and address.connection is destination.address.connection:
        return _ServerCopier(source, address, destination)
    return None


class _ServerCopier:
    def __init__(self, source: Datastore, address: DatastoreAddress, destination: OnServer) -> None:
        self._source, self._address, self._destination = source, address, destination

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
            copy_disk(self._address, source_path, self._destination.address, path, follow)
        except FileNotFoundError as error:
            # The source is open here, and the destination's directory is held.
            raise DatastoreUnavailable(
                f"{error}, but it is there for this host: look whether {_places(self._source, self._destination)} "
                "where the server has the datastore"
            ) from error
        except FileExistsError as error:
            raise DiskFileFault(
                f"{error}, and it was not there for this host before: look whether another program writes to "
                f"{directory} on {self._destination.name}, and try again"
            ) from error
        transfer.advance(size - done)


def _places(*datastores: Datastore) -> str:
    paths = [datastore.root_path for datastore in datastores if datastore.root_path]
    return f"{' and '.join(dict.fromkeys(paths))} is" if paths else "both datastores are"
