"""Datastores with VMs on them, as hypervisors leave them: two of each kind of name, so that paths cross."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.datastores.posix import PosixDatastore
from sidecar.images.image import ImageKey
from sidecar.images.layouts import LAYOUTS
from sidecar.images.store import ImageStore
from sidecar.images.usage import uses_of_vm
from tests.support.places import Place


@dataclass(frozen=True, slots=True)
class Host:
    """The datastores of a host: `one` (compound), `two` (sharded), `three` (vsan)."""

    places: dict[str, Place]
    stores: dict[str, ImageStore]

    def vm(self, vm_id: str, datastore: str = "one") -> Path:
        """The directory of a VM, which is made."""
        root = self.places[datastore].root
        directory = root / "vms" / vm_id[:2] / vm_id if datastore == "two" else root / f"vm_{vm_id}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def uses(self, directory: Path, datastore: str = "one") -> dict[str, list[str]]:
        """The images that the VM there uses, and by what, in words."""
        store = self.stores[datastore]
        relative = str(directory.relative_to(self.places[datastore].root))
        assert relative in store.layout.vm_directories(store.datastore)
        found = uses_of_vm(list(self.stores.values()), store, relative)
        return {str(key): list(uses) for key, uses in found.items()}

    def used(self, directory: Path, datastore: str = "one") -> set[str]:
        return set(self.uses(directory, datastore))

    def key(self, name: str) -> ImageKey:
        return ImageKey(*name.split("/"))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    places = {
        name: Place(name, layout, tmp_path / "datastores" / name)
        for name, layout in (("one", "compound"), ("two", "sharded"), ("three", "vsan"))
    }
    for place in places.values():
        place.root.mkdir(parents=True)
        place.plant("a")
    stores = {
        name: ImageStore(PosixDatastore(name, str(place.root)), LAYOUTS[place.layout]) for name, place in places.items()
    }
    yield Host(places, stores)
    for store in stores.values():
        store.datastore.close()


def delta(
    hint: str, *, kind: str = "VMFSSPARSE", extent: str = "disk-delta.vmdk", create_type: str = "vmfsSparse"
) -> str:
    """The descriptor of a linked clone, as ESX writes it."""
    return (
        '# Disk DescriptorFile\nversion=1\nencoding="UTF-8"\nCID=8f3a1c2e\nparentCID=fffffffe\nisNativeSnapshot="no"\n'
        f'createType="{create_type}"\nparentFileNameHint="{hint}"\n'
        f'# Extent description\nRW 4096 {kind} "{extent}"\n\n# The Disk Data Base \n#DDB\n\n'
        'ddb.adapterType = "lsilogic"\nddb.longContentID = "27f4d6d2f2ba7fb6d7f2c0ed8f3a1c2e"\n'
    )
