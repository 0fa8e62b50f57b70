"""What rm means: a tombstone for the image, or one companion file less.

`rm -r` unlinks file by file, then the directory. The first file of the disk that goes takes the image with it, and the
rest of the command must succeed on what is not there any more: a ghost of the image stays for some seconds, for
whoever names it; it is not listed.

A companion file that is unlinked is hidden at once and removed later, when it is known that the image stays: an image
that is deleted whole, and undeleted, has all its files.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fusefs.tree import IndexedImage, Key, Tree
from sidecar.client import ImageRef, SidecarClient
from sidecar.errors import ImageNotFound, ImagesError, ImageTombstoned

_log = logging.getLogger(__name__)

GHOST_SECONDS = 5.0
_RETRY_SECONDS = 5.0


@dataclass(slots=True)
class Ghost:
    """An image that this mount tombstoned, while the rest of the command may still name its files."""

    image: IndexedImage
    removed: set[str]
    until: float


@dataclass(slots=True)
class _Removal:
    names: set[str] = field(default_factory=set)
    due: float = 0.0


class Deletions:
    """Tombstones, ghosts and companion files that are to go. `clock` is monotonic."""

    def __init__(
        self, client: SidecarClient, tree: Tree, settle_seconds: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._tree = tree
        self._settle_seconds = settle_seconds
        self._clock = clock
        self._lock = threading.Lock()  # guards the dictionaries; never held over a call to the sidecar
        self._ghosts: dict[Key, Ghost] = {}
        self._removals: dict[Key, _Removal] = {}
        self._deleting: dict[Key, threading.Lock] = {}

    def ghost(self, key: Key) -> Ghost | None:
        """The ghost of an image; asking keeps it a while longer."""
        ghost = self._ghosts.get(key)
        if ghost is None:
            return None
        now = self._clock()
        if now > ghost.until:
            self.lay(key)
            return None
        ghost.until = now + GHOST_SECONDS
        return ghost

    def lay(self, key: Key) -> None:
        """The ghost is seen no more: its directory was removed, or there is a new image of the name."""
        with self._lock:
            self._ghosts.pop(key, None)

    def hidden(self, key: Key) -> set[str]:
        """Companion files of the image that are to go."""
        removal = self._removals.get(key)
        return removal.names if removal is not None else set()

    def tombstone(self, key: Key, image: IndexedImage, *, removing: str = "", leave_ghost: bool = True) -> None:
        """Tombstones the image, once, however many of its files are unlinked at the same time."""
        with self._lock:
            once = self._deleting.setdefault(key, threading.Lock())
        with once:
            current = self._tree.image(*key)
            if current is not None and current.is_valid and current.number == image.number:
                ref = ImageRef(datastore=key[0], image_id=key[1])
                try:
                    self._client.delete(ref)
                except (ImageNotFound, ImageTombstoned) as error:
                    _log.info("tombstone was there already image=%s/%s cause=%s", *key, error.message)
                else:
                    _log.info("tombstoned image=%s/%s", *key)
                with self._lock:
                    removed = self._removals.pop(key, _Removal()).names
                    if leave_ghost:
                        self._ghosts[key] = Ghost(image, set(removed), self._clock() + GHOST_SECONDS)
                self._tree.deleted(ref)
            with self._lock:
                self._deleting.pop(key, None)
                if removing and (ghost := self._ghosts.get(key)) is not None:
                    ghost.removed.add(removing)

    def remove_later(self, key: Key, name: str) -> None:
        """Hides a companion file, and removes it when the image is still there after the settle time."""
        with self._lock:
            removal = self._removals.setdefault(key, _Removal())
            removal.names = {*removal.names, name}
            removal.due = self._clock() + self._settle_seconds

    def next_due(self) -> float | None:
        """When `run_due` has something to do."""
        with self._lock:
            return min((removal.due for removal in self._removals.values()), default=None)

    def run_due(self, *, everything: bool = False) -> None:
        """Removes the companion files whose time has come."""
        now = self._clock()
        with self._lock:
            due = [(key, item) for key, item in self._removals.items() if everything or item.due <= now]
        for key, removal in due:
            names = set(removal.names)
            try:
                image = self._client.update_metadata(ImageRef(datastore=key[0], image_id=key[1]), remove=sorted(names))
                self._tree.changed(image)
                _log.info("companion files removed image=%s/%s names=%s", *key, sorted(names))
            except (ImageNotFound, ImageTombstoned):
                pass
            except ImagesError as error:
                _log.warning("companion files not removed, trying again image=%s/%s cause=%s", *key, error.message)
                removal.due = now + _RETRY_SECONDS
                continue
            with self._lock:
                removal.names = removal.names - names
                if not removal.names:
                    self._removals.pop(key, None)
