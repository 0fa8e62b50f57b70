"""Staging directories: images in the making, private to their maker and locked for as long as they live."""

import contextlib
from types import TracebackType
from typing import Self

from sidecar.datastores.interface import ReadableFile, WritableFile
from sidecar.images.store import ImageStore
from sidecar.locks.interface import HeldLock


class StagingDirectory:
    """A staging directory and its lock. As a context manager it is gone afterwards, unless it was published.

    The lock keeps the reaper away however long the making takes; when this process dies it goes with it, and the
    reaper finds the directory by its age.
    """

    def __init__(self, store: ImageStore, image_id: str, operation: str) -> None:
        """Makes the directory, and holds its lock from before anybody could find it without."""
        self.store = store
        self.image_id = image_id
        self.token = store.new_token()
        self.place = store.layout.staging_place(image_id, self.token)
        self._lock: HeldLock | None = None
        lock_inside = self.place.lock.startswith(f"{self.place.directory}/")
        try:
            if lock_inside:
                store.datastore.make_directory(self.place.directory, parents=True)
            self._lock = store.datastore.lock(self.place.lock, f"{operation} {image_id}", timeout=0)
            if not lock_inside:
                store.datastore.make_directory(self.place.directory, parents=True)
        except BaseException:
            if self._lock:
                self.abort()
            else:
                store.datastore.remove_tree(self.place.directory)
            raise

    @property
    def directory(self) -> str:
        """Relative to the datastore's root."""
        return self.place.directory

    def path(self, name: str) -> str:
        return f"{self.place.directory}/{name}"

    def open_writable(self, name: str) -> WritableFile:
        return self.store.datastore.open_writable(self.path(name))

    def open_readable(self, name: str) -> ReadableFile:
        return self.store.datastore.open_readable(self.path(name))

    def sync(self) -> None:
        """Makes every file and then the directory durable."""
        datastore = self.store.datastore
        for entry in datastore.entries(self.directory):
            datastore.sync_file(self.path(entry.name))
        datastore.sync_directory(self.directory)

    def abort(self) -> None:
        """Removes the directory; no error when it was published or aborted before."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        with lock:
            self.store.datastore.remove_tree(self.directory)
        self._tidy()

    def published(self) -> None:
        """Lets go of what is left after the directory became the image."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
        self._tidy()

    def _tidy(self) -> None:
        # Layout vsan: the emptied staging directory, and the image's own when nothing was published into it.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            self.store.datastore.remove_directory(self.directory)
        self.store.layout.tidy(self.store.datastore, self.image_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()
