"""Delete, restore and purge: a tombstone, its removal, and the end of the bytes."""

import logging
from collections.abc import Callable
from dataclasses import replace

from sidecar.errors import ImageIncomplete, ImageInUse, ImageNotTombstoned, ImagesError, ImageTombstoned
from sidecar.images.checking import check_disk, put_timestamp
from sidecar.images.image import NO_TIMESTAMP, Image, ImageState, not_found
from sidecar.images.names import TIMESTAMP, TOMBSTONE
from sidecar.images.store import ImageStore
from sidecar.images.usage import require_no_vm

_log = logging.getLogger(__name__)


def delete_image(store: ImageStore, image_id: str, *, lock_timeout: float | None = None) -> None:
    """Tombstones an image; ImageTombstoned when it was."""
    try:
        with store.lock(image_id, "delete", timeout=lock_timeout):
            image = store.read(image_id)
            if image.state is ImageState.TOMBSTONED:
                raise ImageTombstoned(
                    f"{image.key} is deleted (tombstoned) already; imagectl restore {image.key} brings it back, "
                    f"imagectl purge {image.key} frees it"
                )
            store.datastore.create_file(image.path(TOMBSTONE), store.clock())
    except FileNotFoundError:
        raise not_found(store.key(image_id)) from None
    store.changed(image_id)


def restore_image(store: ImageStore, image_id: str, *, lock_timeout: float | None = None) -> Image:
    """Takes the tombstone away, and makes a timestamp where that is lost, so that the image is valid.

    ImageIncomplete, and no change, when the disk is not whole, as after a purge that had begun to take it apart.
    """
    try:
        with store.lock(image_id, "restore", timeout=lock_timeout):
            image = store.read(image_id)
            if image.state is not ImageState.TOMBSTONED:
                raise ImageNotTombstoned(f"{image.key} is not deleted: there is nothing to restore")
            check_disk(store, image)
            touched_ns = image.touched_ns
            if touched_ns is None:
                if TIMESTAMP in store.datastore.names(image.directory):
                    raise ImageIncomplete(f"{image.key}: {TIMESTAMP} is not a plain file; remove it, and restore again")
                # First: without its tombstone, and before it had a timestamp, it would be incomplete for everybody.
                touched_ns = put_timestamp(store, image)
            store.datastore.remove_file(image.path(TOMBSTONE))
            store.datastore.sync_directory(image.directory)
    except FileNotFoundError:
        raise not_found(store.key(image_id)) from None
    store.changed(image_id)
    # Known without another look, which may fail: the change is made.
    problems = tuple(problem for problem in image.problems if problem != NO_TIMESTAMP)
    return replace(image, state=ImageState.VALID, tombstoned_ns=None, touched_ns=touched_ns, problems=problems)


def purge_image(
    store: ImageStore,
    image_id: str,
    *,
    force: bool = False,
    lock_timeout: float | None = None,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Frees a tombstoned image, with `force` also one that is not; returns the allocated bytes of its files.

    ImageInUse, and no change, when a VM uses it, or somebody has a file of it open; UseUnknown and the like when a VM
    cannot be read. What `check` raises ends the wait for the lock, and the look at the VMs.
    """
    try:
        with store.lock(image_id, "purge", timeout=lock_timeout, check=check):
            image = store.read(image_id)
            if image.state is not ImageState.TOMBSTONED and not force:
                raise ImageNotTombstoned(
                    f"{image.key} is not deleted; delete it first, with imagectl rm {image.key}, or free it at once: "
                    f"imagectl rm --force {image.key}"
                )
            require_no_vm(store, image.key, check)
            trash = discard_unused(store, image)
    except FileNotFoundError:
        raise not_found(store.key(image_id)) from None
    store.changed(image_id)
    free_discarded(store, image_id, trash)
    return image.allocated


def discard_unused(store: ImageStore, image: Image) -> str | None:
    """Takes the image's directory away, when nobody has it open; call under the image's lock.

    Readers are kept out from the check to the rename: none can begin in between. Returns what `free_discarded` frees.
    """
    paths = [image.path(file.name) for file in image.files]
    try:
        with store.datastore.exclude_users(paths, image.key.image_id):
            return store.layout.discard(store.datastore, image.key.image_id, store.new_token())
    except ImageInUse as error:
        raise ImageInUse(f"{image.key} is in use by {error.message}; end that use first") from error
    except ImagesError:
        store.changed(image.key.image_id)  # it may be gone all the same
        raise


def free_discarded(store: ImageStore, image_id: str, trash: str | None) -> None:
    """Frees what `discard_unused` took away; call without the lock.

    The image is gone already: what cannot be freed now, or is not because of a crash, stays in the trash.
    """
    if trash is None:
        return
    try:
        store.datastore.remove_tree(trash)
    except (ImagesError, OSError) as error:
        _log.warning("trash not freed image=%s trash=%s error=%s", store.key(image_id), trash, error)
