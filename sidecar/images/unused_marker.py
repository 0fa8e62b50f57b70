"""The mark of an unused image, and the two files that say when it was last used; call all of it under its lock."""

import contextlib

from sidecar.errors import ImageIncomplete
from sidecar.images.checking import restore_timestamp
from sidecar.images.image import Image, ImageState
from sidecar.images.names import TIMESTAMP, TIMESTAMP_RENAMED, UNUSED_MARKER, descriptor_name
from sidecar.images.store import ImageStore


def write_marker(store: ImageStore, image: Image, seconds: int) -> None:
    store.datastore.write_file(image.path(UNUSED_MARKER), str(seconds).encode())


def remove_marker(store: ImageStore, image: Image) -> bool:
    """Whether there was one."""
    try:
        store.datastore.remove_file(image.path(UNUSED_MARKER))
    except FileNotFoundError:
        return False
    store.datastore.sync_directory(image.directory)
    return True


def renamed_ns(store: ImageStore, image: Image) -> int | None:
    """The last use by the timestamp file that a sweep has renamed; None when there is no such file."""
    try:
        return store.datastore.entry(image.path(TIMESTAMP_RENAMED)).modified_ns
    except FileNotFoundError:
        return None


def rename_timestamp(store: ImageStore, image: Image) -> None:
    """From here on, to who does not ask for the lock, the image is not there to be used."""
    # One that an earlier sweep left beside a newer timestamp file would be in the way.
    with contextlib.suppress(FileNotFoundError):
        store.datastore.remove_file(image.path(TIMESTAMP_RENAMED))
    store.datastore.rename(image.path(TIMESTAMP), image.path(TIMESTAMP_RENAMED))


def put_timestamp_back(store: ImageStore, image: Image) -> None:
    """The other way; when somebody has written a new timestamp file meanwhile, that one counts."""
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        store.datastore.rename(image.path(TIMESTAMP_RENAMED), image.path(TIMESTAMP))
    store.datastore.sync_directory(image.directory)


def is_left_by_sweep(names: set[str], image_id: str) -> bool:
    """Whether a sweep died while it decided about the image: its disk is there, its timestamp file is renamed."""
    return TIMESTAMP_RENAMED in names and TIMESTAMP not in names and descriptor_name(image_id) in names


def recover_timestamp(store: ImageStore, image: Image) -> bool:
    """Puts the timestamp file of a whole image back that a sweep died over; whether it did."""
    if image.state is not ImageState.INCOMPLETE or renamed_ns(store, image) is None:
        return False
    try:
        return restore_timestamp(store, image)
    except ImageIncomplete:  # the sweep had begun to take it apart: the next one, or a purge, goes on
        return False
