"""What images a datastore has, from its directories and not from memory: for what deletes."""

from sidecar.datastores.interface import Datastore
from sidecar.errors import InvalidRequest
from sidecar.images.store import ImageStore


def image_ids(store: ImageStore) -> list[str]:
    """The ids of all that may be images, sorted; an I/O error is raised, never taken for "no image"."""
    found: set[str] = set()
    layout, datastore = store.layout, store.datastore
    try:
        collections = layout.collections(datastore)
    except FileNotFoundError:
        return []
    for collection in collections:
        for name in names_if_directory(datastore, collection):
            image_id = layout.image_id(collection, name)
            if image_id is not None:
                found.add(image_id)
    return sorted(found)


def names_if_directory(datastore: Datastore, path: str) -> list[str]:
    """The names in a directory; none when it is gone, or is a file or link that somebody put there."""
    try:
        return datastore.names(path)
    except (FileNotFoundError, InvalidRequest):
        return []
