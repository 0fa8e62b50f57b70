"""Publish: the atomic step that turns a staging directory into an image."""

from collections.abc import Callable

from sidecar.errors import ImageIncomplete, ImageNotFound
from sidecar.images.checking import restore_timestamp
from sidecar.images.deletion import discard_unused, free_discarded
from sidecar.images.image import Image, ImageState
from sidecar.images.names import TIMESTAMP
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore, already_exists


def publish(staging: StagingDirectory, check: Callable[[], None] = lambda: None) -> Image:
    """Makes a staged image durable and publishes it; afterwards the staging directory is gone, also on an error.

    Until the last moment, what `check` raises ends it.

    ImageAlreadyExists when somebody was faster, LockTimeout, or what the datastore says. A crash at any point
    leaves either no image or the whole image.
    """
    store, image_id = staging.store, staging.image_id
    trash: str | None = None
    try:
        with staging:
            store.datastore.create_file(staging.path(TIMESTAMP), store.clock())
            staging.sync()
            with store.lock(image_id, "publish", new=True, check=check):
                trash = _clear_the_way(store, image_id)
                check()
                try:
                    store.layout.publish(store.datastore, staging.place, image_id)
                except FileExistsError:
                    # Without the lock, as only another program would do it.
                    raise already_exists(store.read(image_id)) from None
            staging.published()
        store.changed(image_id)
    finally:
        # After an error too: the wreck that was in the way is gone, and its bytes are nobody's.
        if trash is not None:
            free_discarded(store, image_id, trash)
    return store.read(image_id)


def _clear_the_way(store: ImageStore, image_id: str) -> str | None:
    """Checks and repairs what is at the destination; a wreck goes to the trash, an image stays and is an error."""
    try:
        image = store.read(image_id)
    except ImageNotFound:
        return _clear_remains(store, image_id)
    if image.state is not ImageState.INCOMPLETE:
        raise already_exists(image)
    try:
        restore_timestamp(store, image)
    except ImageIncomplete:
        return discard_unused(store, image)
    store.changed(image_id)
    raise already_exists(store.read(image_id))


def _clear_remains(store: ImageStore, image_id: str) -> str | None:
    """A directory without any file of an image: where directories are renamed, it would be in the way."""
    if store.layout.names_only:
        return None
    try:
        store.datastore.entry(store.layout.image_directory(image_id))
    except FileNotFoundError:
        return None
    return store.layout.discard(store.datastore, image_id, store.new_token())
