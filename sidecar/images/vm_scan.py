"""Which images the VMs use: all VMs of all datastores, read one by one. One that cannot be read may use anything."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sidecar.errors import UseUnknown
from sidecar.images.image import ImageKey
from sidecar.images.store import ImageStore

# For how long the VMs are looked at while an image's lock is held: whoever makes a VM of it waits for that.
LOCKED_SECONDS = 300.0

Uses = Mapping[ImageKey, Sequence[str]]
"""By what each image is used, in words; an image that is not in it is used by no VM."""


@dataclass(frozen=True, slots=True)
class VmSource:
    """Finds VMs, and reads what they use.

    `directories` of a datastore: those of its VMs, relative to the root. `uses` of all datastores, one of them and a
    VM's directory there: the images that any of its disks needs, with the uses, which have a text; nothing when the VM
    is gone; an ImagesError when anything of it cannot be read.
    """

    directories: Callable[[ImageStore], Sequence[str]]
    uses: Callable[[Sequence[ImageStore], ImageStore, str], Mapping[ImageKey, Sequence[object]]]


class VmSteps(Protocol):
    """Who reads the VMs says how: at what pace, and whether to go on."""

    def expect(self, total: int) -> None: ...

    def begin(self, vm: str) -> None:
        """Before each VM. What it raises ends the reading."""

    def end(self) -> None: ...


def in_time(check: Callable[[], None], monotonic: Callable[[], float] = time.monotonic) -> Callable[[], None]:
    """`check`, which raises UseUnknown, too, LOCKED_SECONDS from now on."""
    until = monotonic() + LOCKED_SECONDS

    def check_time() -> None:
        check()
        if monotonic() >= until:
            raise UseUnknown(
                f"the VMs of all datastores were not read within {LOCKED_SECONDS:g} s, and an image's lock is held no "
                "longer for that: it is not known which images they use, so none can be purged; look why a datastore "
                "is slow, and try again"
            )

    return check_time


@dataclass(frozen=True, slots=True)
class CheckedSteps:
    """As fast as they can be read, for as long as `check` raises nothing."""

    check: Callable[[], None]

    def expect(self, total: int) -> None: ...

    def begin(self, vm: str) -> None:
        self.check()

    def end(self) -> None: ...


def read_uses(source: VmSource, stores: Sequence[ImageStore], steps: VmSteps) -> Uses:
    """What all VMs use; what the source raises when one cannot be read.

    It ends when every VM that there is has been read: one that moves from a datastore to another meanwhile, and was in
    neither when that was listed, is found when they are listed again.
    """
    used: dict[ImageKey, list[str]] = {}
    read: set[tuple[str, str]] = set()
    while new := [vm for vm in _list_all(source, stores) if _name(*vm) not in read]:
        steps.expect(len(read) + len(new))
        for store, directory in new:
            steps.begin("/".join(_name(store, directory)))
            for key, uses in source.uses(stores, store, directory).items():
                used.setdefault(key, []).extend(map(str, uses))
            read.add(_name(store, directory))
            steps.end()
    return used


def _list_all(source: VmSource, stores: Sequence[ImageStore]) -> list[tuple[ImageStore, str]]:
    return [(store, directory) for store in stores for directory in source.directories(store)]


def _name(store: ImageStore, directory: str) -> tuple[str, str]:
    return store.datastore.name, directory
