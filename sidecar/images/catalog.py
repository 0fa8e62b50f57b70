"""What images there are, in memory: answers listings, and tells those who watch what changed."""

import bisect
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from sidecar.images.image import Image, ImageKey, ImageState

_REMEMBERED_REMOVALS = 20_000


@dataclass(frozen=True, slots=True)
class Page:
    """`after` goes on where this page ends; None after the last one. `total` counts the images of all pages."""

    images: list[Image]
    after: str | None
    total: int


@dataclass(frozen=True, slots=True)
class CatalogChanges:
    """What changed up to `revision`; with `everything`, the images are all there are."""

    revision: int
    images: list[Image]
    removed: list[ImageKey]
    everything: bool


class Catalog:
    """The images of all datastores of a sidecar. Safe for use by several threads.

    Every change gets the next revision. A watcher asks for what came after the revision it knows; that is answered from
    the images themselves, ordered by their last change, so a slow watcher costs nothing and misses nothing but
    intermediate states.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards all that follows
        self._revision = 0
        self._keys: dict[str, list[str]] = {}  # sorted image ids, by datastore
        self._counts: Counter[tuple[str, ImageState]] = Counter()
        self._latest: OrderedDict[ImageKey, tuple[int, Image | None]] = OrderedDict()  # by revision; None: removed
        self._removed = 0  # how many of them are removals
        self._forgotten = 0  # the newest revision whose removal is no longer remembered

    def get(self, key: ImageKey) -> Image | None:
        with self._changed:
            return self._latest.get(key, (0, None))[1]

    def ids(self, datastore: str) -> list[str]:
        with self._changed:
            return list(self._keys.get(datastore, ()))

    def count(self, datastore: str, states: Collection[ImageState]) -> int:
        with self._changed:
            return sum(self._counts[datastore, state] for state in states)

    def put(self, image: Image) -> None:
        """Adds or replaces an image; no change when it is the one that is known."""
        with self._changed:
            old = self._latest.get(image.key, (0, None))[1]
            if old == image and old.fingerprint == image.fingerprint:
                return
            if old is None:
                bisect.insort(self._keys.setdefault(image.key.datastore, []), image.key.image_id)
                self._removed -= image.key in self._latest
            else:
                self._counts[image.key.datastore, old.state] -= 1
            self._counts[image.key.datastore, image.state] += 1
            self._record(image.key, image)

    def remove(self, key: ImageKey) -> None:
        """Takes an image out; no change when it is not known."""
        with self._changed:
            old = self._latest.get(key, (0, None))[1]
            if old is None:
                return
            ids = self._keys[key.datastore]
            del ids[bisect.bisect_left(ids, key.image_id)]
            self._counts[key.datastore, old.state] -= 1
            self._removed += 1
            self._record(key, None)
            self._forget_old_removals()

    def page(
        self, datastores: Iterable[str], states: Collection[ImageState], image_id: str, after: str, size: int
    ) -> Page:
        """Images in the order of `datastore/id`, from behind `after` on; all ids, or exactly `image_id`."""
        images: list[Image] = []
        with self._changed:
            chosen = sorted(datastores)
            if image_id:
                found_images = (self._latest.get(ImageKey(name, image_id), (0, None))[1] for name in chosen)
                total = sum(image is not None and image.state in states for image in found_images)
            else:
                total = sum(self._counts[name, state] for name in chosen for state in states)
            after_datastore, _, after_id = after.partition("/")
            for name in chosen:
                ids = self._keys.get(name, [])
                if image_id:
                    ids = [image_id] if ImageKey(name, image_id) in self._latest else []
                start = bisect.bisect_right(ids, after_id) if after and name == after_datastore else 0
                for found in ids[start:] if not after or name >= after_datastore else ():
                    image = self._latest[ImageKey(name, found)][1]
                    if image is None or image.state not in states:
                        continue
                    if len(images) == size:
                        return Page(images, str(images[-1].key), total)
                    images.append(image)
        return Page(images, None, total)

    def changes_since(self, revision: int, datastore: str) -> CatalogChanges:
        """What changed after `revision`, of one datastore or (empty) of all; everything when that is too long ago."""
        with self._changed:
            everything = revision < self._forgotten or not 0 < revision <= self._revision
            images: list[Image] = []
            removed: list[ImageKey] = []
            for key, (changed_at, image) in reversed(self._latest.items()):
                if changed_at <= revision and not everything:
                    break
                if datastore and key.datastore != datastore:
                    continue
                if image is not None:
                    images.append(image)
                elif not everything:
                    removed.append(key)
            return CatalogChanges(self._revision, images, removed, everything)

    def wait(self, revision: int, timeout: float, ended: Callable[[], bool]) -> None:
        """Waits until there is something after `revision`, or nobody waits for it any more, up to `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._revision > revision or ended(), timeout)

    def wake(self) -> None:
        """Lets everybody who waits ask again whether it has ended."""
        with self._changed:
            self._changed.notify_all()

    def _record(self, key: ImageKey, image: Image | None) -> None:
        self._revision += 1
        self._latest[key] = (self._revision, image)
        self._latest.move_to_end(key)
        self._changed.notify_all()

    def _forget_old_removals(self) -> None:
        if self._removed <= _REMEMBERED_REMOVALS:
            return
        old = [(key, at) for key, (at, image) in self._latest.items() if image is None][: _REMEMBERED_REMOVALS // 2]
        for key, at in old:
            del self._latest[key]
            self._forgotten = max(self._forgotten, at)
        self._removed -= len(old)


def with_details(image: Image, details: Image | None) -> Image:
    """A listing without details, with those that were read before: an image's disk never changes.

    In another directory (another inode) it is another image, published anew.
    """
    if image.details_known or details is None or not details.details_known:
        return image
    if details.state != image.state or details.fingerprint[0] != image.fingerprint[0]:
        return image
    if not image.files:
        return details
    return replace(details, touched_ns=image.touched_ns, fingerprint=image.fingerprint)
