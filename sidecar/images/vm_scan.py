"""Which images the VMs use: those that servers know, and all VMs of all datastores, read one by one.

One that cannot be read may use anything. A VM that is found in both ways is read twice: its server may know it by other
files than those that lie there, and the other way round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sidecar.images.image import ImageKey
from sidecar.images.known_vms import read_known, servers_of
from sidecar.images.store import ImageStore
from sidecar.images.vm_disks import printable
from sidecar.images.vm_look import VmLook

Uses = Mapping[ImageKey, Sequence[str]]
"""By what each image is used, in words; an image that is not in it is used by no VM."""


@dataclass(frozen=True, slots=True)
class VmSource:
    """Finds VMs, and reads what they use; called in the thread of a look.

    `directories` of a datastore, which is usable: those of its VMs, relative to the root. `uses` of all datastores, one
    of them and a VM's directory there: the images that any of its disks needs; nothing when the VM is gone; an
    ImagesError when anything of it cannot be read.
    """

    directories: Callable[[ImageStore], Sequence[str]]
    uses: Callable[[Sequence[ImageStore], ImageStore, str], Uses]


class VmSteps:
    """What is called while the VMs are read: by itself it does nothing, and they are read as fast as they can be."""

    def expect(self, total: int) -> None:
        """So many there are, those that are read included."""

    def begin(self, vm: str) -> None:
        """Before each VM. What it raises ends the reading."""

    def end(self) -> None:
        """After each VM."""


def read_uses(
    source: VmSource,
    stores: Sequence[ImageStore],
    check: Callable[[], None],
    *,
    locked: bool = False,
    steps: VmSteps | None = None,
) -> Uses:
    """What all VMs use; what the source raises when one cannot be read.

    What `check` raises ends it, also while a read hangs. UseUnknown when one VM is not read in five
    minutes; when `locked`, so that others wait for an image's lock, when all VMs are not.

    It ends when every VM that there is has been read: one that moves from a datastore to another meanwhile, and was in
    neither when that was listed, is found when they are listed again. A server knows it all the while.
    """
    steps = steps or VmSteps()
    used: dict[ImageKey, list[str]] = {}
    read: set[tuple[ImageStore, str]] = set()
    # The VMs of a datastore without a directory here are known by its server alone.
    listed = [store for store in stores if store.datastore.root_path]
    known = 0
    with VmLook(stores, check, locked=locked) as look:
        # Once, and first: a server that is away ends a scan before it has taken hours.
        for server, store in servers_of(stores).items():
            vms = look.at(store, f"what server {server.name} tells of its VMs", partial(read_known, stores, server))
            known += len(vms)
            steps.expect(known)
            for name, found in vms:
                steps.begin(f"{server.name}/{name}")
                _add(used, found)
                steps.end()
        while new := [vm for store in listed for vm in _list(look, source, store) if vm not in read]:
            steps.expect(known + len(read) + len(new))
            for store, directory in new:
                steps.begin(f"{store.datastore.name}/{printable(directory)}")
                uses = look.at(store, f"VM {printable(directory)}", partial(source.uses, stores, store, directory))
                _add(used, uses)
                read.add((store, directory))
                steps.end()
    return used


def _add(used: dict[ImageKey, list[str]], found: Uses) -> None:
    for key, uses in found.items():
        used.setdefault(key, []).extend(uses)


def _list(look: VmLook, source: VmSource, store: ImageStore) -> list[tuple[ImageStore, str]]:
    def directories() -> Sequence[str]:
        store.datastore.check()  # one that is away is not one without VMs
        return source.directories(store)

    return [(store, directory) for directory in look.at(store, "the list of its VMs", directories)]
