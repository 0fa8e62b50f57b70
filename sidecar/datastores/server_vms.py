"""The VMs that a vSphere server knows, as users of the datastores of this host."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pyVmomi import vim

from sidecar.datastores.interface import Datastore, DiskPlace, KnownDisk, KnownVm
from sidecar.datastores.on_server import OnServer, is_on_server
from sidecar.errors import DatastoreDenied, DatastoreUnavailable, InvalidRequest
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.inventory import ServerDatastore
from sidecar.vsphere.vms import DiskFile, Inventory, InventoryVm, read_inventory


@dataclass(frozen=True, slots=True)
class ServerVms:
    """The VMs of one server. A datastore that it does not have is an error: its VMs may use what is there."""

    connection: Connection

    @property
    def name(self) -> str:
        return self.connection.server.name

    def vms(
        self, datastores: Sequence[Datastore], image_directories: Callable[[Datastore], Iterable[str]]
    ) -> list[KnownVm]:
        inventory = read_inventory(self.connection)
        for datastore in datastores:
            if is_on_server(datastore) and datastore.address.connection is self.connection:
                _require_same(datastore, datastore.address.among(inventory.datastores), image_directories)
        places = _Places(self.connection, datastores, inventory)
        return [known for vm in inventory.vms if (known := _known(vm, places)) is not None]


def _require_same(
    datastore: OnServer, found: ServerDatastore, image_directories: Callable[[Datastore], Iterable[str]]
) -> None:
    """Of what a server has elsewhere, it would tell that no VM uses the images that are here."""
    failure: Exception | None = None
    for directory in () if datastore.is_proved(found) else image_directories(datastore):
        try:
            datastore.require_same(found, directory, lambda percent: None)
            return
        except (FileNotFoundError, InvalidRequest, DatastoreDenied) as error:
            failure = error  # the image was deleted meanwhile, or nothing can be made there
    if failure is not None:
        raise DatastoreUnavailable(
            f"datastore {datastore.name}: it is not known whether this is what its server has, since no file can be "
            f"made in any of its images: {failure}; make one writable, and try again"
        ) from failure


class _Places:
    """Which datastores of this host those of a server are.

    Names repeat in other datacenters, and a reference does not: it decides which of the server's own datastores is
    meant. One of this host that is not the server's may be any that has its name: in doubt an image is in use.
    """

    def __init__(self, connection: Connection, datastores: Sequence[Datastore], inventory: Inventory) -> None:
        self._by_reference: dict[vim.Datastore, set[str]] = {each.datastore: set() for each in inventory.datastores}
        self._others: dict[str, set[str]] = {}
        self._all: dict[str, set[str]] = {}
        for datastore in datastores:
            names = {datastore.name, datastore.volume}
            if is_on_server(datastore) and datastore.address.connection is connection:
                found = datastore.address.among(inventory.datastores)
                self._by_reference[found.datastore].add(datastore.name)
                names.add(found.name)
            else:
                for name in names:
                    self._others.setdefault(name, set()).add(datastore.name)
            for name in names:
                self._all.setdefault(name, set()).add(datastore.name)
        for each in inventory.datastores:
            self._by_reference[each.datastore] |= self._others.get(each.name, set())

    def are_touched(self, datastores: frozenset[vim.Datastore]) -> bool:
        return any(self._by_reference.get(datastore) for datastore in datastores)

    def of(self, file: DiskFile) -> tuple[str, ...]:
        if file.datastore is None:
            found = self._all.get(file.datastore_name, set())
        else:
            found = self._by_reference.get(file.datastore, set()) | self._others.get(file.datastore_name, set())
        return tuple(sorted(found))


def _known(vm: InventoryVm, places: _Places) -> KnownVm | None:
    """None for a VM that has nothing on these datastores."""
    if vm.unknown:
        # One with files elsewhere only uses nothing here, whatever they are.
        return None if vm.datastores and not places.are_touched(vm.datastores) else KnownVm(vm.name, (), vm.unknown)
    disks = tuple(
        KnownDisk(str(files[0]), tuple(DiskPlace(places.of(file), file.path) for file in files)) for files in vm.disks
    )
    touches = places.are_touched(vm.datastores) or any(each.datastores for disk in disks for each in disk.places)
    return KnownVm(vm.name, disks, "") if touches else None
