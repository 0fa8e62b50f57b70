"""A datastore is found by its name or its path in the inventory, and what it is comes from the server."""

import os
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from sidecar.errors import DatastoreUnavailable
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.disks import DatastoreAddress, find_all
from sidecar.vsphere.inventory import find_datastore
from tests.support.soap import Answer, Call, found, reference, soap_server, thing, value
from tests.vsphere.conftest import MakeSite, Site

DATACENTERS = {"vcenter": "DC0", "host": "ha-datacenter"}


def test_by_its_name(site: Site, kind: str) -> None:
    found = find_datastore(site.connection(), "one")
    assert (found.name, found.path) == ("one", f"/{DATACENTERS[kind]}/datastore/one")
    assert found.accessible


@pytest.mark.parametrize("by_path", [False, True])
def test_within_a_datacenter(site: Site, kind: str, by_path: bool) -> None:
    name = DATACENTERS[kind]
    connection = site.connection()
    found = find_datastore(connection, "two", f"/{name}" if by_path else name)
    assert found == find_datastore(connection, f"/{name}/datastore/two")
    assert found.name == "two"


@pytest.mark.parametrize("names", [("three", None), ("one", "DC9"), ("/DC9/datastore/one", None)])
def test_one_that_is_not_there_is_told_with_those_that_are(site: Site, kind: str, names: tuple[str, str]) -> None:
    with pytest.raises(DatastoreUnavailable, match=f"there are: /{DATACENTERS[kind]}/datastore/one, ") as caught:
        find_datastore(site.connection(), *names)
    assert f"has no datastore {names[0]}" in caught.value.message


def test_its_type_and_space_come_from_the_server(make_site: MakeSite, kind: str) -> None:
    site = make_site(kind=kind, types={"two": "VMFS"})
    connection = site.connection()
    assert find_datastore(connection, "one").type == "OTHER"
    found = find_datastore(connection, "two")
    assert found.type == "VMFS"
    status = os.statvfs(site.roots["two"])
    assert found.capacity == status.f_blocks * status.f_bsize
    assert 0 < found.free <= found.capacity


def test_one_name_in_two_datacenters_is_none_to_guess(make_site: MakeSite) -> None:
    connection = make_site(datacenters=2).connection()
    with pytest.raises(DatastoreUnavailable, match="more than one datastore one: configure the path of one") as caught:
        find_datastore(connection, "one")
    for datacenter in ("DC0", "DC1"):
        assert f"/{datacenter}/datastore/one" in caught.value.message
        found = find_datastore(connection, "one", datacenter)
        assert found == find_datastore(connection, f"/{datacenter}/datastore/one")
        assert found.path == f"/{datacenter}/datastore/one"


def test_folders_are_looked_into(make_site: MakeSite) -> None:
    connection = make_site(folders=1).connection()
    found = find_datastore(connection, "one")
    assert found.path.startswith("/F0/DC0/datastore/")
    assert find_datastore(connection, found.path, "/F0/DC0") == found


def summary(name: str) -> str:
    fields = f"<datastore type='Datastore'>{name}</datastore><name>{name}</name><url>u</url><capacity>10</capacity>"
    fields += "<freeSpace>5</freeSpace><accessible>true</accessible><multipleHostAccess>true</multipleHostAccess>"
    return value("summary", f"{fields}<type>NFS</type>", "DatastoreSummary")


def named(kind: str, key: str, parent: str, parent_kind: str, *more: str) -> str:
    return thing(kind, key, value("name", key), reference("parent", parent_kind, parent), *more)


def datastore(key: str, *more: str, folder: str = "datastore") -> str:
    return named("Datastore", key, folder, "Folder", *more)


@pytest.mark.parametrize(
    "hidden",
    [
        thing("Datastore", "two", missing=("name", "NoPermission")),
        thing("Datastore", "two", value("name", "two"), missing=("summary", "HostCommunication")),
        thing("Folder", "away", missing=("parent", "ManagedObjectNotFound")),
        datastore("two", summary("two"), folder="away"),
        datastore("two"),
        thing("Datastore", "two", reference("parent", "Folder", "datastore"), summary("two")),
    ],
    ids=["name", "summary", "folder", "datacenter", "no summary", "no name"],
)
def test_what_cannot_be_read_hides_no_other(tmp_path: Path, stack: ExitStack, hidden: str) -> None:
    known = [
        thing("Folder", "root", value("name", "Datacenters")),
        named("Datacenter", "DC", "root", "Folder"),
        named("Folder", "datastore", "DC", "Datacenter"),
        datastore("one", summary("one")),
    ]
    behaviors = {"RetrievePropertiesEx": lambda call: found(call, hidden, *known)}
    server = stack.enter_context(soap_server(tmp_path, behaviors))
    connection = stack.enter_context(closing(Connection(server)))
    one = find_datastore(connection, "one")
    assert (one.path, one.type, one.capacity, one.free) == ("/DC/datastore/one", "NFS", 10, 5)
    with pytest.raises(DatastoreUnavailable, match="has no datastore two that the sidecar's account may see"):
        find_datastore(connection, "two")


def test_a_folder_may_be_called_as_the_one_of_the_datastores(tmp_path: Path, stack: ExitStack) -> None:
    inventory = [
        thing("Folder", "root", value("name", "Datacenters")),
        named("Folder", "datastore", "root", "Folder"),
        named("Datacenter", "DC", "datastore", "Folder"),
        thing("Folder", "inner", value("name", "datastore"), reference("parent", "Datacenter", "DC")),
        datastore("one", summary("one"), folder="inner"),
    ]
    behaviors = {"RetrievePropertiesEx": lambda call: found(call, *inventory)}
    server = stack.enter_context(soap_server(tmp_path, behaviors))
    connection = stack.enter_context(closing(Connection(server)))
    for datacenter in ("DC", "/datastore/DC"):
        one = find_datastore(connection, "one", datacenter)
        assert (one.path, one.datacenter_path) == ("/datastore/DC/datastore/one", "/datastore/DC")
    with pytest.raises(DatastoreUnavailable, match="in the datacenter datastore"):
        find_datastore(connection, "one", "datastore")


def test_several_are_found_by_one_look(tmp_path: Path, stack: ExitStack) -> None:
    looks: list[Call] = []
    inventory = [
        thing("Folder", "root", value("name", "Datacenters")),
        named("Datacenter", "DC", "root", "Folder"),
        named("Folder", "datastore", "DC", "Datacenter"),
        *(datastore(name, summary(name)) for name in ("one", "two")),
    ]

    def look(call: Call) -> Answer:
        looks.append(call)
        return found(call, *inventory)

    server = stack.enter_context(soap_server(tmp_path, {"RetrievePropertiesEx": look}))
    connection = stack.enter_context(closing(Connection(server)))
    addresses = [DatastoreAddress(connection, name) for name in ("one", "two", "one")]
    assert [each.name for each in find_all(*addresses)] == ["one", "two", "one"]
    assert len(looks) == 1
