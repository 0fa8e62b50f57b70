"""In use: the images that the disks of VMs are made on, whether a VM runs or not.

What cannot be read is an error and never "no use": a VM that is not known may use any image. So is a datastore that
does not answer: it would hold up the others, whose images its VMs may use.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

from sidecar.errors import DatastoreUnavailable, ImageInUse
from sidecar.images.image import ImageKey
from sidecar.images.store import ImageStore
from sidecar.images.usage_paths import Places, find_places
from sidecar.images.vm_disks import VmDisks
from sidecar.images.vm_scan import Uses, VmSource, read_uses

_MOST_TOLD = 5


def vm_directories(store: ImageStore) -> list[str]:
    """What may be a VM's, relative to the root of the datastore, which must be usable."""
    try:
        return store.layout.vm_directories(store.datastore)
    except FileNotFoundError as error:  # never taken for an image that is not there
        raise DatastoreUnavailable(f"{store.datastore.name}: {error.filename or 'its root'} vanished") from error


def uses_of_vm(stores: Sequence[ImageStore], store: ImageStore, vm_directory: str) -> Uses:
    """The images that any disk of a VM needs, there or not, and which disk, in words; nothing when the VM is gone.

    `stores`: every datastore of this host, in which those images may be. UseUnknown, DatastoreDenied or
    DatastoreUnavailable, with the VM and the file, when anything of it cannot be read.
    """
    return _uses(find_places(stores), store, vm_directory)


def uses_of_image(
    stores: Sequence[ImageStore], key: ImageKey, *, check: Callable[[], None] = lambda: None, locked: bool = False
) -> Sequence[str]:
    """Which VMs need an image, in words: `VM web (disk /srv/images/vm_1/disk.vmdk)`.

    Raises as `uses_of_vm`: one VM that cannot be read may be another user. `check` and `locked`: as of `read_uses`.
    """
    places = cache(partial(find_places, stores))  # once for all VMs, as it reads all mounts
    source = VmSource(vm_directories, lambda stores, store, vm_directory: _uses(places(), store, vm_directory))
    return read_uses(source, stores, check, locked=locked).get(key, ())


def require_no_vm(store: ImageStore, key: ImageKey, check: Callable[[], None]) -> None:
    """ImageInUse, with the VMs, when one on any datastore of this host needs the image of this one.

    Raises as `uses_of_image` when that cannot be known. Call under the image's lock: who makes a VM of an image touches
    it first, under that lock.
    """
    uses = uses_of_image(store.stores, key, check=check, locked=True)
    if uses:
        more = f" and {len(uses) - _MOST_TOLD} more" if len(uses) > _MOST_TOLD else ""
        told = ", ".join(uses[:_MOST_TOLD])
        raise ImageInUse(f"{key} is in use by {told}{more}; remove or convert those disks first")


def _uses(places: Places, store: ImageStore, vm_directory: str) -> Uses:
    name, found = VmDisks(places, store, vm_directory).images()
    return {key: [f"VM {name} (disk {disk})" for disk in disks] for key, disks in found.items()}
