"""The images of one datastore: what every algorithm needs to read, lock and judge them."""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from sidecar.datastores.interface import Datastore
from sidecar.errors import (
    ImageAlreadyExists,
    ImageIncomplete,
    ImageNotFound,
    ImagesError,
    ImageTombstoned,
    LockTimeout,
    NoSpace,
)
from sidecar.images.admission import Admission
from sidecar.images.image import NO_TIMESTAMP, Image, ImageKey, ImageState, read_image, read_image_names
from sidecar.images.layouts.interface import Layout
from sidecar.images.names import check_image_id
from sidecar.locks.interface import HeldLock

_LOCK_TRIES = 8

_log = logging.getLogger(__name__)


class ImageStore:
    """One datastore with its layout. Safe for use by several threads.

    `clock` gives nanoseconds since the epoch, `new_token` a name that nobody else has. `lock_timeout`: seconds that a
    change waits for an image's lock. What changes images takes one of its own, which can only be shorter; None: this.
    """

    def __init__(
        self,
        datastore: Datastore,
        layout: Layout,
        *,
        reserve: int = 0,
        lock_timeout: float = 30.0,
        clock: Callable[[], int] = time.time_ns,
        new_token: Callable[[], str] = lambda: str(uuid.uuid4()),
        admission: Admission | None = None,
    ) -> None:
        self.datastore = datastore
        self.layout = layout
        self.reserve = reserve
        self.clock = clock
        self.new_token = new_token
        self.admission = admission or Admission(datastore.name)
        self.stores: Sequence[ImageStore] = (self,)
        # What looks at the VMs here were at when they were left, and are at still; each call on it is atomic.
        self.steps_left: dict[Future[Any], tuple[str, float]] = {}
        self._lock_timeout = lock_timeout
        self._on_change: Callable[[str], None] = lambda image_id: None
        self._on_use: Callable[[str, int], None] = lambda image_id, used_ns: None

    def share_host(self, stores: "Sequence[ImageStore]") -> None:
        """Sets `stores`, all of this host: a VM on any may use an image of this one. Once, before the store is used."""
        self.stores = stores

    def observe(self, on_change: Callable[[str], None], on_use: Callable[[str, int], None] | None = None) -> None:
        """Sets who is told the id of each image that this process changed; once, before the store is used.

        `on_use`: who is told, instead, of those whose use was noted and nothing else, with the time.
        """
        self._on_change = on_change
        self._on_use = on_use or (lambda image_id, used_ns: on_change(image_id))

    def changed(self, image_id: str) -> None:
        """Tells of it. The change is made: what is wrong with telling of it is logged, never raised."""
        self._tell(image_id, lambda: self._on_change(image_id))

    def used(self, image_id: str, used_ns: int) -> None:
        """Tells of a use, as `changed` does."""
        self._tell(image_id, lambda: self._on_use(image_id, used_ns))

    def _tell(self, image_id: str, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception:
            _log.exception("change not told image=%s", self.key(image_id))

    def key(self, image_id: str) -> ImageKey:
        return ImageKey(self.datastore.name, image_id)

    def read(self, image_id: str) -> Image:
        """The image as it is now; ImageNotFound, InvalidImageId."""
        check_image_id(image_id)
        return read_image(self.datastore, self.layout, image_id)

    def read_for_listing(self, image_id: str) -> Image:
        """As `read`, but without what is slow to read on such a datastore."""
        if self.layout.names_only:
            return read_image_names(self.datastore, self.layout, image_id)
        return read_image(self.datastore, self.layout, image_id)

    def read_valid(self, image_id: str) -> Image:
        """The image; ImageTombstoned or ImageIncomplete when it cannot be used."""
        image = self.read(image_id)
        require_valid(image)
        return image

    def require_absent(self, image_id: str) -> None:
        """A quick look, without the lock, that spares work; publish decides."""
        check_image_id(image_id)
        with contextlib.suppress(ImageNotFound):
            image = read_image_names(self.datastore, self.layout, image_id)
            if image.state is not ImageState.INCOMPLETE:
                raise already_exists(image)

    def require_space(self, needed: int) -> None:
        """NoSpace when so many bytes would leave less than the reserve."""
        free = self.datastore.capacity().free
        if needed > free - self.reserve:
            wanted = f"{needed} bytes are needed, and " if needed else ""
            raise NoSpace(
                f"{self.datastore.name} is full: {wanted}of {free} free bytes {self.reserve} are kept in reserve; "
                "purge images that are not needed, rm -r imports that failed (staged in a mount's .datastore.json), or "
                "make the datastore larger"
            )

    @contextmanager
    def lock(
        self,
        image_id: str,
        operation: str,
        *,
        timeout: float | None = None,
        new: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Holds the image's lock; LockTimeout names its holder.

        DatastoreUnavailable when the datastore is hidden: every change of an image begins here.

        Waits for at most `timeout` seconds, and no longer than the store was told to. What `check` raises ends the
        waiting. With `new`, also when nothing of the image is there yet; else a missing image may be a
        FileNotFoundError.
        """
        check_image_id(image_id)
        # What is changed where nobody sees it would be lost, or come back, with what hides it.
        self.datastore.require_in_place()
        try:
            with self._acquired(image_id, operation, timeout, new, check):
                self.datastore.require_in_place()  # the wait may have been long
                yield
        finally:
            self._tidy(image_id)

    def _acquired(
        self, image_id: str, operation: str, timeout: float | None, new: bool, check: Callable[[], None]
    ) -> HeldLock:
        path = self.layout.image_lock(image_id)
        left = self._lock_timeout if timeout is None else min(timeout, self._lock_timeout)
        until = time.monotonic() + left
        for _ in range(_LOCK_TRIES):
            if new:
                self.layout.make_lockable(self.datastore, image_id)
            try:
                return self._take(path, f"{operation} {image_id}", left, check)
            except FileNotFoundError:
                # Whoever just removed the image may take away the directory that was made for the lock.
                if not new:
                    raise
                left = max(until - time.monotonic(), 0.0)
        raise LockTimeout(f"{self.key(image_id)}: its directory is being removed again and again; try again")

    def _tidy(self, image_id: str) -> None:
        """After each lock: of two who lock what is not there any more, the first finds the other one's lock in it."""
        try:
            self.datastore.require_in_place()
            self.layout.tidy(self.datastore, image_id)
        except ImagesError as error:
            _log.warning("directory not tidied image=%s error=%s", self.key(image_id), error)

    def _take(self, path: str, operation: str, timeout: float, check: Callable[[], None]) -> HeldLock:
        with self.admission.stepping_aside() as step:

            def look() -> None:
                check()
                step()

            return self.datastore.lock(path, operation, timeout, look)


def require_valid(image: Image) -> None:
    if image.state is ImageState.TOMBSTONED:
        raise ImageTombstoned(f"{image.key} is deleted (tombstoned); restore it first: imagectl restore {image.key}")
    if image.state is ImageState.INCOMPLETE:
        mendable = image.problems == (NO_TIMESTAMP,)
        what_to_do = f"imagectl validate --repair {image.key} gives it a new one" if mendable else remedy(image)
        raise ImageIncomplete(f"{image.key} is incomplete: {'; '.join(image.problems)}; {what_to_do}")
    if image.problems:
        raise ImageIncomplete(f"{image.key} is not whole: {'; '.join(image.problems)}")


def remedy(image: Image) -> str:
    """What can be done about an image whose disk is not whole: nothing here mends that."""
    look = f"look at what is left of it, in {image.directory} on the datastore"
    if image.state is ImageState.TOMBSTONED:
        return f"{look}, or purge it: imagectl purge {image.key}"
    return f"{look}, or free it: imagectl rm --force {image.key}"


def already_exists(image: Image) -> ImageAlreadyExists:
    if image.state is ImageState.TOMBSTONED:
        return ImageAlreadyExists(
            f"{image.key} exists, deleted (tombstoned) but not purged; restore it, or purge it first: "
            f"imagectl purge {image.key}"
        )
    return ImageAlreadyExists(f"{image.key} already exists; choose another name, or delete and purge it first")
