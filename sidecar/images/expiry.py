"""Expiry: purge the deleted images whose time is over, the oldest first; earlier where space runs out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from sidecar.errors import ImageInUse, ImageNotFound, ImagesError, LockTimeout
from sidecar.images.deletion import discard_unused, free_discarded
from sidecar.images.image import ImageState
from sidecar.images.listing import image_ids, names_if_directory
from sidecar.images.names import TOMBSTONE
from sidecar.images.store import ImageStore
from sidecar.images.vm_scan import Uses, VmSource, read_uses

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Expired:
    """The ids that were purged, and their allocated bytes; what stays though its time is over, and why."""

    purged: list[str] = field(default_factory=list)
    freed: int = 0
    kept: list[str] = field(default_factory=list)


def expire(
    store: ImageStore,
    source: VmSource,
    *,
    grace: float,
    wanted_free: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Expired:
    """Purges what was tombstoned more than `grace` seconds ago, and more while fewer than `wanted_free` bytes are free.

    Never what somebody has open, or a VM uses: the VMs are read when there is something to purge, and again under the
    lock of each image; what is raised the first time ends it, before anything is purged.
    """
    expired = Expired()
    due_ns = store.clock() - int(grace * 1e9)
    free = store.datastore.capacity().free
    used: Uses | None = None
    for deleted_ns, image_id in _tombstoned(store, check):
        check()
        # Some file systems count what was freed a moment later.
        if deleted_ns > due_ns and max(store.datastore.capacity().free, free + expired.freed) >= wanted_free:
            break
        used = read_uses(source, store.stores, check) if used is None else used
        key = store.key(image_id)
        if users := used.get(key):
            expired.kept.append(f"{key}: it is in use by {', '.join(users[:3])}")
            continue
        try:
            freed = _purge(store, image_id, deleted_ns, source, check)
        except (FileNotFoundError, ImageNotFound):
            continue
        except (LockTimeout, ImageInUse) as error:
            expired.kept.append(error.message)
        except ImagesError as error:
            _log.warning("image not purged image=%s error=%s", key, error)
            expired.kept.append(f"{key}: {error.message}")
            store.datastore.check()
        else:
            if freed is not None:
                expired.purged.append(image_id)
                expired.freed += freed
                _log.info("image purged image=%s freed=%s", key, freed)
    return expired


def _tombstoned(store: ImageStore, check: Callable[[], None]) -> list[tuple[int, str]]:
    """The tombstoned images, each with when that was, the oldest first."""
    found: list[tuple[int, str]] = []
    # Where one directory at a time is slow. What is decided by it is looked at again, under the image's lock.
    tree = store.datastore.tree() or {}
    for image_id in image_ids(store):
        check()
        directory = store.layout.image_directory(image_id)
        if (listed := tree.get(directory)) is not None:
            found += [(entry.modified_ns, image_id) for entry in listed.entries() if entry.name == TOMBSTONE]
        elif TOMBSTONE in names_if_directory(store.datastore, directory):
            try:
                found.append((store.datastore.entry(f"{directory}/{TOMBSTONE}").modified_ns, image_id))
            except FileNotFoundError:
                continue
    return sorted(found)


def _purge(
    store: ImageStore, image_id: str, deleted_ns: int, source: VmSource, check: Callable[[], None]
) -> int | None:
    """The bytes; None when it was restored, or restored and deleted again, which begins its time anew."""
    with store.lock(image_id, "purge", timeout=0):
        image = store.read(image_id)
        if image.state is not ImageState.TOMBSTONED or image.tombstoned_ns != deleted_ns:
            return None
        if users := read_uses(source, store.stores, check, locked=True).get(image.key):
            raise ImageInUse(f"{image.key} is in use by {', '.join(users[:3])}")
        trash = discard_unused(store, image)
    store.changed(image_id)
    free_discarded(store, image_id, trash)
    return image.allocated
