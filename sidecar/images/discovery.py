"""Keeps the catalogue true to one datastore, whoever changes it."""

import contextlib
import logging
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sidecar.datastores.interface import Capacity, ChangeWatcher, Datastore, EntryKind, OpenDirectory
from sidecar.errors import DatastoreUnavailable, ImageNotFound, ImagesError, InvalidRequest
from sidecar.images.catalog import Catalog, with_details
from sidecar.images.image import Image, ImageState, read_listed_image, read_opened_image
from sidecar.images.layouts import LAYOUTS
from sidecar.images.looking_ahead import LookAhead
from sidecar.images.names import LOCK_SUFFIX, TIMESTAMP, descriptor_name
from sidecar.images.store import ImageStore

RESCAN_WATCHED_SECONDS = 60.0  # a net below inotify, which does not hear of everything on every file system
STATUS_SECONDS = 5.0
_HUNG_SECONDS = 3 * STATUS_SECONDS
_SHARES = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DatastoreStatus:
    """What was last seen of a datastore; `fault` says why it is not accessible. `checked_ns` is since the epoch."""

    capacity: Capacity
    fault: str
    checked_ns: int


class Discovery:
    """Reads a datastore's images into the catalogue, at first all, then what changes. Owns one thread."""

    def __init__(
        self,
        store: ImageStore,
        catalog: Catalog,
        *,
        rescan_seconds: float = 5.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rescan_seconds`: how often to look at every image where changes by others are not told."""
        self.store = store
        self._catalog = catalog
        self._rescan_seconds = rescan_seconds
        self._monotonic = monotonic
        # From reading an image to putting it, the later reading wins: each guards a share of the images, so that a call
        # does not wait for the discovery's thread, which may read one image after the other.
        self._refreshing = tuple(threading.Lock() for _ in range(_SHARES))
        self._watching = threading.Lock()  # guards which watcher there is; only the thread changes it
        self._watcher: ChangeWatcher | None = None
        self._can_watch = True
        self._stopping = threading.Event()
        # Images that are known without their details, as they were listed.
        self._undetailed: dict[str, OpenDirectory] = {}
        # Images that were read since all were listed at once, which is older then; each call on it is atomic.
        self._read_since: set[str] = set()
        self._complete = False
        self._changes_lost = False  # of the discovery's thread: what looks unchanged may have changed
        self._settled = threading.Event()  # the first scan has ended, in whatever way
        self._status = DatastoreStatus(Capacity(0, 0), "it was not looked at yet", 0)
        self._checked = float("-inf")  # when the status was seen
        self._unreadable = ""  # why not all images could be looked at, the last time
        self._began = monotonic()
        self._thread = threading.Thread(target=self._run, name=f"discovery-{store.datastore.name}")

    @property
    def image_count(self) -> int:
        """Of images that are there for use: tombstoned ones are not counted."""
        return self._catalog.count(self.store.datastore.name, (ImageState.VALID, ImageState.INCOMPLETE))

    @property
    def status(self) -> DatastoreStatus:
        """What was last seen; a datastore that hangs answers nothing, so its silence is a fault.

        So is that no images can be listed, whatever else it answers.
        """
        return replace(self._status, fault=self.silence() or self._status.fault or self._unreadable)

    def silence(self) -> str:
        """That the datastore does not answer, not even with an error, and since when; empty when it does."""
        if self._monotonic() - max(self._checked, self._began) <= _HUNG_SECONDS:
            return ""
        checked_ns = self._status.checked_ns
        seen = datetime.fromtimestamp(checked_ns / 1e9, UTC).isoformat(" ", "seconds") if checked_ns else "the start"
        return f"it has not answered since {seen}"

    def fault(self) -> str:
        """Why it cannot be used, by the last look; empty when it can, or was not looked at yet."""
        status = self._status
        return status.fault if status.checked_ns else ""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        with self._watching:
            if self._watcher:
                self._watcher.wake()
        if self._thread.ident:
            self._thread.join()

    @property
    def complete(self) -> bool:
        """Every image was read once."""
        return self._complete

    def wait_first_scan(self, timeout: float) -> bool:
        """Waits, up to `timeout` seconds, for the end of the first scan, complete or not.

        Whether there is nothing to wait for any more: it has ended, or the datastore does not answer.
        """
        return bool(self.silence()) or self._settled.wait(timeout)

    def read(self, image_id: str) -> Image:
        """One image with all its details, from the datastore; ImageNotFound. The catalogue learns of it."""
        with self._reading(image_id):
            image = self.store.read(image_id)
            self._read_since.add(image_id)
            self._catalog.put(image)
            return image

    def refresh(self, image_id: str, *, changed: bool = True) -> None:
        """Reads one image again; an error leaves what was known and is in the datastore's status.

        Where attributes are slow to read, they are read again only of an image that did change and has them listed.
        """
        self._read_again(image_id, changed=changed)

    def note_change(self, image_id: str) -> None:
        """As `refresh` of what this process changed: with all details, also where they are slow to read.

        Who made an image has just read them, and nobody else would until somebody asks for them.
        """
        self._read_again(image_id, changed=True, made_here=True)

    def note_use(self, image_id: str, used_ns: int) -> None:
        """That the timestamp file of a valid image got that mtime: the catalogue learns it without another look."""
        with self._reading(image_id):
            known = self._catalog.get(self.store.key(image_id))
            # Not a later use, which may have been noted first.
            if known and known.state is ImageState.VALID and known.touched_ns and known.touched_ns < used_ns:
                inode, changed_ns, _ = known.fingerprint
                self._read_since.add(image_id)
                self._catalog.put(replace(known, touched_ns=used_ns, fingerprint=(inode, changed_ns, used_ns)))
                return
        self.refresh(image_id)

    def _reading(self, image_id: str) -> threading.Lock:
        # Not `hash`, which is another one in each process: which images wait for each other would change with it.
        return self._refreshing[zlib.crc32(image_id.encode()) % _SHARES]

    def _read_again(self, image_id: str, *, changed: bool, made_here: bool = False) -> bool:
        """Whether it is known now what there is."""
        key = self.store.key(image_id)
        try:
            with self._reading(image_id):
                known = self._catalog.get(key)
                self._read_since.add(image_id)
                detailed = made_here or (changed and known is not None and known.details_known)
                try:
                    image = self._read(image_id, detailed=detailed, made_here=made_here)
                    image = with_details(image, known)
                    if _loses_details(image, known):
                        image = self.store.read(image_id)
                except ImageNotFound:
                    self._catalog.remove(key)
                else:
                    self._catalog.put(image)
        except ImagesError as error:
            _log.warning("image unreadable image=%s error=%s", key, error)
            return False
        return True

    def _read(self, image_id: str, *, detailed: bool, made_here: bool) -> Image:
        if not detailed:
            return self.store.read_for_listing(image_id)
        try:
            return self.store.read(image_id)
        except ImagesError as error:
            if not made_here or isinstance(error, ImageNotFound):
                raise
            return self.store.read_for_listing(image_id)  # that it was deleted is known without its descriptor

    def check(self) -> DatastoreStatus:
        """Looks at the datastore itself, and remembers what it saw."""
        datastore = self.store.datastore
        try:
            status = DatastoreStatus(datastore.check(), "", time.time_ns())
        except ImagesError as error:
            status = DatastoreStatus(self._status.capacity, fault_of(datastore, error), time.time_ns())
        if status.fault != self._status.fault:
            if status.fault:
                _log.warning("datastore changed datastore=%s accessible=false fault=%r", datastore.name, status.fault)
            else:
                _log.info("datastore changed datastore=%s accessible=true", datastore.name)
        self._status, self._checked = status, self._monotonic()
        return status

    def _run(self) -> None:
        try:
            self._keep_up()
        finally:
            self._end_watcher()

    def _keep_up(self) -> None:
        next_scan = self._monotonic()
        while not self._stopping.is_set():
            try:
                self._check_when_due()
                if (now := self._monotonic()) >= next_scan:
                    next_scan = now + STATUS_SECONDS
                    whole = self._scan()
                    self._unreadable = ""
                    if whole:
                        next_scan = self._monotonic() + self._rescan_interval()
                    self._read_details()
                if self._wait(min(next_scan, self._checked + STATUS_SECONDS) - self._monotonic()):
                    next_scan = self._monotonic()
            except ImagesError as error:
                if (fault := fault_of(self.store.datastore, error)) != self._unreadable:
                    self._unreadable = fault
                    _log.warning("datastore unreadable datastore=%s error=%s", self.store.datastore.name, error)
                self._stopping.wait(1.0)
            except Exception:
                # The thread must outlive a defect: without it the catalogue would be stale and nobody would know.
                _log.exception("discovery failed datastore=%s", self.store.datastore.name)
                self._stopping.wait(1.0)

    def _check_when_due(self) -> None:
        if self._monotonic() >= self._checked + STATUS_SECONDS:
            self.check()

    def _rescan_interval(self) -> float:
        return max(RESCAN_WATCHED_SECONDS, self._rescan_seconds) if self._watcher else self._rescan_seconds

    def _scan(self) -> bool:
        """Looks at every image and reads what changed; while the datastore cannot be used, what is known stays.

        Whether everything was read.
        """
        lost, self._changes_lost = self._changes_lost, False
        whole = False
        try:
            whole = not self._status.fault and self._look_at_all(lost)
            if whole and not self._complete:
                self._warn_of_other_layout()
            self._complete = whole or self._complete
            return whole
        except FileNotFoundError as error:
            raise DatastoreUnavailable(f"{self.store.datastore.name}: {error} vanished") from error
        finally:
            self._changes_lost = self._changes_lost or (lost and not whole)
            self._settled.set()

    def _look_at_all(self, lost: bool) -> bool:
        store, layout = self.store, self.store.layout
        layout.prepare(store.datastore)
        if self._watcher is None and self._can_watch:
            with self._watching:
                self._watcher = store.datastore.watcher()
            self._can_watch = self._watcher is not None
        if (parent := layout.collection_parent()) is not None:
            self._watch(parent)
        self._read_since.clear()
        if (tree := store.datastore.tree()) is not None:
            return self._take_tree(tree)
        image_ids, vanished, whole = self._list_all()
        with LookAhead(store.datastore, self._unread_descriptors(image_ids)):
            for image_id in image_ids:
                self._watch(layout.image_directory(image_id))
                if lost or not self._is_unchanged(image_id):
                    whole = self._read_again(image_id, changed=lost) and whole
                self._check_when_due()
                if self._stopping.is_set():
                    return False
        for image_id in vanished:
            self._check_when_due()
            whole = self._read_again(image_id, changed=True) and whole
        return whole

    def _take_tree(self, tree: Mapping[str, OpenDirectory]) -> bool:
        """What all directories were listed to hold. Whether everything was read."""
        store, layout = self.store, self.store.layout
        vanished = set(self._catalog.ids(store.datastore.name))
        undetailed: dict[str, OpenDirectory] = {}
        for collection in layout.collections(store.datastore):
            for name in tree[collection].names() if collection in tree else ():
                image_id = layout.image_id(collection, name)
                if image_id is None or layout.image_directory(image_id) not in tree:
                    continue
                with self._reading(image_id), contextlib.suppress(ImageNotFound):
                    image = read_listed_image(store.datastore, layout, image_id, tree[layout.image_directory(image_id)])
                    vanished.discard(image_id)
                    if image_id not in self._read_since:
                        known = self._catalog.get(image.key)
                        image = with_details(image, known)
                        changed = _loses_details(image, known)
                        if not changed:
                            self._catalog.put(image)
                        if not image.details_known and (changed or not layout.names_only):
                            undetailed[image_id] = tree[image.directory]
        self._undetailed = undetailed
        whole = True
        for image_id in vanished:
            self._check_when_due()
            whole = self._read_again(image_id, changed=True) and whole
        return whole

    def _read_details(self) -> None:
        """Of what was listed without them: they are there some time after the image, and nobody waits for them."""
        undetailed, self._undetailed = self._undetailed, {}
        for image_id, listed in undetailed.items():
            if self._stopping.is_set():
                return
            self._check_when_due()
            try:
                with self._reading(image_id), contextlib.suppress(ImageNotFound, FileNotFoundError):
                    if image_id not in self._read_since:
                        self._catalog.put(read_opened_image(self.store.datastore, self.store.layout, image_id, listed))
            except ImagesError as error:
                _log.warning("image unreadable image=%s error=%s", self.store.key(image_id), error)
                if self.check().fault:
                    return  # of all of them: the next scan goes on
                self._take_undetailed(image_id, listed)

    def _take_undetailed(self, image_id: str, listed: OpenDirectory) -> None:
        """Rather than go on with what was known of another one."""
        with self._reading(image_id), contextlib.suppress(ImageNotFound):
            if image_id not in self._read_since:
                self._catalog.put(read_listed_image(self.store.datastore, self.store.layout, image_id, listed))

    def _list_all(self) -> tuple[list[str], set[str], bool]:
        """The ids of what may be images; those that are known and not there any more; whether all could be listed."""
        store, layout = self.store, self.store.layout
        image_ids: list[str] = []
        known = set(self._catalog.ids(store.datastore.name))
        whole = True
        for collection in layout.collections(store.datastore):
            self._check_when_due()
            self._watch(collection)
            try:
                names = store.datastore.names(collection)
            except (FileNotFoundError, InvalidRequest):
                continue  # gone, or a file or link that somebody put there: no collection
            except ImagesError as error:
                _log.warning("collection unreadable datastore=%s error=%s", store.datastore.name, error)
                known = {each for each in known if layout.image_directory(each).rpartition("/")[0] != collection}
                whole = False
                continue
            image_ids.extend(image_id for name in names if (image_id := layout.image_id(collection, name)) is not None)
        return image_ids, known.difference(image_ids), whole

    def _warn_of_other_layout(self) -> None:
        """A datastore that is served with another layout than its own looks empty, and nothing else would say why."""
        store = self.store
        if self._catalog.ids(store.datastore.name):
            return
        for layout in LAYOUTS.values():
            with contextlib.suppress(FileNotFoundError, ImagesError):
                for collection in layout.collections(store.datastore):
                    for name in store.datastore.names(collection):
                        if layout.image_id(collection, name) is not None:
                            _log.warning(
                                "datastore looks empty, and may be of another layout datastore=%s layout=%s found=%s "
                                "layout_of_that=%s see=datastore.%s.layout in the configuration",
                                store.datastore.name,
                                store.layout.id,
                                f"{collection}/{name}".lstrip("/"),
                                layout.id,
                                store.datastore.name,
                            )
                            return

    def _unread_descriptors(self, image_ids: list[str]) -> list[str]:
        store = self.store
        if store.layout.names_only:
            return []
        unread = (image_id for image_id in image_ids if self._catalog.get(store.key(image_id)) is None)
        return [f"{store.layout.image_directory(image_id)}/{descriptor_name(image_id)}" for image_id in unread]

    def _watch(self, path: str) -> None:
        if self._watcher and not self._watcher.watch(path):
            self._can_watch = False  # for good: a watcher that misses something is worse than looking again
            self._changes_lost = True
            self._end_watcher()

    def _end_watcher(self) -> None:
        with self._watching:
            watcher, self._watcher = self._watcher, None
        if watcher:
            watcher.close()

    def _is_unchanged(self, image_id: str) -> bool:
        """Whether directory and timestamp file are as when the image was read: two looks instead of reading it."""
        image = self._catalog.get(self.store.key(image_id))
        if image is None or self.store.layout.names_only:
            return False
        datastore = self.store.datastore
        try:
            place = datastore.entry(image.directory)
            timestamp = datastore.entry(image.path(TIMESTAMP)).modified_ns if image.touched_ns is not None else 0
        except (FileNotFoundError, InvalidRequest):  # the latter: it is no directory any more
            return False
        return place.kind is EntryKind.DIRECTORY and image.fingerprint == (place.inode, place.changed_ns, timestamp)

    def _wait(self, timeout: float) -> bool:
        """Waits for changes and reads what changed; whether everything has to be looked at again."""
        if self._watcher is None:
            self._stopping.wait(max(timeout, 0))
            return False
        if self._stopping.is_set():  # set before there was a watcher to wake
            return False
        changes = self._watcher.wait(max(timeout, 0))
        layout = self.store.layout
        changed: set[str] = set()
        for directory, names in changes.names.items():
            found = {layout.image_id(directory, name) for name in names} - {None}
            owner = self._owner(directory)
            told = {name for name in names if not name.endswith(LOCK_SUFFIX)}
            if owner is not None and told and not self._is_noted_use(owner, told):
                found.add(owner)
            changed.update(image_id for image_id in found if image_id is not None)
        for image_id in changed:
            self._check_when_due()
            self._watch(layout.image_directory(image_id))
            self.refresh(image_id)
        self._changes_lost = self._changes_lost or changes.lost
        return changes.lost or layout.collection_parent() in changes.names or self._watcher is None

    def _is_noted_use(self, image_id: str, names: set[str]) -> bool:
        """Whether what changed in an image's directory is the time of a use, and known: this process made it."""
        try:
            return names == {TIMESTAMP} and self._is_unchanged(image_id)
        except ImagesError:
            return False  # reading it says what is wrong

    def _owner(self, directory: str) -> str | None:
        """The image whose directory this is."""
        collection, _, name = directory.rpartition("/")
        image_id = self.store.layout.image_id(collection, name) if name else None
        return image_id if image_id and self.store.layout.image_directory(image_id) == directory else None


def _loses_details(image: Image, known: Image | None) -> bool:
    """Whether it was changed, or replaced, since somebody asked for its details: who has them keeps them until there
    are others."""
    return known is not None and known.details_known and not image.details_known and known.state is image.state


def fault_of(datastore: Datastore, error: ImagesError) -> str:
    """What the error says of the datastore, without the name: that stands beside it wherever a fault is told."""
    return error.message.removeprefix("datastore ").removeprefix(f"{datastore.name}: ")
