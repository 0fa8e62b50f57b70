"""Staging directories: images in the making, private to their maker and locked for as long as they live."""

import contextlib
import enum
import logging
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from sidecar.datastores.interface import ReadableFile, WritableFile
from sidecar.errors import DatastoreDenied, DatastoreUnavailable, ImagesError, NoSpace, StagingLost, StagingNotFound
from sidecar.images.names import TIMESTAMP
from sidecar.images.store import ImageStore
from sidecar.locks.interface import HeldLock

_TRIES = 8
# What the disk may answer to an fsync; other errors are about what is there, and can be mended.
REFUSALS = (DatastoreDenied, DatastoreUnavailable, NoSpace)

_log = logging.getLogger(__name__)


class _State(enum.Enum):
    HELD = enum.auto()
    PUBLISHING = enum.auto()  # its files are being moved into the image's place
    REMOVING = enum.auto()
    LEFT = enum.auto()  # removed in part, or not at all: good for nothing but another try
    ENDED = enum.auto()


class StagingDirectory:
    """A staging directory and its lock. As a context manager it is gone afterwards, unless it was published.

    The lock says that somebody is making it, however long that takes; when this process dies it goes with it.
    Either whoever publishes ends it, from `begin_publishing` on, or who aborts it before that: never both. When it
    cannot be removed, the lock stays with it for another `abort`, until `leave` gives it up.
    """

    def __init__(self, store: ImageStore, image_id: str, operation: str) -> None:
        """Makes the directory, and holds its lock from before anybody could find it without."""
        self.store = store
        self.image_id = image_id
        self.token = store.new_token()
        self.place = store.layout.staging_place(image_id, self.token)
        # Why it can never be published: the disk refused some of what was written, and will not say so again, or a
        # server whose copy failed may go on with it.
        self.damage: ImagesError | None = None
        self._lock: HeldLock | None = None
        self._began_publishing = False
        self._state = _State.HELD
        self._changing = threading.Lock()  # guards the state
        self._naming = threading.Lock()  # a request may be repeated while its first try still runs
        store.datastore.require_in_place()
        for _ in range(_TRIES):
            try:
                self._make(operation)
                return
            except FileNotFoundError:
                # A parent that is not there yet, or (layout vsan) that whoever just removed the image took away.
                store.layout.prepare(store.datastore)
        raise DatastoreUnavailable(
            f"{store.key(image_id)}: the directories that a staging directory needs are being removed again and again"
        )

    def _make(self, operation: str) -> None:
        """After an error there is neither the directory nor the lock."""
        store = self.store
        try:
            if self.place.locked_inside:
                store.datastore.make_directory(self.place.directory, parents=True)
            self._lock = store.datastore.lock(self.place.lock, f"{operation} {self.image_id}", timeout=0)
            if not self.place.locked_inside:
                store.datastore.make_directory(self.place.directory, parents=True)
        except BaseException:
            if self._lock:
                with self._lock:
                    store.datastore.remove_tree(self.place.directory)
                self._lock = None
                self._tidy()
            else:
                store.datastore.remove_tree(self.place.directory)
                self._tidy()
            raise

    @property
    def directory(self) -> str:
        """Relative to the datastore's root."""
        return self.place.directory

    @property
    def held(self) -> bool:
        """It was neither published nor aborted, nor is it being published."""
        return self._state is _State.HELD

    def path(self, name: str) -> str:
        return f"{self.place.directory}/{name}"

    def open_writable(self, name: str) -> WritableFile:
        return self.store.datastore.open_writable(self.path(name))

    def open_readable(self, name: str) -> ReadableFile:
        return self.store.datastore.open_readable(self.path(name))

    def rename_file(self, name: str, new_name: str) -> None:
        """In place of a file that has the new name; FileNotFoundError. Nobody sees the directory in between."""
        datastore, path, new_path = self.store.datastore, self.path(name), self.path(new_name)
        with self._naming:
            if name == new_name:
                datastore.entry(path)
                return
            try:
                datastore.rename(path, new_path)
            except FileExistsError:
                datastore.entry(path)  # or there would be neither of them
                datastore.remove_file(new_path)
                datastore.rename(path, new_path)

    def remove_file(self, name: str) -> None:
        """FileNotFoundError when there is none of that name."""
        with self._naming:
            self.store.datastore.remove_file(self.path(name))

    def require_space(self) -> None:
        """NoSpace when what is staged elsewhere, and is to be sent yet, would leave less than the reserve."""
        if unsent := self.store.datastore.unsent(self.directory):
            self.store.require_space(unsent)

    def complete(self) -> None:
        """Adds the timestamp file, and makes every file and then the directory durable.

        After an error of that, nothing makes it durable any more: see `damage`.
        """
        datastore = self.store.datastore
        self.open_writable(TIMESTAMP).close()
        for entry in datastore.entries(self.directory):
            with self._syncing():
                datastore.sync_file(self.path(entry.name))
        with self._syncing():
            datastore.sync_directory(self.directory)

    def note_use(self, now_ns: int) -> None:
        """Sets the time of the timestamp file, durably; the error is as that of `complete`."""
        with self._syncing(), self.store.datastore.set_modified(self.path(TIMESTAMP), now_ns):
            pass

    def sync_written(self, file: WritableFile) -> None:
        """Makes what was written to one of its files durable; the error is as that of `complete`."""
        with self._syncing():
            file.sync()

    @contextlib.contextmanager
    def _syncing(self) -> Iterator[None]:
        """For an fsync. Linux tells of a write that failed once: the next fsync succeeds, and the bytes are not there.

        That the open before it failed is not told apart: rather dropped than published with a hole in it.
        """
        try:
            yield
        except REFUSALS as error:
            self.damage = self.damage or error
            raise

    def abort(self) -> None:
        """Removes the directory; no error when it was published or aborted before, or is being published or aborted.

        After an error it is still there in whole or in part, held, and nobody can publish it: abort it again.
        """
        if self._turn(_State.HELD, _State.REMOVING) or self._turn(_State.LEFT, _State.REMOVING):
            self._remove()

    def leave(self) -> None:
        """Lets go of what could not be removed, for others to remove; nothing else is left then."""
        if self._turn(_State.LEFT, _State.ENDED):
            assert self._lock
            self._lock.release()

    def begin_publishing(self) -> None:
        """From here on no abort touches the directory; StagingNotFound when there was one before."""
        if self.damage is not None:
            raise StagingLost(f"the staging directory {self.directory} cannot be published: {self.damage.message}")
        if not self._turn(_State.HELD, _State.PUBLISHING):
            raise StagingNotFound(f"the staging directory {self.directory} was dropped before it was published")
        self._began_publishing = True

    def not_published(self) -> None:
        """Removes the directory after `begin_publishing`: some of its files may be in the image's place.

        After an error: as after that of `abort`.
        """
        if self._turn(_State.PUBLISHING, _State.REMOVING):
            self._remove()

    def published(self) -> None:
        """Lets go of what is left after the directory became the image."""
        if self._turn(_State.PUBLISHING, _State.ENDED):
            assert self._lock
            self._lock.release()
            self._tidy()

    def _turn(self, before: _State, after: _State) -> bool:
        with self._changing:
            if self._state is not before:
                return False
            self._state = after
            return True

    def _remove(self) -> None:
        assert self._lock
        store, left = self.store, self.directory
        try:
            if self._began_publishing:
                left = store.layout.withdraw(store.datastore, self.place, store.new_token()) or left
            store.datastore.remove_tree(left)
        except BaseException:
            self._turn(_State.REMOVING, _State.LEFT)
            raise
        self._turn(_State.REMOVING, _State.ENDED)
        self._lock.release()
        self._tidy()

    def _tidy(self) -> None:
        # Layout vsan: the emptied staging directory, and the image's own when nothing was published into it.
        try:
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                self.store.datastore.remove_directory(self.directory)
            self.store.layout.tidy(self.store.datastore, self.image_id)
        except ImagesError as error:
            # Published or not was decided before: an empty directory that stays does not change the answer.
            _log.warning("staging not tidied directory=%s error=%s", self.directory, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.abort()
        finally:
            self.leave()
