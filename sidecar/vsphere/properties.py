"""Reading properties of a server's objects, many with one request."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from pyVmomi import vim, vmodl
from pyVmomi.VmomiSupport import ManagedObject

_Collector = vmodl.query.PropertyCollector

_log = logging.getLogger(__name__)


def read(content: vim.ServiceInstanceContent, thing: ManagedObject, names: Sequence[str]) -> dict[str, Any]:
    """Properties of one object by name, without those that are not set; raises the server's faults."""
    wanted = _Collector.FilterSpec(
        objectSet=[_Collector.ObjectSpec(obj=thing)],
        propSet=[_Collector.PropertySpec(type=type(thing), pathSet=list(names))],
    )
    for found in _retrieve(content, wanted):
        for missing in found.missingSet:
            raise missing.fault
        return {each.name: each.val for each in found.propSet}
    raise vmodl.fault.ManagedObjectNotFound(obj=thing)


def retrieve(
    content: vim.ServiceInstanceContent, wanted: _Collector.FilterSpec
) -> list[tuple[ManagedObject, dict[str, Any]]]:
    """Every object that `wanted` selects and that can be read, with its properties; raises the server's faults."""
    readable = []
    for found in _retrieve(content, wanted):
        if found.missingSet:
            # Hidden from the account, or of a host that is away: no reason to know nothing of the others.
            missing = found.missingSet[0]
            _log.info("left out object=%s property=%s fault=%s", found.obj, missing.path, type(missing.fault).__name__)
        else:
            readable.append((found.obj, {each.name: each.val for each in found.propSet}))
    return readable


def _retrieve(content: vim.ServiceInstanceContent, wanted: _Collector.FilterSpec) -> Iterator[_Collector.ObjectContent]:
    """A server without a session for the caller answers as if nothing were set, and says why beside it: raised here."""
    collector = content.propertyCollector
    answer = collector.RetrievePropertiesEx([wanted], _Collector.RetrieveOptions())
    while answer is not None:
        for item in answer.objects:
            for missing in item.missingSet:
                if isinstance(missing.fault, vim.fault.NotAuthenticated):
                    raise missing.fault
            yield item
        answer = collector.ContinueRetrievePropertiesEx(answer.token) if answer.token else None
