"""Finding a datastore in a server's inventory, by its name or by its path there."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim, vmodl
from pyVmomi.VmomiSupport import ManagedObject

from sidecar.errors import DatastoreUnavailable
from sidecar.vsphere import properties
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.faults import printable

_Collector = vmodl.query.PropertyCollector

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerDatastore:
    """A datastore as its server knows it. Sizes are bytes; `type` such as VMFS, NFS, NFS41, vsan.

    `url` has what the hosts know its volume by; that and the reference say whether it is still the same one.
    """

    datastore: vim.Datastore
    datacenter: vim.Datacenter
    name: str
    path: str
    type: str
    capacity: int
    free: int
    accessible: bool
    datacenter_path: str = ""
    url: str = ""

    @property
    def is_vsan(self) -> bool:
        return self.type.lower() == "vsan"


def find_datastore(connection: Connection, datastore: str, datacenter: str | None = None) -> ServerDatastore:
    """The one datastore of that name, or inventory path such as /DC0/datastore/one, in that datacenter, or in any.

    DatastoreUnavailable when there is none, or more than one; what there is, is in the message.
    """
    return find_datastores(connection, [(datastore, datacenter)])[0]


def find_datastores(connection: Connection, wanted: Iterable[tuple[str, str | None]]) -> list[ServerDatastore]:
    """`find_datastore` for each, by one look at the inventory."""
    known = connection.call("read the inventory", _datastores, repeatable=True)
    return [choose_datastore(connection.server.name, known, *names) for names in wanted]


def choose_datastore(
    server: str, known: Sequence[ServerDatastore], datastore: str, datacenter: str | None
) -> ServerDatastore:
    """As `find_datastore`, among those that are known of the server."""
    found = [
        each
        for each in known
        if _is_meant(datastore, each.path) and (datacenter is None or _is_meant(datacenter, each.datacenter_path))
    ]
    if len(found) == 1:
        return found[0]
    within = f" in the datacenter {datacenter}" if datacenter else ""
    if found:
        raise DatastoreUnavailable(
            f"server {server} has more than one datastore {datastore}{within}: configure the path "
            f"of one, {_listed(found)}"
        )
    raise DatastoreUnavailable(
        f"server {server} has no datastore {datastore}{within} that the sidecar's account may see; "
        f"there are: {_listed(known) or 'none'}"
    )


def _listed(datastores: Sequence[ServerDatastore]) -> str:
    return ", ".join(printable(path) for path in sorted(each.path for each in datastores)[:10])


def _is_meant(wanted: str, path: str) -> bool:
    """Whether it is the path or the last name in it; a slash within a name is written %2f by the server."""
    return wanted in (path, path.rpartition("/")[2])


def _datastores(content: vim.ServiceInstanceContent) -> list[ServerDatastore]:
    """All of them, with one request for each hundred or so objects, however deep they lie in folders."""
    into = [_Collector.SelectionSpec(name=name) for name in ("children", "datastores")]
    wanted = _Collector.FilterSpec(
        objectSet=[
            _Collector.ObjectSpec(
                obj=content.rootFolder,
                selectSet=[
                    _Collector.TraversalSpec(name="children", type=vim.Folder, path="childEntity", selectSet=into),
                    _Collector.TraversalSpec(
                        name="datastores", type=vim.Datacenter, path="datastoreFolder", selectSet=into
                    ),
                ],
            )
        ],
        propSet=datastore_properties(),
    )
    return datastores_in(properties.readable(properties.retrieve(content, wanted)))


def datastore_properties() -> list[_Collector.PropertySpec]:
    """What `datastores_in` needs of the objects."""
    return [
        _Collector.PropertySpec(type=vim.Folder, pathSet=["name", "parent"]),
        _Collector.PropertySpec(type=vim.Datacenter, pathSet=["name", "parent"]),
        _Collector.PropertySpec(type=vim.Datastore, pathSet=["name", "parent", "summary"]),
    ]


def datastores_in(things: Mapping[ManagedObject, Mapping[str, Any]]) -> list[ServerDatastore]:
    """The datastores among objects that were read, with what is above them."""
    found = []
    for thing, values in things.items():
        if not isinstance(thing, vim.Datastore):
            continue
        above = _ancestors(thing, things)
        datacenter = next((each for each in above if isinstance(each, vim.Datacenter)), None)
        names: list[Any] = [things[each].get("name") for each in (*reversed(above), thing)]
        summary = values.get("summary")
        if datacenter is None or not all(names) or not isinstance(summary, vim.Datastore.Summary):
            # What leads to it, or some of it, is hidden from the account.
            _log.info("left out datastore=%s name=%r", thing, names[-1])
            continue
        down_to_datacenter = names[: len(above) - above.index(datacenter)]
        found.append(
            ServerDatastore(
                datastore=thing,
                datacenter=datacenter,
                name=names[-1],
                path="/" + "/".join(names),
                type=summary.type,
                capacity=summary.capacity,
                free=summary.freeSpace,
                accessible=summary.accessible,
                datacenter_path="/" + "/".join(down_to_datacenter),
                url=summary.url,
            )
        )
    return found


def _ancestors(thing: ManagedObject, things: Mapping[ManagedObject, Mapping[str, Any]]) -> list[ManagedObject]:
    """The nearest first, without the root folder, which has a name that no path shows."""
    above: list[Any] = []
    parent: Any
    while (parent := things[thing].get("parent")) in things and things[parent].get("parent") is not None:
        above.append(parent)
        thing = parent
    return above
