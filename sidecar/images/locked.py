"""Which locks of a datastore are held, and by whom."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from sidecar.datastores.interface import EntryKind
from sidecar.errors import InvalidRequest
from sidecar.images.names import LOCK_SUFFIX
from sidecar.images.store import ImageStore
from sidecar.locks.interface import LockHolder


@dataclass(frozen=True, slots=True)
class Held:
    """A lock that was held when it was looked at: of an image, or of a staging directory, whose image may be ""."""

    path: str
    image_id: str
    staging: bool
    holder: LockHolder


def held_locks(store: ImageStore) -> list[Held]:
    """The locks that are held, by path, whoever holds them. Changes nothing, and no change waits for it."""
    places = [(path, image_id, False) for path, image_id in _image_locks(store)]
    places += [(place.lock, place.image_id, True) for place in store.layout.staging_places(store.datastore)]
    found = []
    for path, image_id, staging in sorted(places):
        # Let go of since it was listed; or what somebody put there: a link, a pipe.
        with contextlib.suppress(FileNotFoundError, InvalidRequest):
            if store.datastore.entry(path).kind is not EntryKind.OTHER:
                holder = store.datastore.lock_holder(path)
                if holder is not None:
                    found.append(Held(path, image_id, staging, holder))
    return found


def _image_locks(store: ImageStore) -> Iterator[tuple[str, str]]:
    """The path and the image of each lock file that may be there, also where there is nothing else of the image yet."""
    layout = store.layout
    for collection in layout.collections(store.datastore):
        # Gone meanwhile, or a file or link that somebody put there: no collection.
        with contextlib.suppress(FileNotFoundError, InvalidRequest):
            names = set(store.datastore.names(collection))
            image_ids = {layout.image_id(collection, name.removesuffix(LOCK_SUFFIX)) for name in names}
            for image_id in filter(None, image_ids):
                path = layout.image_lock(image_id)
                directory, _, name = path.rpartition("/")
                if directory != collection or name in names:
                    yield path, image_id
