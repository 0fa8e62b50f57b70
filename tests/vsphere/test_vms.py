"""The VMs of an inventory, as servers tell of them that are not as tidy as the simulator."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from sidecar.datastores.interface import KnownVm
from sidecar.datastores.server_vms import ServerVms
from sidecar.datastores.vsphere import VsphereDatastore
from sidecar.datastores.writers import Writers
from sidecar.errors import DatastoreUnavailable, UseUnknown
from sidecar.images.layouts import LAYOUTS
from sidecar.images.store import ImageStore
from sidecar.images.usage import uses_of_image
from sidecar.locks.flock import Flock
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.disks import DatastoreAddress
from tests.support.soap import Answer, Call, fault, found, reference, returned, soap_server, thing, value

FLAT = "VirtualDiskFlatVer2BackingInfo"


def references(name: str, kind: str, *keys: str) -> str:
    made = "".join(f'<ManagedObjectReference type="{kind}">{key}</ManagedObjectReference>' for key in keys)
    return value(name, made, "ArrayOfManagedObjectReference")


def backing(file: str, *, kind: str = FLAT, datastore: str = "", parent: str = "", tag: str = "backing") -> str:
    """`parent`: of `backing`, with the tag parent."""
    made = f'<{tag} xsi:type="{kind}"><fileName>{file}</fileName>'
    made += f'<datastore type="Datastore">{datastore}</datastore>' if datastore else ""
    return f"{made}<diskMode>persistent</diskMode>{parent}</{tag}>"


def devices(*backings: str) -> str:
    made = '<VirtualDevice xsi:type="VirtualLsiLogicController"><key>1000</key><busNumber>0</busNumber></VirtualDevice>'
    for each in backings:
        made += (
            f'<VirtualDevice xsi:type="VirtualDisk"><key>2000</key>{each}<capacityInKB>4</capacityInKB></VirtualDevice>'
        )
    return value("config.hardware.device", made, "ArrayOfVirtualDevice")


def vm(name: str, *values: str, on: tuple[str, ...] = ("one",), missing: tuple[str, str] | None = None) -> str:
    return thing(
        "VirtualMachine", name, value("name", name), references("datastore", "Datastore", *on), *values, missing=missing
    )


def datastore(key: str, *vms: str) -> str:
    fields = f"<datastore type='Datastore'>{key}</datastore><name>{key}</name><url>u</url><capacity>10</capacity>"
    fields += "<freeSpace>5</freeSpace><accessible>true</accessible><multipleHostAccess>true</multipleHostAccess>"
    summary = value("summary", f"{fields}<type>NFS</type>", "DatastoreSummary")
    held = references("vm", "VirtualMachine", *vms)
    return thing("Datastore", key, value("name", key), reference("parent", "Folder", "datastore"), summary, held)


def above() -> list[str]:
    return [
        thing("Folder", "root", value("name", "Datacenters")),
        thing("Datacenter", "DC", value("name", "DC"), reference("parent", "Folder", "root")),
        thing("Folder", "datastore", value("name", "datastore"), reference("parent", "Datacenter", "DC")),
    ]


Ask = Callable[..., ImageStore]


@pytest.fixture
def store_on(tmp_path: Path, stack: ExitStack) -> Ask:
    """A store on the datastore one of a server that answers so: things, or what makes an answer of a call."""

    def make(*things: str, behaviors: dict[str, Callable[[Call], Answer]] | None = None) -> ImageStore:
        answers = behaviors or {"RetrievePropertiesEx": lambda call: found(call, *above(), *things)}
        server = stack.enter_context(soap_server(tmp_path, answers))
        connection = stack.enter_context(closing(Connection(server)))
        root = tmp_path / "one"
        root.mkdir()
        datastore = VsphereDatastore("one", str(root), Flock(), Writers(), DatastoreAddress(connection, "one"))
        stack.callback(datastore.close)
        return ImageStore(datastore, LAYOUTS["compound"])

    return make


def users(store: ImageStore, image_id: str = "a") -> list[str]:
    return list(uses_of_image([store], store.key(image_id)))


def known(store: ImageStore) -> list[KnownVm]:
    server = store.datastore.vm_server()
    assert isinstance(server, ServerVms)
    return server.vms([store.datastore], lambda datastore: [])


WEB = "VM web (disk [one] web/web.vmdk)"
IN_IMAGE = backing("[one] image_a/a.vmdk", tag="parent")


@pytest.mark.parametrize(
    "kind",
    [
        *("VirtualDiskFlatVer1BackingInfo", "VirtualDiskFlatVer2BackingInfo", "VirtualDiskSparseVer1BackingInfo"),
        *("VirtualDiskSparseVer2BackingInfo", "VirtualDiskSeSparseBackingInfo"),
        "VirtualDiskRawDiskMappingVer1BackingInfo",
    ],
)
def test_parents_of_every_kind_count(store_on: Ask, kind: str) -> None:
    base = backing("[one] image_a/a.vmdk", kind=kind, tag="parent")
    middle = backing("[one] middle/middle.vmdk", kind=kind, parent=base, tag="parent")
    store = store_on(
        datastore("one", "web"), vm("web", devices(backing("[one] web/web.vmdk", kind=kind, parent=middle)))
    )
    assert users(store) == [WEB]


def test_the_pages_of_an_answer_are_all_read(store_on: Ask) -> None:
    asked = []

    def page(call: Call, number: int, *things: str) -> Answer:
        asked.append(number)
        token = f"<token>{number + 1}</token>" if number < 3 else ""
        return returned(call, token + "".join(f"<objects>{each}</objects>" for each in things))

    store = store_on(
        behaviors={
            "RetrievePropertiesEx": lambda call: page(call, 1, *above(), datastore("one", "web", "db")),
            "ContinueRetrievePropertiesEx": lambda call: (
                page(call, 3, vm("db", devices(backing("[one] db/db.vmdk", parent=IN_IMAGE))))
                if asked[-1] == 2
                else page(call, 2, vm("web", devices(backing("[one] web/web.vmdk", parent=IN_IMAGE))))
            ),
        }
    )
    assert users(store) == [WEB, "VM db (disk [one] db/db.vmdk)"]
    assert asked == [1, 2, 3]


def test_a_page_that_is_lost_is_no_end_of_the_vms(store_on: Ask) -> None:
    store = store_on(
        behaviors={
            "RetrievePropertiesEx": lambda call: returned(
                call,
                "<token>2</token>" + "".join(f"<objects>{each}</objects>" for each in (*above(), datastore("one"))),
            ),
            "ContinueRetrievePropertiesEx": lambda call: fault("InvalidProperty"),
        }
    )
    with pytest.raises(DatastoreUnavailable, match="cannot read the VMs of the inventory: InvalidProperty"):
        users(store)


UNREADABLE = {
    "no permission": (vm("web", missing=("config.hardware.device", "NoPermission")), "NoPermission"),
    "host away": (vm("web", missing=("config.hardware.device", "HostCommunication")), "HostCommunication"),
    "inaccessible": (vm("web"), "the server has no configuration of the VM"),
    "of no datastore": (vm("web", on=()), "the server has no configuration of the VM"),
    "snapshot": (
        vm("web", devices(), references("rootSnapshot", "VirtualMachineSnapshot", "first"))
        + "</objects><objects>"
        + thing("VirtualMachineSnapshot", "first", missing=("config.hardware.device", "NoPermission")),
        "of a snapshot of it: NoPermission",
    ),
    "snapshot not shown": (
        vm("web", devices(), references("rootSnapshot", "VirtualMachineSnapshot", "first")),
        "one of its snapshots is not shown",
    ),
    "disk without a file": (
        vm("web", devices('<backing xsi:type="VirtualDeviceBackingInfo"/>')),
        "one of its disks, None",
    ),
    "disk elsewhere": (vm("web", devices(backing("[] /vmfs/volumes/x/a.vmdk"))), "'[] /vmfs/volumes/x/a.vmdk'"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_vm_that_is_not_told_may_use_any_image(store_on: Ask, case: str) -> None:
    told, why = UNREADABLE[case]
    store = store_on(datastore("one"), told)
    with pytest.raises(UseUnknown) as caught:
        users(store)
    message = caught.value.message
    assert message.startswith("VM web of server fake: ") and why in message and message.endswith("and try again")


def test_a_vm_that_only_the_datastore_names_may_use_any_image(store_on: Ask) -> None:
    with pytest.raises(UseUnknown, match="VM web of server fake: the server has no configuration of the VM"):
        users(store_on(datastore("one", "web")))


def test_a_vm_that_is_made_meanwhile_is_asked_for_again(store_on: Ask) -> None:
    answers = iter([(), (vm("web", devices(backing("[one] web/web.vmdk", parent=IN_IMAGE))),)])
    store = store_on(
        behaviors={"RetrievePropertiesEx": lambda call: found(call, *above(), datastore("one", "web"), *next(answers))}
    )
    assert users(store) == [WEB]


@pytest.mark.parametrize("missing", [("config.hardware.device", "NoPermission"), None])
def test_a_vm_elsewhere_that_is_not_told_is_none_of_ours(store_on: Ask, missing: tuple[str, str] | None) -> None:
    store = store_on(datastore("one"), datastore("two", "web"), vm("web", on=("two",), missing=missing))
    assert users(store) == []
    assert known(store) == []


def test_a_vm_that_is_gone_meanwhile_uses_nothing(store_on: Ask) -> None:
    gone = vm("web", missing=("config.hardware.device", "ManagedObjectNotFound"))
    assert users(store_on(datastore("one", "web"), gone)) == []


def test_a_vm_elsewhere_whose_disk_is_here_by_reference_counts(store_on: Ask) -> None:
    """Whatever name the server has for the datastore in the path, as while it is renamed."""
    disk = backing("[two] web/web.vmdk", parent=backing("[old] image_a/a.vmdk", datastore="one", tag="parent"))
    store = store_on(datastore("one"), datastore("two", "web"), vm("web", devices(disk), on=("two",)))
    assert users(store) == ["VM web (disk [two] web/web.vmdk)"]


def test_a_vm_that_touches_nothing_here_is_not_counted(store_on: Ask) -> None:
    disk = backing("[two] web/web.vmdk", datastore="two")
    store = store_on(datastore("one"), datastore("two", "web"), vm("web", devices(disk), on=("two",)))
    assert known(store) == []


def test_the_name_of_a_vm_is_printed_as_one_line(store_on: Ask) -> None:
    disk = backing("[one] web/web.vmdk", parent=IN_IMAGE)
    told = thing("VirtualMachine", "vm-1", value("name", "web&#10;x&#x85;"), devices(disk))
    assert users(store_on(datastore("one", "vm-1"), told)) == ["VM web?x? (disk [one] web/web.vmdk)"]


def test_an_answer_without_anything_is_no_inventory_without_vms(store_on: Ask) -> None:
    with pytest.raises(DatastoreUnavailable, match="has no datastore one"):
        users(store_on(behaviors={"RetrievePropertiesEx": returned}))
