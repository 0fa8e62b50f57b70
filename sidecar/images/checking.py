"""Is an image whole? And what a touch, a repair and a validation make of it."""

from contextlib import ExitStack

from sidecar.errors import ImageIncomplete, InvalidDisk
from sidecar.images import vmdk
from sidecar.images.image import NO_DESCRIPTOR, NO_TIMESTAMP, Image, ImageState, not_found, reader_of
from sidecar.images.metadata import check_metadata
from sidecar.images.names import TIMESTAMP, TIMESTAMP_RENAMED, descriptor_name
from sidecar.images.store import ImageStore, remedy, require_valid


def check_whole(store: ImageStore, image: Image) -> None:
    """As `check_disk`, and that there is nothing in the image that does not belong there."""
    check_disk(store, image)
    if problems := [problem for problem in image.problems if problem != NO_TIMESTAMP]:
        raise ImageIncomplete(f"{image.key} is not as it should be: {'; '.join(problems)}")


def check_disk(store: ImageStore, image: Image) -> None:
    """Reads the descriptor, every extent's size and the tables of sparse ones; ImageIncomplete says what is wrong."""
    reader = reader_of(store.datastore, image.directory, {file.name: file.size for file in image.files})
    try:
        vmdk.check_disk(descriptor_name(image.key.image_id), reader)
    except FileNotFoundError:
        raise ImageIncomplete(f"{image.key} is not whole: {NO_DESCRIPTOR}; {remedy(image)}") from None
    except InvalidDisk as error:
        raise ImageIncomplete(f"{image.key} is not whole: {error.message}; {remedy(image)}") from error


def validate_image(
    store: ImageStore, image_id: str, *, repair: bool, lock_timeout: float | None = None
) -> tuple[Image, bool]:
    """The image, when it is valid and whole, and whether that took a repair.

    ImageTombstoned, ImageIncomplete and InvalidMetadata say what it is not.
    """
    image = store.read(image_id)
    repaired = False
    if repair and image.state is ImageState.INCOMPLETE:
        try:
            with store.lock(image_id, "repair", timeout=lock_timeout):
                image = store.read(image_id)
                repaired = restore_timestamp(store, image)
        except FileNotFoundError:
            raise not_found(store.key(image_id)) from None
        store.changed(image_id)
        image = store.read(image_id)
    require_valid(image)
    check_whole(store, image)
    for file in image.files:
        try:
            check_metadata(store.datastore, image, file)
        except FileNotFoundError:
            require_valid(store.read(image_id))  # removed just now: the file, or the image, which is an error then
    return image, repaired


def restore_timestamp(store: ImageStore, image: Image) -> bool:
    """Gives a whole image that lost its timestamp file a new one; call under the image's lock.

    False when it has one. ImageIncomplete when the image is not whole: then nothing is changed.
    """
    if image.state is not ImageState.INCOMPLETE:
        return False
    check_whole(store, image)
    if TIMESTAMP in store.datastore.names(image.directory):
        return False
    put_timestamp(store, image)
    return True


def put_timestamp(store: ImageStore, image: Image) -> int:
    """Makes, durably, the timestamp file of an image that has none; returns its time. Call under the image's lock."""
    timestamp = image.path(TIMESTAMP)
    if TIMESTAMP_RENAMED in store.datastore.names(image.directory):
        # A sweep died while it decided; the last use is still known.
        store.datastore.rename(image.path(TIMESTAMP_RENAMED), timestamp)
        store.datastore.sync_directory(image.directory)
    else:
        store.datastore.create_file(timestamp, store.clock())
    return store.datastore.entry(timestamp).modified_ns


def touch_image(store: ImageStore, image_id: str, *, lock_timeout: float | None = None) -> int:
    """Notes that the image is in use now; returns the time, in nanoseconds since the epoch.

    Under the lock, so that a sweep that is deciding about the image is over, and what it decided is seen. It is made
    durable after that: the next holder sees it, and need not wait for the disk.
    """
    try:
        with ExitStack() as durable:
            with store.lock(image_id, "touch", timeout=lock_timeout):
                image = store.read_valid(image_id)
                used_ns = durable.enter_context(store.datastore.set_modified(image.path(TIMESTAMP), store.clock()))
            store.used(image_id, used_ns)
    except FileNotFoundError:
        raise not_found(store.key(image_id)) from None
    return used_ns
