"""Whole disks, a descriptor with its extents, copied by the server that has the datastores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyVmomi import vim

from sidecar.errors import DatastoreUnavailable, InvalidRequest
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.inventory import ServerDatastore, choose_datastore, find_datastore
from sidecar.vsphere.tasks import run_task


@dataclass(frozen=True, slots=True)
class DatastoreAddress:
    """How a datastore is found on a server: by its name or inventory path, in a datacenter or in any."""

    connection: Connection
    datastore: str
    datacenter: str | None = None

    def find(self) -> ServerDatastore:
        """The datastore as it is now: its name may have changed. DatastoreUnavailable when it cannot be used."""
        found = find_datastore(self.connection, self.datastore, self.datacenter)
        if not found.accessible:
            raise DatastoreUnavailable(
                f"server {self.connection.server.name} cannot reach the datastore {found.path}; look at its hosts"
            )
        return found

    def among(self, known: Sequence[ServerDatastore]) -> ServerDatastore:
        """The datastore among those that the server was found to have; DatastoreUnavailable when it is not there."""
        return choose_datastore(self.connection.server.name, known, self.datastore, self.datacenter)


def copy_disk(
    source: DatastoreAddress, source_path: str, destination: DatastoreAddress, path: str, follow: Callable[[int], None]
) -> None:
    """Copies the disk whose descriptor is at `source_path`, as a thin one; both datastores are of one server.

    `follow` as in `run_task`. FileNotFoundError and FileExistsError when the server says so. After an error parts of
    the copy may be there. The copied descriptor may have the names of the source's extents: some servers write it anew,
    others copy its bytes.
    """
    here, there = source.find(), destination.find()
    names = _datastore_path(here, source_path), _datastore_path(there, path)

    def start(content: vim.ServiceInstanceContent) -> vim.Task:
        manager = content.virtualDiskManager
        if manager is None:
            raise DatastoreUnavailable(f"server {source.connection.server.name} has no means to copy disks")
        # A vCenter takes no specification, and keeps the source's kind.
        is_host = content.about.apiType == "HostAgent"
        thin = vim.VirtualDiskManager.VirtualDiskSpec(diskType="thin", adapterType="lsiLogic") if is_host else None
        task: vim.Task = manager.CopyVirtualDisk_Task(
            names[0], here.datacenter, names[1], there.datacenter, thin, False
        )
        return task

    run_task(source.connection, f"copy the disk {names[0]} to {names[1]}", start, follow)


def _datastore_path(datastore: ServerDatastore, path: str) -> str:
    """As in `[one] image_a/a.vmdk`. InvalidRequest for a path that could lead out of the datastore."""
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise InvalidRequest(f"{path!r} is not a path within the datastore {datastore.name}")
    return f"[{datastore.name}] {path}"
