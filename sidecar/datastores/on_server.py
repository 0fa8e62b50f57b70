"""What the datastores of a vSphere server have in common, however this host reaches them."""

from typing import Protocol, TypeGuard

from sidecar.datastores.interface import Datastore, Transfer
from sidecar.vsphere.disks import DatastoreAddress
from sidecar.vsphere.inventory import ServerDatastore


class OnServer(Datastore, Protocol):
    """A datastore that a server has."""

    address: DatastoreAddress

    def require_same(self, found: ServerDatastore, directory: str, transfer: Transfer) -> None:
        """DatastoreUnavailable unless what the server has there is this datastore, to judge by a directory in it."""


def is_on_server(datastore: Datastore) -> TypeGuard[OnServer]:
    return isinstance(getattr(datastore, "address", None), DatastoreAddress)
