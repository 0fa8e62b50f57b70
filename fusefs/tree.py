"""What the mount shows: datastores, their images, their files. An index in memory, fed by the sidecar's watch stream.

Every listing and every stat is answered from here. Readers take no lock: they see whole values, which a writer
replaces. Writers hold `_lock`.

What this mount did itself, publish or delete, is in the index at once; what the stream says of the same image then may
be older, and is doubted (see `doubts`).
"""

import contextlib
import copy
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from struct import Struct
from typing import NamedTuple
from zlib import crc32

from fusefs.doubts import Doubts, Key
from fusefs.provenance import Generation
from sidecar.client import Datastore, FileKind, Image, ImageFile, ImageRef, ImageState, WatchImagesResponse

ROOT_INODE = 1

_FILE = Struct("<BqqqQ")
_ID_MARK = "\0"  # stands for the image id where names are stored; no name has it

_STAGED_FROM = 1 << 4  # in rank 0, above the directory and what belongs to it
_RANKS: dict[int, int] = {
    FileKind.FILE_KIND_UNSPECIFIED: 1,
    FileKind.FILE_KIND_COMPANION: 1,
    FileKind.FILE_KIND_EXTENT: 2,
    FileKind.FILE_KIND_DESCRIPTOR: 3,
}


class IndexedFile(NamedTuple):
    """A file of an image, as the sidecar says it is."""

    name: str
    kind: int  # a FileKind
    size: int
    allocated: int
    modified_ns: int
    inode: int  # on the datastore; 0 where it has no such number

    @property
    def generation(self) -> Generation:
        return Generation(self.inode, self.modified_ns, self.size)

    @property
    def is_disk(self) -> bool:
        return self.kind != FileKind.FILE_KIND_COMPANION


class IndexedImage:
    """An image in the index, in a few hundred bytes; never changed, only replaced.

    The names of its files are kept with the id taken out, so that all images share a few tuples of them.
    """

    __slots__ = (
        "_directory",
        "_files",
        "_names",
        "created_ns",
        "details_known",
        "image_id",
        "number",
        "state",
        "touched_ns",
    )

    def __init__(self, image: Image, number: int, shapes: dict[tuple[str, ...], tuple[str, ...]]) -> None:
        self.image_id = sys.intern(image.ref.image_id)
        self.number = number
        self.state = image.state
        self.details_known = image.details_known
        self._directory = self._fold(image.directory)
        names = tuple(self._fold(file.name) for file in image.files)
        self._names = shapes.setdefault(names, names)
        self._files = b"".join(map(_packed, image.files))
        self.created_ns = image.create_time.ToNanoseconds()
        self.touched_ns = image.touch_time.ToNanoseconds()

    @property
    def is_valid(self) -> bool:
        return self.state == ImageState.IMAGE_STATE_VALID

    @property
    def is_tombstoned(self) -> bool:
        return self.state == ImageState.IMAGE_STATE_TOMBSTONED

    @property
    def directory(self) -> str:
        """Relative to the datastore's root."""
        return self._directory.replace(_ID_MARK, self.image_id)

    @property
    def inode(self) -> int:
        return directory_inode(self.number)

    @property
    def files(self) -> list[IndexedFile]:
        """Companion files first, then extents, the descriptor last: a copy is complete with its last file."""
        names = (name.replace(_ID_MARK, self.image_id) for name in self._names)
        return [IndexedFile(name, *values) for name, values in zip(names, _FILE.iter_unpack(self._files), strict=True)]

    def file(self, name: str) -> IndexedFile | None:
        return next((file for file in self.files if file.name == name), None)

    def same_content(self, other: "IndexedImage") -> bool:
        """Whether both say the same of state and files."""
        return (self.state, self.details_known, self._names, self._files) == (
            other.state,
            other.details_known,
            other._names,
            other._files,
        )

    def tombstoned(self) -> "IndexedImage":
        """The same image after its deletion."""
        other = copy.copy(self)
        other.state = ImageState.IMAGE_STATE_TOMBSTONED
        return other

    def _fold(self, text: str) -> str:
        return sys.intern(text.replace(self.image_id, _ID_MARK))


class IndexedDatastore:
    """A datastore and its images by id, the tombstoned and the incomplete ones too."""

    __slots__ = ("images", "info", "number")

    def __init__(self, info: Datastore, number: int, images: dict[str, IndexedImage]) -> None:
        self.info = info
        self.number = number
        self.images = images

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def inode(self) -> int:
        return directory_inode(self.number)

    def valid_images(self) -> list[IndexedImage]:
        return [image for image in list(self.images.values()) if image.is_valid]

    def tombstoned_images(self) -> list[IndexedImage]:
        return [image for image in list(self.images.values()) if image.is_tombstoned]


class Tree:
    """The index. `clock` is a monotonic time in seconds.

    `before_change` is called when an image is about to be shown otherwise, or not at all; `on_change` when it is, with
    its datastore, what it was and what it is now. Neither may wait, nor change the index, whose lock is held.
    """

    def __init__(
        self,
        *,
        before_change: Callable[[Key], None] = lambda key: None,
        on_change: Callable[[str, IndexedImage, IndexedImage | None], None] = lambda datastore, before, now: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._before_change = before_change
        self._on_change = on_change
        self._lock = threading.RLock()
        self._doubts = Doubts(self._lock, clock)
        self._numbers = itertools.count(1)
        self._shapes: dict[tuple[str, ...], tuple[str, ...]] = {}  # one tuple for all images with files named alike
        self._datastores: dict[str, IndexedDatastore] = {}
        self._snapshot: dict[Key, IndexedImage] | None = None
        self._expected: dict[Key, int] = {}
        self._complete = threading.Event()

    @property
    def datastores(self) -> list[IndexedDatastore]:
        return list(self._datastores.values())

    def datastore(self, name: str) -> IndexedDatastore | None:
        return self._datastores.get(name)

    def image(self, datastore: str, image_id: str) -> IndexedImage | None:
        """The image, whatever its state."""
        found = self._datastores.get(datastore)
        return found.images.get(image_id) if found is not None else None

    def new_number(self) -> int:
        """A number that no directory of this mount had before."""
        with self._lock:
            return next(self._numbers)

    def expect(self, key: Key, number: int | None) -> None:
        """The image that is about to be published has this number, whoever tells of it first; None: not any more."""
        with self._lock:
            if number is None:
                self._expected.pop(key, None)
            else:
                self._expected[key] = number

    def wait_complete(self, timeout: float) -> bool:
        """True when everything is known that there is; false after `timeout` seconds."""
        return self._complete.wait(timeout)

    def apply(self, answer: WatchImagesResponse) -> None:
        """Takes in an answer of the watch stream, but for what is doubted of it."""
        with self._lock:
            if answer.datastores:
                self._set_datastores(answer.datastores, these_are_all=answer.snapshot_start)
            if answer.snapshot_start:
                self._snapshot = {}
            for image in answer.images:
                key = (image.ref.datastore, image.ref.image_id)
                if self._snapshot is not None:
                    self._snapshot[key] = self._indexed(image)
                elif not self._doubts.takes(key):
                    self._put(key, self._indexed(image))
            for ref in answer.removed:
                key = (ref.datastore, ref.image_id)
                if self._snapshot is not None:
                    self._snapshot.pop(key, None)
                elif not self._doubts.takes(key):
                    self._put(key, None)
            if answer.snapshot_complete:
                self._take_snapshot(set(answer.incomplete_datastores))

    def forget_half_snapshot(self) -> None:
        """A new stream begins: what the one before left unfinished does not count."""
        with self._lock:
            self._snapshot = None

    def next_doubted(self) -> Key | None:
        """Waits for an image that the sidecar is to be asked for; None after `end`."""
        return self._doubts.next()

    def settle(self, key: Key, image: Image | None) -> None:
        """What the sidecar said about a doubted image; None when there is none."""
        with self._lock:
            if self._doubts.answered(key):
                self._put(key, self._indexed(image) if image is not None else None)

    def doubt(self, key: Key) -> None:
        """The sidecar could not be asked for the image: it is to be asked again."""
        with self._lock:
            self._doubts.add(key)

    def end(self) -> None:
        """Nobody asks any more."""
        with self._lock:
            self._doubts.end()

    def learn(self, before: IndexedImage, image: Image) -> IndexedImage:
        """Details of the image `before` that the stream left out, as GetImage gave them.

        For whoever asked; remembered only when nothing else was learned of the image since.
        """
        key = (image.ref.datastore, image.ref.image_id)
        with self._lock:
            indexed = self._indexed(image)
            if self.image(*key) is before:
                self._put(key, indexed)
            return indexed

    @contextlib.contextmanager
    def changing(self, key: Key) -> Iterator[None]:
        """For the time of a call that changes the image, and until its answer is in the index.

        What the stream says meanwhile may be older than the answer, or newer.
        """
        with self._lock:
            self._doubts.begin_change(key)
        try:
            yield
        finally:
            with self._lock:
                self._doubts.end_change(key)

    def changed(self, image: Image) -> None:
        """This mount published or changed the image."""
        key = (image.ref.datastore, image.ref.image_id)
        with self._lock:
            self._doubts.changed(key)
            self._put(key, self._indexed(image))

    def deleted(self, ref: ImageRef) -> None:
        """This mount tombstoned the image."""
        key = (ref.datastore, ref.image_id)
        with self._lock:
            self._doubts.changed(key)
            image = self.image(*key)
            self._put(key, image.tombstoned() if image is not None else None)

    def purged(self, ref: ImageRef) -> None:
        """This mount purged the image."""
        key = (ref.datastore, ref.image_id)
        with self._lock:
            self._doubts.changed(key)
            self._put(key, None)

    def _set_datastores(self, infos: Iterable[Datastore], *, these_are_all: bool) -> None:
        known = self._datastores
        datastores = {} if these_are_all else dict(known)
        for info in infos:
            before = known.get(info.name)
            number = before.number if before is not None else next(self._numbers)
            datastores[info.name] = IndexedDatastore(info, number, before.images if before is not None else {})
        self._datastores = datastores

    def _take_snapshot(self, incomplete: set[str]) -> None:
        """Images of `incomplete` datastores that are not in it stay: nothing is known about them."""
        snapshot, self._snapshot = self._snapshot or {}, None
        for datastore in self.datastores:
            for image_id in list(datastore.images) if datastore.name not in incomplete else ():
                key = (datastore.name, image_id)
                if key not in snapshot and not self._doubts.takes(key):
                    self._put(key, None)
        for key, image in snapshot.items():
            if not self._doubts.takes(key):
                self._put(key, image)
        self._complete.set()

    def _indexed(self, image: Image) -> IndexedImage:
        key = (image.ref.datastore, image.ref.image_id)
        before = self.image(*key)
        number = self._expected.get(key)
        if number is None:
            number = before.number if before is not None else next(self._numbers)
        indexed = IndexedImage(image, number, self._shapes)
        if (
            before is not None
            and before.details_known
            and not image.details_known
            and before.is_valid == indexed.is_valid
        ):
            # Names only, again: what was asked for once goes on being known, as long as the image is the same.
            return before
        return indexed

    def _put(self, key: Key, image: IndexedImage | None) -> None:
        self._doubts.learned(key)
        datastore = self._datastores.get(key[0])
        if datastore is None:
            return
        before = datastore.images.get(key[1])
        changed = before if before is not None and (image is None or not before.same_content(image)) else None
        if changed is not None:
            self._before_change(key)
        if image is None:
            datastore.images.pop(key[1], None)
        else:
            datastore.images[image.image_id] = image
        if changed is not None:
            self._on_change(key[0], changed, image)


def directory_inode(number: int) -> int:
    return (number << 32) | 1


def deleted_inode(number: int) -> int:
    """Of the directory of tombstoned images in a datastore's directory of this number."""
    return (number << 32) | 2


def document_inode(number: int) -> int:
    """Of the document about a directory of this number."""
    return (number << 32) | 3


def staged_inode(number: int, serial: int) -> int:
    """Of a file that is being made in a directory of this number, the `serial`-th there: whatever it is renamed to."""
    return (number << 32) | (_STAGED_FROM + serial)


def file_inode(number: int, name: str, kind: int = FileKind.FILE_KIND_COMPANION) -> int:
    """The inode number of a file in a directory of this number: the same for the life of the mount.

    GNU cp copies the files of a directory in the order of these numbers, not in that of the listing: companion files
    come first and the descriptor comes last in both.
    """
    return (number << 32) | (_RANKS[kind] << 30) | (crc32(name.encode(errors="surrogateescape")) & 0x3FFF_FFFF)


def _packed(file: ImageFile) -> bytes:
    return _FILE.pack(file.kind, file.size_bytes, file.allocated_bytes, file.modify_time.ToNanoseconds(), file.inode)
