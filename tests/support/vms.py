"""VMs that a simulated server knows, made through its API."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyVmomi import vim

from sidecar.vsphere import properties
from sidecar.vsphere.connection import Connection

_Spec = vim.vm.device.VirtualDeviceSpec
_Backing = vim.vm.device.VirtualDisk.FlatVer2BackingInfo


@dataclass(frozen=True)
class Vms:
    """Makes VMs, each in a directory that no layout has for VMs: by their files they are not found.

    `roots`: the directories of the server's datastores.
    """

    connection: Connection
    roots: dict[str, Path]

    def create(
        self,
        name: str,
        *chains: Sequence[str],
        on: str = "one",
        folders: Sequence[str] = (),
        datacenter: int = 0,
        vapp: str = "",
        refer: bool = False,
    ) -> vim.VirtualMachine:
        """A VM that is off, with a disk for each chain: its file and then its parents, as in `[one] web/web.vmdk`.

        `folders`: those that it is in, one in the other, which are made. `refer`: parents have their datastore set.
        """
        for chain in chains:
            self._make_file(chain[0])

        def create(content: vim.ServiceInstanceContent) -> vim.VirtualMachine:
            assert content.rootFolder is not None
            site: Any = content.rootFolder.childEntity[datacenter]
            folder = site.vmFolder
            for each in folders:
                folder = folder.CreateFolder(each)
            place = site.hostFolder.childEntity[0]
            references = {each.name: each for each in site.datastore} if refer else {}
            config = vim.vm.ConfigSpec(
                name=name,
                files=vim.vm.FileInfo(vmPathName=f"[{on}] {name}/{name}.vmx"),
                deviceChange=[_disk(number, chain, references) for number, chain in enumerate(chains)],
            )
            if vapp:
                made = place.resourcePool.CreateVApp(
                    vapp,
                    vim.ResourceConfigSpec(cpuAllocation=_share(), memoryAllocation=_share()),
                    vim.vApp.VAppConfigSpec(),
                )
                task = made.CreateChildVM_Task(config, place.host[0])
            else:
                task = folder.CreateVM_Task(config, place.resourcePool, place.host[0])
            vm: vim.VirtualMachine = _result(content, task)
            return vm

        return self.connection.call(f"create the VM {name}", create)

    def do(self, vm: vim.VirtualMachine, change: Callable[[Any], Any]) -> None:
        """`change` of the VM, which may give a task."""

        def run(content: vim.ServiceInstanceContent) -> None:
            task = change(vim.VirtualMachine(vm._GetMoId(), content.propertyCollector._GetStub()))
            if task is not None:
                _result(content, task)

        self.connection.call("change the VM", run)

    def _make_file(self, path: str) -> None:
        """The simulator wants it to be there, with its extent."""
        name, _, relative = path.removeprefix("[").partition("] ")
        file = self.roots[name] / relative
        file.parent.mkdir(exist_ok=True)
        file.touch()
        file.with_name(f"{file.stem}-flat.vmdk").touch()


def remove_disks(vm: Any) -> Any:
    """Takes them out of the VM, and leaves their files; a task."""
    disks = [device for device in vm.config.hardware.device if isinstance(device, vim.vm.device.VirtualDisk)]
    changes = [_Spec(operation="remove", device=disk) for disk in disks]
    return vm.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=changes))


def _disk(number: int, chain: Sequence[str], references: dict[str, vim.Datastore]) -> _Spec:
    backing = None
    for path in reversed(chain):
        datastore = references.get(path.removeprefix("[").partition("]")[0])
        backing = _Backing(fileName=path, diskMode="persistent", datastore=datastore, parent=backing)
    disk = vim.vm.device.VirtualDisk(key=-1 - number, backing=backing, capacityInKB=1024)
    return _Spec(operation="add", device=disk)


def _share() -> vim.ResourceAllocationInfo:
    return vim.ResourceAllocationInfo(
        reservation=0, expandableReservation=True, limit=-1, shares=vim.SharesInfo(level="normal", shares=0)
    )


def _result(content: vim.ServiceInstanceContent, task: vim.Task) -> Any:
    found = properties.read(content, task, ("info.state", "info.result", "info.error"))
    assert found["info.state"] == "success", found
    return found.get("info.result")
