"""The images that the VMs of a server use, as the server tells of their disks."""

from collections.abc import Iterator, Mapping, Sequence

from sidecar.datastores.interface import KnownVm, VmServer
from sidecar.errors import DatastoreUnavailable, ImageNotFound, ImagesError, UseUnknown
from sidecar.images.image import ImageKey, ImageState
from sidecar.images.listing import image_ids
from sidecar.images.store import ImageStore
from sidecar.images.usage_paths import Places, find_places
from sidecar.images.vm_disks import printable

_ADVICE = (
    "it is not known which images it uses, so none can be purged: make it accessible there, let the sidecar's account "
    "read it, or remove it from the inventory, and try again"
)


def servers_of(stores: Sequence[ImageStore]) -> dict[VmServer, ImageStore]:
    """The servers that know VMs of these, each with the first of its own."""
    found: dict[VmServer, ImageStore] = {}
    for store in stores:
        if server := store.datastore.vm_server():
            found.setdefault(server, store)
    return found


def read_known(
    stores: Sequence[ImageStore], server: VmServer
) -> Sequence[tuple[str, Mapping[ImageKey, Sequence[str]]]]:
    """Each VM's name, and the images that its disks need, there or not, each with those disks in words.

    UseUnknown with the VM when the server does not tell its disks; DatastoreUnavailable and the like when it does not
    answer.
    """
    places = find_places(stores)
    store_of = {store.datastore: store for store in stores}

    vms = server.vms(list(store_of), lambda datastore: _image_directories(store_of[datastore]))
    return [(printable(vm.name), _uses(places, server, vm)) for vm in vms]


def _image_directories(store: ImageStore) -> Iterator[str]:
    """Those of images that are whole first: nobody publishes there, or clears the way for that."""
    others = []
    for image_id in image_ids(store):
        try:
            image = store.read(image_id)
        except ImageNotFound:
            continue
        except ImagesError:
            others.append(store.layout.image_directory(image_id))
            continue
        if image.state is ImageState.INCOMPLETE:
            others.append(image.directory)
        else:
            yield image.directory
    yield from others


def _uses(places: Places, server: VmServer, vm: KnownVm) -> Mapping[ImageKey, Sequence[str]]:
    name = printable(vm.name)
    if vm.unknown:
        raise UseUnknown(printable(f"VM {name} of server {server.name}: {vm.unknown}; {_ADVICE}"))
    found: dict[ImageKey, dict[str, None]] = {}
    for disk in vm.disks:
        for place in disk.places:
            try:
                keys = [key for datastore in place.datastores for key in places.images_at(datastore, place.path)]
            except OSError as error:
                raise DatastoreUnavailable(
                    printable(f"VM {name} of server {server.name}: {error.filename}: {error.strerror}; {_ADVICE}")
                ) from error
            for key in keys:
                found.setdefault(key, {})[printable(f"VM {name} (disk {disk.name})")] = None
    return {key: list(uses) for key, uses in found.items()}
