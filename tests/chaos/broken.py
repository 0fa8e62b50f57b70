"""A sidecar one of whose rules is broken on purpose, to show that the checker sees it.

    python -m tests.chaos.broken RULE serve …

Everything after RULE is for image-sidecar.
"""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable

from sidecar.cli import main
from sidecar.datastores.interface import Datastore
from sidecar.errors import ImageNotFound, ImageNotTombstoned
from sidecar.images import deletion, publishing
from sidecar.images.image import ImageState, not_found
from sidecar.images.layouts.interface import StagingPlace
from sidecar.images.layouts.renaming import RenamingLayout
from sidecar.images.store import ImageStore
from sidecar.services import image_service

PUBLISHES_BEFORE_A_DEATH = 12
FIRST_EXTENT = ("-flat.vmdk", "-f001.vmdk")
LONG_ENOUGH = 0.2  # seconds, for somebody else to come in between


def publish_file_by_file() -> None:
    """Instead of one rename: the timestamp, which makes the image valid, goes first; and once there is a kill."""
    numbers = itertools.count(1)

    def publish(self: RenamingLayout, datastore: Datastore, staging: StagingPlace, image_id: str) -> None:
        destination = self.image_directory(image_id)
        datastore.make_directory(destination)
        names = datastore.names(staging.directory)
        for name in sorted(names, key=lambda name: name.endswith(FIRST_EXTENT)):
            if name.endswith(FIRST_EXTENT) and next(numbers) == PUBLISHES_BEFORE_A_DEATH:
                os.kill(os.getpid(), signal.SIGKILL)
            datastore.rename(f"{staging.directory}/{name}", f"{destination}/{name}")

    setattr(RenamingLayout, "publish", publish)  # noqa: B010 - mypy: a method is not assigned to


def purge_without_lock() -> None:
    """Looks, and takes away some time later what it has seen."""

    def purge_image(
        store: ImageStore, image_id: str, *, force: bool = False, lock_timeout: float | None = None, **others: object
    ) -> int:
        image = store.read(image_id)
        if image.state is not ImageState.TOMBSTONED and not force:
            raise ImageNotTombstoned(f"{image.key} is not deleted")
        time.sleep(LONG_ENOUGH)
        try:
            trash = deletion.discard_unused(store, image)
        except FileNotFoundError:
            raise not_found(store.key(image_id)) from None
        store.changed(image_id)
        deletion.free_discarded(store, image_id, trash)
        return image.allocated

    setattr(image_service, "purge_image", purge_image)  # noqa: B010


def publish_over_others() -> None:
    """Does not look whether somebody was faster, and takes the image away that is in the way."""

    def clear_the_way(store: ImageStore, image_id: str, check: Callable[[], None]) -> str | None:
        try:
            return deletion.discard_unused(store, store.read(image_id))
        except ImageNotFound:
            return None

    setattr(publishing, "_clear_the_way", clear_the_way)  # noqa: B010


RULES: dict[str, Callable[[], None]] = {
    "publish-file-by-file": publish_file_by_file,
    "purge-without-lock": purge_without_lock,
    "publish-over-others": publish_over_others,
}

if __name__ == "__main__":
    RULES[sys.argv.pop(1)]()
    main()
