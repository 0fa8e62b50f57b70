"""Reading properties of a server's objects, many with one request."""

from collections.abc import Sequence
from typing import Any

from pyVmomi import vim, vmodl
from pyVmomi.VmomiSupport import ManagedObject

_Collector = vmodl.query.PropertyCollector


def read(content: vim.ServiceInstanceContent, thing: ManagedObject, names: Sequence[str]) -> dict[str, Any]:
    """Properties of one object by name, without those that are not set; raises the server's faults."""
    wanted = _Collector.FilterSpec(
        objectSet=[_Collector.ObjectSpec(obj=thing)],
        propSet=[_Collector.PropertySpec(type=type(thing), pathSet=list(names))],
    )
    found = retrieve(content, wanted)
    if not found:
        raise vmodl.fault.ManagedObjectNotFound(obj=thing)
    return found[0][1]


def retrieve(
    content: vim.ServiceInstanceContent, wanted: _Collector.FilterSpec
) -> list[tuple[ManagedObject, dict[str, Any]]]:
    """Every object that `wanted` selects, with its properties; raises the server's faults.

    A server without a session for the caller answers as if nothing were set, and says why beside it: that is raised.
    """
    collector = content.propertyCollector
    found = []
    answer = collector.RetrievePropertiesEx([wanted], _Collector.RetrieveOptions())
    while answer is not None:
        for item in answer.objects:
            for missing in item.missingSet:
                raise missing.fault
            found.append((item.obj, {each.name: each.val for each in item.propSet}))
        answer = collector.ContinueRetrievePropertiesEx(answer.token) if answer.token else None
    return found
