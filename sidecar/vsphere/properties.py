"""Reading properties of a server's objects, many with one request."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim, vmodl
from pyVmomi.VmomiSupport import ManagedObject

_Collector = vmodl.query.PropertyCollector

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """An object with its properties, without those that are not set; `missing`: why each other one cannot be told."""

    obj: ManagedObject
    values: Mapping[str, Any]
    missing: Mapping[str, Exception]


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


def retrieve(content: vim.ServiceInstanceContent, wanted: _Collector.FilterSpec) -> list[Found]:
    """Every object that `wanted` selects, once, also what cannot be read; raises the server's faults."""
    found = (
        Found(
            item.obj,
            {each.name: each.val for each in item.propSet},
            {each.path: each.fault for each in item.missingSet},
        )
        for item in _retrieve(content, wanted)
    )
    return list({each.obj: each for each in found}.values())


def readable(found: Sequence[Found]) -> dict[ManagedObject, Mapping[str, Any]]:
    """The properties of the objects that can be read."""
    kept = {}
    for each in found:
        if each.missing:
            # Hidden from the account, or of a host that is away: no reason to know nothing of the others.
            path, fault = next(iter(each.missing.items()))
            _log.info("left out object=%s property=%s fault=%s", each.obj, path, type(fault).__name__)
        else:
            kept[each.obj] = each.values
    return kept


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
