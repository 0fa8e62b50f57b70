"""The VMs of a server's inventory, running or not, templates too, with the files that their disks are made on."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim, vmodl

from sidecar.vsphere import properties
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.inventory import ServerDatastore, datastore_properties, datastores_in

_Collector = vmodl.query.PropertyCollector

_DEVICES = "config.hardware.device"
_PATH = re.compile(r"\[([^\]]+)\] *(.+)", re.DOTALL)
_TRIES = 3

# Where what is in folders leads on; a server skips a step that is not for what it has there.
_ENDS = ("hosts", "root pool", "pools", "pool vms", "datastore vms", "snapshots")


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A file of a disk: `path` from the root of the datastore, which the server tells by its name, and may refer to."""

    datastore: vim.Datastore | None
    datastore_name: str
    path: str

    def __str__(self) -> str:
        return f"[{self.datastore_name}] {self.path}"


@dataclass(frozen=True, slots=True)
class InventoryVm:
    """A VM: `disks`, each the disk's own file and then its parents, those that only snapshots have too.

    `datastores`: those that have files of it. `unknown`: why it is not known what its disks are, else empty.
    """

    name: str
    datastores: frozenset[vim.Datastore]
    disks: tuple[tuple[DiskFile, ...], ...]
    unknown: str


@dataclass(frozen=True, slots=True)
class Inventory:
    datastores: Sequence[ServerDatastore]
    vms: Sequence[InventoryVm]


class _UntoldError(Exception):
    """The server does not tell of a disk what it is made on."""


class _ChangedError(Exception):
    """A datastore has a VM that is not in the answer."""


def read_inventory(connection: Connection) -> Inventory:
    """All datastores and VMs that the account may see, by one traversal: a request, and one more for each page.

    Without those that cease to be there meanwhile. What makes it impossible is an ImagesError, as of `Connection.call`.
    """

    def read(content: vim.ServiceInstanceContent) -> Inventory:
        for last in (False,) * (_TRIES - 1) + (True,):
            try:
                return _inventory(properties.retrieve(content, _wanted(content)), last=last)
            except _ChangedError:
                continue
        raise AssertionError

    return connection.call("read the VMs of the inventory", read, repeatable=True)


def _wanted(content: vim.ServiceInstanceContent) -> _Collector.FilterSpec:
    """Every way to a VM: folders, hosts, resource pools with vApps, whose VMs are in no folder, and datastores.

    A datastore names also the VMs that the account may not see: they are told to be unreadable, and not left out.

    What snapshots hold is read from the snapshots: each has the devices as they were, those that the VM has lost too.
    A VM's `layoutEx` would be in the VM itself, but is brought up to date by the server at times of its own.
    """
    steps = {
        "children": (vim.Folder, "childEntity", ("children", "vm folder", "host folder", "datastore folder", *_ENDS)),
        "vm folder": (vim.Datacenter, "vmFolder", ("children",)),
        "host folder": (vim.Datacenter, "hostFolder", ("children",)),
        "datastore folder": (vim.Datacenter, "datastoreFolder", ("children",)),
        "hosts": (vim.ComputeResource, "host", ("host vms",)),
        "root pool": (vim.ComputeResource, "resourcePool", ("pools", "pool vms")),
        "host vms": (vim.HostSystem, "vm", ("snapshots",)),
        "pools": (vim.ResourcePool, "resourcePool", ("pools", "pool vms")),
        "pool vms": (vim.ResourcePool, "vm", ("snapshots",)),
        "datastore vms": (vim.Datastore, "vm", ("snapshots",)),
        "snapshots": (vim.VirtualMachine, "rootSnapshot", ("child snapshots",)),
        "child snapshots": (vim.vm.Snapshot, "childSnapshot", ("child snapshots",)),
    }
    traversals = [
        _Collector.TraversalSpec(
            name=name, type=kind, path=path, selectSet=[_Collector.SelectionSpec(name=each) for each in into]
        )
        for name, (kind, path, into) in steps.items()
    ]
    found = datastore_properties()
    found[-1].pathSet.append("vm")
    return _Collector.FilterSpec(
        objectSet=[_Collector.ObjectSpec(obj=content.rootFolder, selectSet=traversals)],
        propSet=[
            *found,
            _Collector.PropertySpec(type=vim.VirtualMachine, pathSet=["name", "datastore", "rootSnapshot", _DEVICES]),
            _Collector.PropertySpec(type=vim.vm.Snapshot, pathSet=["childSnapshot", _DEVICES]),
        ],
    )


def _inventory(found: Sequence[properties.Found], *, last: bool) -> Inventory:
    """`last`: a VM that is only named is one that is not known, and no reason to ask again."""
    vms = {each.obj: each for each in found if isinstance(each.obj, vim.VirtualMachine)}
    snapshots = {each.obj: each for each in found if isinstance(each.obj, vim.vm.Snapshot)}
    others = properties.readable([each for each in found if each.obj not in vms and each.obj not in snapshots])
    holders: dict[vim.VirtualMachine, set[vim.Datastore]] = defaultdict(set)
    for thing, values in others.items():
        if isinstance(thing, vim.Datastore):
            for vm in values.get("vm", ()):
                holders[vm].add(thing)
    if not last and not holders.keys() <= vms.keys():
        raise _ChangedError
    made = []
    for vm in {**vms, **holders}:
        told = vms.get(vm, properties.Found(vm, {}, {}))
        if _is_gone(told):
            continue
        datastores = frozenset({*told.values.get("datastore", ()), *holders.get(vm, ())})
        disks: tuple[tuple[DiskFile, ...], ...] = ()
        unknown = ""
        try:
            disks = tuple(dict.fromkeys(_disks(told, snapshots)))
        except _UntoldError as untold:
            unknown = str(untold)
        made.append(InventoryVm(told.values.get("name") or vm._GetMoId(), datastores, disks, unknown))
    return Inventory(datastores_in(others), made)


def _is_gone(told: properties.Found) -> bool:
    faults = told.missing.values()
    return bool(faults) and all(isinstance(fault, vmodl.fault.ManagedObjectNotFound) for fault in faults)


def _disks(
    vm: properties.Found, snapshots: Mapping[vim.vm.Snapshot, properties.Found]
) -> Iterator[tuple[DiskFile, ...]]:
    """Those of the VM, and those of its snapshots."""
    yield from _chains(vm, "the VM")
    waiting = list(vm.values.get("rootSnapshot", ()))
    while waiting:
        told = snapshots.get(waiting.pop())
        if told is None:
            raise _UntoldError("one of its snapshots is not shown by the server")
        if not _is_gone(told):
            yield from _chains(told, "a snapshot of it")
            waiting += told.values.get("childSnapshot", ())


def _chains(told: properties.Found, what: str) -> Iterator[tuple[DiskFile, ...]]:
    for name, fault in told.missing.items():
        raise _UntoldError(f"the server does not tell {name} of {what}: {type(fault).__name__.rpartition('.')[2]}")
    devices = told.values.get(_DEVICES)
    if devices is None:
        # As of a VM whose files are not accessible, or that is being made or was lost by its host.
        raise _UntoldError(f"the server has no configuration of {what}")
    for device in devices:
        if isinstance(device, vim.vm.device.VirtualDisk):
            yield tuple(map(_file, _backings(device)))


def _backings(disk: vim.vm.device.VirtualDisk) -> Iterator[Any]:
    """The disk's own and its parents, of any kind."""
    backing: Any = disk.backing
    yield backing
    while (backing := getattr(backing, "parent", None)) is not None:
        yield backing


def _file(backing: Any) -> DiskFile:
    name = getattr(backing, "fileName", None) or getattr(backing, "descriptorFileName", None)
    parts = _PATH.fullmatch(name or "")
    if parts is None:
        raise _UntoldError(f"the file of one of its disks, {name!r}, is not named as in [datastore] directory/file")
    return DiskFile(getattr(backing, "datastore", None), parts[1], parts[2])
