"""What the server is asked when it is to copy a disk."""

import re
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from pyVmomi import vim

from sidecar.errors import DatastoreDenied
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.disks import copy_task, may_preallocate
from sidecar.vsphere.inventory import ServerDatastore
from tests.support.soap import Answer, Behavior, Call, content, content_of_a_host, fault, soap_server

ONE = ServerDatastore(
    vim.Datastore("datastore-1"),
    vim.Datacenter("dc"),
    "one",
    "/DC/datastore/one",
    *("VMFS", 10, 10, True),
)


def asked(directory: Path, stack: ExitStack, server_content: Behavior, adapter_type: str | None) -> str:
    """The request for a copy of a disk with that adapter type, which is refused."""
    bodies: list[str] = []

    def refuse(call: Call) -> Answer:
        bodies.append(call.body)
        return fault("NoPermission")

    behaviors: dict[str, Behavior] = {"RetrieveServiceContent": server_content, "CopyVirtualDisk_Task": refuse}
    server = stack.enter_context(soap_server(directory, behaviors))
    connection = stack.enter_context(closing(Connection(server)))
    with pytest.raises(DatastoreDenied):
        copy_task(connection, ONE, "a/a.vmdk", ONE, "b/b.vmdk", adapter_type=adapter_type).run(lambda percent: None)
    return bodies[0]


@pytest.mark.parametrize(
    ("adapter_type", "sent"),
    [
        ("ide", "ide"),
        ("lsilogic", "lsiLogic"),
        ("busLogic", "busLogic"),
        ("legacyESX", "lsiLogic"),
        ("pvscsi", "lsiLogic"),
        (None, "lsiLogic"),
    ],
)
def test_a_host_makes_a_thin_disk_with_the_adapter_type_of_its_source(
    tmp_path: Path, stack: ExitStack, adapter_type: str | None, sent: str
) -> None:
    body = asked(tmp_path, stack, content_of_a_host, adapter_type)
    assert re.findall(r"<(diskType|adapterType)[^>]*>(\w+)<", body) == [("diskType", "thin"), ("adapterType", sent)]


def test_a_vcenter_is_sent_no_specification(tmp_path: Path, stack: ExitStack) -> None:
    assert "adapterType" not in asked(tmp_path, stack, content, "ide")


@pytest.mark.parametrize(("server_content", "may"), [(content, True), (content_of_a_host, False)])
def test_only_a_host_is_known_to_make_thin_disks(
    tmp_path: Path, stack: ExitStack, server_content: Behavior, may: bool
) -> None:
    server = stack.enter_context(soap_server(tmp_path, {"RetrieveServiceContent": server_content}))
    assert may_preallocate(stack.enter_context(closing(Connection(server)))) is may
