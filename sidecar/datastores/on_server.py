"""What the datastores of a vSphere server have in common, however this host reaches them."""

from typing import Protocol, TypeGuard

from sidecar.datastores.interface import Datastore
from sidecar.vsphere.disks import DatastoreAddress
from sidecar.vsphere.inventory import ServerDatastore
from sidecar.vsphere.tasks import Follow


class OnServer(Datastore, Protocol):
    """A datastore that a server has."""

    address: DatastoreAddress

    def is_proved(self, found: ServerDatastore) -> bool:
        """It is known already that what the server has there is this datastore."""

    def require_same(self, found: ServerDatastore, directory: str, follow: Follow) -> None:
        """DatastoreUnavailable unless what the server has there is this datastore, to judge by a directory in it.

        `follow` as in `ServerTask.run`.
        """


def is_on_server(datastore: Datastore) -> TypeGuard[OnServer]:
    return isinstance(getattr(datastore, "address", None), DatastoreAddress)
