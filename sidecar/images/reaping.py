"""Reap: free what processes left that died, and the trash.

A staging directory is somebody's for as long as its lock is held, however long that takes: only one whose lock can be
had is abandoned. The grace time is for makers that hold no lock, as the origin's did: nothing in there may have been
written for so long. That of the inode's change counts, too: who copies there may keep an old time of the last write.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sidecar.datastores.interface import Entry, EntryKind
from sidecar.errors import ImageInUse, ImageNotFound, ImagesError, InvalidRequest, LockTimeout
from sidecar.images.deletion import discard_unused, free_discarded
from sidecar.images.image import Image, ImageState
from sidecar.images.layouts.interface import StagingPlace
from sidecar.images.listing import image_ids, names_if_directory
from sidecar.images.names import LOCK_SUFFIX, TIMESTAMP_RENAMED, UNUSED_MARKER, is_temporary
from sidecar.images.store import ImageStore
from sidecar.images.unused_marker import is_left_by_sweep, recover_timestamp

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Reaped:
    """What was freed, in numbers, paths and bytes; what could not be, and why."""

    staging: list[str] = field(default_factory=list)
    trash: list[str] = field(default_factory=list)
    freed: int = 0
    recovered: list[str] = field(default_factory=list)  # images whose timestamp file was put back
    kept: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.staging or self.trash or self.recovered)


def reap(store: ImageStore, grace: float, check: Callable[[], None] = lambda: None) -> Reaped:
    """Frees the trash, and what is older than `grace` seconds and nobody's.

    What cannot be freed is told and no error, unless the datastore cannot be used at all. `check` is called between
    any two things: what it raises ends the reaping.
    """
    reaper = _Reaper(store, store.clock() - int(grace * 1e9), check)
    store.datastore.check()
    store.layout.prepare(store.datastore)  # a new datastore has none of its directories yet
    reaper.free_trash()
    reaper.free_staging()
    reaper.free_locks()
    reaper.mend_images()
    if reaper.reaped:
        _log.info(
            "reaped datastore=%s staging=%s trash=%s recovered=%s freed=%s",
            store.datastore.name,
            len(reaper.reaped.staging),
            len(reaper.reaped.trash),
            ",".join(reaper.reaped.recovered),
            reaper.reaped.freed,
        )
    return reaper.reaped


class _Reaper:
    """One reaping. `before_ns`: what was changed since then stays, whosever it is."""

    def __init__(self, store: ImageStore, before_ns: int, check: Callable[[], None]) -> None:
        self._store = store
        self._datastore = store.datastore
        self._before_ns = before_ns
        self._check = check
        self.reaped = Reaped()

    def free_trash(self) -> None:
        for path in self._store.layout.trash(self._datastore):
            with self._going_on(path):
                self._free(path)
                self.reaped.trash.append(path)

    def _free(self, path: str) -> None:
        """Not what something else is mounted over by now: what is freed there would come back, or be lost, with it."""
        self._datastore.require_in_place()
        self.reaped.freed += self._datastore.remove_tree(path)

    def free_staging(self) -> None:
        for place in self._store.layout.staging_places(self._datastore):
            with self._going_on(place.directory):
                self._free_staging_place(place)

    def _free_staging_place(self, place: StagingPlace) -> None:
        kind, changed_ns = self._look(place, held=False)
        if kind not in (EntryKind.DIRECTORY, None):
            return  # somebody's file or link: no staging directory
        if changed_ns > self._before_ns:
            self.reaped.kept.append(f"{place.directory}: it was written to within the grace time")
            return
        with self._datastore.lock(place.lock, f"reap {place.directory}", timeout=0):
            # Its maker may have gone on, and ended, since it was looked at.
            if self._look(place, held=True)[1] > self._before_ns:
                return
            self._free_staged(place)
        if place.locked_inside:
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                self._datastore.remove_directory(place.directory)
        if place.image_id:
            self._store.layout.tidy(self._datastore, place.image_id)
        if kind:
            self.reaped.staging.append(place.directory)

    def _free_staged(self, place: StagingPlace) -> None:
        """All of it, but for its lock where that is inside: who came for it after it was unlinked would make another
        one in the directory, and believe that the directory is his. Elsewhere, who has the lock next makes his own."""
        if not place.locked_inside:
            self._free(place.directory)
            return
        for entry in self._datastore.entries(place.directory):
            path = f"{place.directory}/{entry.name}"
            if path != place.lock:
                self._free(path)

    def _look(self, place: StagingPlace, *, held: bool) -> tuple[EntryKind | None, int]:
        """What the staging directory is, and when it was last written to; of its lock, where only that is left.

        `held`: its lock is ours now, which says nothing of its maker. FileNotFoundError when neither is there.
        """
        try:
            directory = self._datastore.entry(place.directory)
        except FileNotFoundError:
            return None, self._datastore.entry(place.lock).modified_ns
        if directory.kind is not EntryKind.DIRECTORY:
            return directory.kind, directory.modified_ns
        entries = self._datastore.entries(place.directory)
        times = [_written_ns(entry) for entry in entries if not entry.name.endswith(LOCK_SUFFIX)]
        if not (held and place.image_id):  # layout vsan: the lock came into the directory, and changed its time
            times.append(_written_ns(directory))
        return EntryKind.DIRECTORY, max(times, default=0)

    def mend_images(self) -> None:
        # Where one directory at a time is slow: what looks whole in a listing of all is not looked at again.
        tree = self._datastore.tree() or {}
        for image_id in image_ids(self._store):
            directory = self._store.layout.image_directory(image_id)
            listed = tree.get(directory)
            if listed is not None and self._looks_whole(image_id, set(listed.names())):
                continue
            with self._going_on(str(self._store.key(image_id))):
                names = set(names_if_directory(self._datastore, directory))
                temporary = [name for name in names if is_temporary(name)]
                if is_left_by_sweep(names, image_id):
                    self._recover(image_id)
                if temporary:
                    self._remove_temporary(image_id, directory, temporary)
                if _is_remains(names):
                    self._remove_remains(image_id, directory)
                    continue
                for lock in self._locks_inside(image_id, names):
                    with self._going_on(lock):
                        self._free_lock(lock)

    def _looks_whole(self, image_id: str, names: set[str]) -> bool:
        """Whether there is nothing to mend."""
        return not (
            is_left_by_sweep(names, image_id)
            or any(is_temporary(name) for name in names)
            or _is_remains(names)
            or self._locks_inside(image_id, names)
        )

    def _locks_inside(self, image_id: str, names: set[str]) -> list[str]:
        """Where the image's lock is in the image's directory: that, and what became of others of it."""
        directory = self._store.layout.image_directory(image_id)
        if not self._store.layout.image_lock(image_id).startswith(f"{directory}/"):
            return []
        return [f"{directory}/{name}" for name in names if name.endswith(LOCK_SUFFIX)]

    def _recover(self, image_id: str) -> None:
        with self._store.lock(image_id, "recover", timeout=0):
            recovered = recover_timestamp(self._store, self._store.read(image_id))
        if recovered:
            self.reaped.recovered.append(image_id)
            self._store.changed(image_id)

    def _remove_temporary(self, image_id: str, directory: str, names: list[str]) -> None:
        with self._store.lock(image_id, "reap", timeout=0):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    if self._datastore.entry(f"{directory}/{name}").modified_ns <= self._before_ns:
                        self._datastore.remove_file(f"{directory}/{name}")

    def free_locks(self) -> None:
        """Lock files beside the images, which who died with them left: they do no harm, and there is no end of them."""
        for collection in self._store.layout.collections(self._datastore):
            for name in names_if_directory(self._datastore, collection):
                of_image = self._store.layout.image_id(collection, name.removesuffix(LOCK_SUFFIX)) is not None
                if name.endswith(LOCK_SUFFIX) and of_image:
                    path = f"{collection}/{name}".lstrip("/")
                    with self._going_on(path):
                        self._free_lock(path)

    def _free_lock(self, path: str) -> None:
        entry = self._datastore.entry(path)
        if entry.kind is not EntryKind.OTHER and entry.modified_ns <= self._before_ns:
            self._datastore.free_lock(path)

    def _remove_remains(self, image_id: str, directory: str) -> None:
        """In layout vsan, of an image that a crash left half removed; else of a directory that somebody made."""
        if _written_ns(self._datastore.entry(directory)) > self._before_ns:
            return
        for lock in self._locks_inside(image_id, set(names_if_directory(self._datastore, directory))):
            if lock != self._store.layout.image_lock(image_id):
                self._free_lock(lock)
        with self._store.lock(image_id, "reap", timeout=0):
            if not _is_remains(set(names_if_directory(self._datastore, directory))):
                return
            image = Image(self._store.key(image_id), directory, ImageState.INCOMPLETE)
            trash = discard_unused(self._store, image)
        free_discarded(self._store, image_id, trash)

    @contextlib.contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """One thing of many: what is held or cannot be freed is noted, and the next one is looked at."""
        self._check()
        try:
            yield
        except (FileNotFoundError, ImageNotFound):
            return  # somebody else was faster
        except (LockTimeout, ImageInUse) as error:
            self.reaped.kept.append(f"{what}: {error.message}")
        except ImagesError as error:
            _log.warning("not reaped datastore=%s what=%s error=%s", self._datastore.name, what, error)
            self.reaped.faults.append(f"{what}: {error.message}")
            if not isinstance(error, InvalidRequest):
                self._datastore.check()


def _written_ns(entry: Entry) -> int:
    """When it was last written to, whatever time was set on it since."""
    return max(entry.modified_ns, entry.changed_ns)


def _is_remains(names: set[str]) -> bool:
    """Whether there is nothing of an image in its directory any more: it would be in the way of the next one."""
    return all(
        name in (TIMESTAMP_RENAMED, UNUSED_MARKER) or name.endswith(LOCK_SUFFIX) or is_temporary(name) for name in names
    )
