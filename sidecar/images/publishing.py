"""Publish: the atomic step that turns a staging directory into an image."""

import logging
from collections.abc import Callable

from sidecar.datastores.interface import EntryKind
from sidecar.errors import ImageIncomplete, ImageNotFound, InvalidRequest
from sidecar.images.checking import restore_timestamp
from sidecar.images.deletion import discard_unused, free_discarded
from sidecar.images.image import Image, ImageState
from sidecar.images.names import is_lock_or_staging
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore, already_exists
from sidecar.images.usage import require_no_vm

_log = logging.getLogger(__name__)


def publish(
    staging: StagingDirectory, check: Callable[[], None] = lambda: None, *, lock_timeout: float | None = None
) -> Image:
    """Makes a staged image durable and publishes it. Once it is published, nothing is an error any more.

    Until the last moment, what `check` raises ends it. After an error before the files are moved the staging directory
    is there, and can be published again unless it has `damage`; after one while they are moved it is gone.

    ImageAlreadyExists when somebody was faster, LockTimeout, or what the datastore says. A crash at any point
    leaves either no image or the whole image.
    """
    store, image_id = staging.store, staging.image_id
    trash: str | None = None
    try:
        staging.complete()
        with store.lock(image_id, "publish", timeout=lock_timeout, new=True, check=check):
            trash = _clear_the_way(store, image_id, check)
            check()
            # Not before the syncs and the wait for the lock, which may take minutes: a scan that began meanwhile would
            # take the image for one that nobody has used since.
            now = store.clock()
            staging.note_use(now)
            staging.begin_publishing()
            try:
                store.layout.publish(store.datastore, staging.place, image_id)
            except FileExistsError:
                # Without the lock, as only another program would do it.
                raise already_exists(store.read(image_id)) from None
            image = _read_published(store, image_id, now)
    except BaseException:
        staging.not_published()
        raise
    finally:
        # After an error too: the wreck that was in the way is gone, and its bytes are nobody's.
        if trash is not None:
            free_discarded(store, image_id, trash)
    staging.published()
    store.changed(image_id)
    return image


def _read_published(store: ImageStore, image_id: str, now: int) -> Image:
    """The image that was just published; without its details when they cannot be read."""
    try:
        return store.read(image_id)
    except Exception as error:
        key = store.key(image_id)
        _log.warning("published image unreadable image=%s error=%s", key, error)
        directory = store.layout.image_directory(image_id)
        return Image(key, directory, ImageState.VALID, details_known=False, touched_ns=now)


def _clear_the_way(store: ImageStore, image_id: str, check: Callable[[], None]) -> str | None:
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
        # Who has a disk on it may mend it; on another image's bytes it would be garbage.
        require_no_vm(store, image.key, check)
        return discard_unused(store, image)
    store.changed(image_id)
    raise already_exists(store.read(image_id))


def _clear_remains(store: ImageStore, image_id: str) -> str | None:
    """A directory without any file of an image would be in the way: where directories are renamed, in any case; else
    with what is left of an image that somebody died over while he took it away."""
    directory = store.layout.image_directory(image_id)
    try:
        place = store.datastore.entry(directory)
        if place.kind is not EntryKind.DIRECTORY:
            raise InvalidRequest(f"{store.key(image_id)}: in its place is something else than a directory; look at it")
        if store.layout.names_only and all(map(is_lock_or_staging, store.datastore.names(directory))):
            return None
    except FileNotFoundError:
        return None
    return store.layout.discard(store.datastore, image_id, store.new_token())
