"""Whole disks, a descriptor with its extents, copied by the server that has the datastores."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pyVmomi import vim

from sidecar.errors import DatastoreUnavailable, InvalidRequest
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.faults import printable
from sidecar.vsphere.inventory import ServerDatastore, choose_datastore, find_datastores
from sidecar.vsphere.tasks import ServerTask, run_task

# Those of the API, by what descriptors call them, which have others, too.
_ADAPTER_TYPES = {name.lower(): name for name in ("busLogic", "ide", "lsiLogic")}


_EXTENT = re.compile(rb'^\s*(?:RW|RDONLY|NOACCESS)\s+\d+\s+\S+\s+"([^"]*)"', re.MULTILINE)
# Of a file that may be a disk's descriptor: as much as ESX makes of one, and more.
DESCRIPTOR_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class DatastoreAddress:
    """How a datastore is found on a server: by its name or inventory path, in a datacenter or in any."""

    connection: Connection
    datastore: str
    datacenter: str | None = None

    def find(self) -> ServerDatastore:
        """The datastore as it is now: its name may have changed. DatastoreUnavailable when it cannot be used."""
        return find_all(self)[0]

    def among(self, known: Sequence[ServerDatastore]) -> ServerDatastore:
        """The datastore among those that the server was found to have; DatastoreUnavailable when it is not there."""
        return choose_datastore(self.connection.server.name, known, self.datastore, self.datacenter)


def find_all(*addresses: DatastoreAddress) -> list[ServerDatastore]:
    """`DatastoreAddress.find` for several of one server, by one look at its inventory."""
    connection = addresses[0].connection
    found = find_datastores(connection, [(each.datastore, each.datacenter) for each in addresses])
    for each in found:
        if not each.accessible:
            raise DatastoreUnavailable(
                f"server {connection.server.name} cannot reach the datastore {printable(each.path)}; look at its hosts"
            )
    return found


def may_preallocate(connection: Connection) -> bool:
    """Whether the server may make a copy that takes all its space at once: only a single host can be told otherwise."""
    return not connection.call("tell what it is", _is_host)


def copy_task(
    connection: Connection,
    source: ServerDatastore,
    source_path: str,
    destination: ServerDatastore,
    path: str,
    *,
    size: int = 0,
    adapter_type: str | None = None,
) -> ServerTask:
    """The task, to be run, that copies the disk whose descriptor is at `source_path`; thin where that can be told.

    `size`: bytes that are in its files. `adapter_type`: that of its descriptor, which the copy gets where the API has
    it. InvalidRequest for paths that are none within the datastores. The run raises FileNotFoundError and
    FileExistsError when the server says so; after an error parts of the copy may be there. The copied descriptor may
    have the names of the source's extents: some servers write it anew, others copy its bytes.
    """
    names = datastore_path(source, source_path), datastore_path(destination, path)

    def start(content: vim.ServiceInstanceContent) -> vim.Task:
        manager = _manager(connection, content)
        thin = None
        if _is_host(content):  # a vCenter takes no specification
            adapter = _ADAPTER_TYPES.get((adapter_type or "").lower(), "lsiLogic")
            thin = vim.VirtualDiskManager.VirtualDiskSpec(diskType="thin", adapterType=adapter)
        task: vim.Task = manager.CopyVirtualDisk_Task(
            names[0], source.datacenter, names[1], destination.datacenter, thin, False
        )
        return task

    return ServerTask(connection, f"copy the disk {names[0]} to {names[1]}", start, size)


def move_disk(connection: Connection, datastore: ServerDatastore, source_path: str, path: str) -> None:
    """Moves a disk, its data too, within a datastore. FileNotFoundError, FileExistsError; after one parts may be there.

    FileNotFoundError also when it misses the data, maybe with the descriptor moved.
    """
    names = datastore_path(datastore, source_path), datastore_path(datastore, path)

    def start(content: vim.ServiceInstanceContent) -> vim.Task:
        task: vim.Task = _manager(connection, content).MoveVirtualDisk_Task(
            names[0], datastore.datacenter, names[1], datastore.datacenter, False, None
        )
        return task

    run_task(connection, f"move the disk {names[0]} to {names[1]}", start)


def remove_disk(connection: Connection, datastore: ServerDatastore, path: str) -> None:
    """Removes a disk, its data too, wherever the server has that: on VSAN it is no file. FileNotFoundError."""
    name = datastore_path(datastore, path)

    def start(content: vim.ServiceInstanceContent) -> vim.Task:
        task: vim.Task = _manager(connection, content).DeleteVirtualDisk_Task(name, datastore.datacenter)
        return task

    run_task(connection, f"remove the disk {name}", start)


def names_other_directories(descriptor: bytes) -> bool:
    """Whether the text of a disk names data that is not beside it: with the disk, a server would remove that, too."""
    return any(b"/" in name for name in _EXTENT.findall(descriptor))


def _manager(connection: Connection, content: vim.ServiceInstanceContent) -> vim.VirtualDiskManager:
    if content.virtualDiskManager is None:
        raise DatastoreUnavailable(f"server {connection.server.name} has no means to copy or remove disks")
    return content.virtualDiskManager


def _is_host(content: vim.ServiceInstanceContent) -> bool:
    return content.about.apiType == "HostAgent"


def datastore_path(datastore: ServerDatastore, path: str) -> str:
    """As in `[one] image_a/a.vmdk`. InvalidRequest for a path that could lead out of the datastore."""
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise InvalidRequest(f"{path!r} is not a path within the datastore {datastore.name}")
    return f"[{datastore.name}] {path}"
