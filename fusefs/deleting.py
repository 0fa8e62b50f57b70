"""What rm means: a tombstone for the image, or one companion file less; of a tombstoned one, the end of its bytes.

`rm -r` unlinks file by file, then the directory. The first file of the disk that goes takes the image with it, and the
rest of the command must succeed on what is not there any more: a ghost of the image stays for some seconds, for
whoever names it; it is not listed.

A companion file that is unlinked is hidden at once and removed later, when it is known that the image stays: an image
that is deleted whole, and undeleted, has all its files.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fusefs.doubts import Key
from fusefs.errors import fail, is_transient
from fusefs.patience import LOCK_SECONDS, Patience
from fusefs.provenance import Generation
from fusefs.pulse import Pulse
from fusefs.tree import IndexedFile, IndexedImage, Tree
from fusefs.turns import Turns
from sidecar.client import ImageRef, SidecarClient
from sidecar.errors import ImageNotFound, ImagesError, ImageTombstoned

_log = logging.getLogger(__name__)

GHOST_SECONDS = 5.0
_MOST_GHOST_SECONDS = 60.0
_RETRY_SECONDS = 5.0


@dataclass(slots=True)
class Ghost:
    """An image that this mount tombstoned or purged, while the rest of the command may still name its files."""

    key: Key
    image: IndexedImage
    removed: set[str]
    until: float
    last: float  # never any longer than this


def purged_key(key: Key) -> Key:
    """The key of the ghost that a purge leaves, which is not where the one of a tombstone is."""
    return (key[0], f"{key[1]}/purged")


@dataclass(slots=True)
class _Removal:
    """Companion files of one image, which may not be the one that has its name later."""

    number: int
    files: dict[str, Generation] = field(default_factory=dict)
    due: float = 0.0

    def names_in(self, image: IndexedImage) -> set[str]:
        """Those of the files that the image still has, as they were when they were unlinked."""
        if not image.is_valid or image.number != self.number:
            return set()
        return {file.name for file in image.files if self.files.get(file.name) == file.generation}


class Deletions:
    """Tombstones, ghosts and companion files that are to go. `clock` is monotonic."""

    def __init__(
        self,
        client: SidecarClient,
        pulse: Pulse,
        tree: Tree,
        settle_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._pulse = pulse
        self._tree = tree
        self._settle_seconds = settle_seconds
        self._clock = clock
        self._lock = threading.Lock()  # guards the dictionaries; never held over a call to the sidecar
        self._ghosts: dict[Key, Ghost] = {}
        self._removals: dict[Key, _Removal] = {}
        self._patience = Patience(clock=clock)
        self._turns = Turns()  # of whoever deletes or restores an image, or removes companion files of it

    def ghost(self, key: Key) -> Ghost | None:
        """The ghost of an image, for as long as the command that deleted it goes on."""
        ghost = self._ghosts.get(key)
        if ghost is not None and self._clock() > ghost.until:
            self.lay(key)
            return None
        return ghost

    def keep(self, ghost: Ghost) -> None:
        """The command that deleted the image goes on: its ghost stays a while longer."""
        ghost.until = min(self._clock() + GHOST_SECONDS, ghost.last)

    def lay(self, key: Key) -> None:
        """The ghost is seen no more: its directory was removed, or there is a new image of the name."""
        with self._lock:
            self._ghosts.pop(key, None)

    def hidden(self, key: Key, image: IndexedImage) -> set[str]:
        """Companion files of the image that are to go."""
        removal = self._removals.get(key)
        return removal.names_in(image) if removal is not None else set()

    def tombstone(self, key: Key, image: IndexedImage, *, removing: str = "", leave_ghost: bool = True) -> None:
        """Tombstones the image, once, however many of its files are unlinked at the same time."""
        with self._turns.take(key):
            current = self._tree.image(*key)
            if current is not None and current.is_valid and current.number == image.number:
                with self._tree.changing(key):
                    self._delete(key, image, leave_ghost=leave_ghost)
        self._note_removed(key, removing)

    def _delete(self, key: Key, image: IndexedImage, *, leave_ghost: bool) -> None:
        ref = ImageRef(datastore=key[0], image_id=key[1])
        try:
            self._pulse.require()
            with self._patience.waiting(key) as seconds:
                self._client.delete(ref, lock_timeout=seconds)
        except (ImageNotFound, ImageTombstoned) as error:
            _log.info("tombstone was there already image=%s/%s cause=%s", *key, error.message)
        except ImagesError:
            # An rm -r that is refused takes nothing from the image: not the companion files either that it began with.
            with self._lock:
                self._removals.pop(key, None)
            raise
        else:
            _log.info("tombstoned image=%s/%s", *key)
        with self._lock:
            removal = self._removals.pop(key, None)
        if leave_ghost:
            self._leave_ghost(key, image, removal.names_in(image) if removal is not None else set())
        self._tree.deleted(ref)

    def _leave_ghost(self, key: Key, image: IndexedImage, removed: set[str]) -> None:
        now = self._clock()
        with self._lock:
            self._ghosts[key] = Ghost(key, image, removed, now + GHOST_SECONDS, now + _MOST_GHOST_SECONDS)

    def restore(self, key: Key) -> None:
        """Takes an image's tombstone away: it is there again."""
        with self._turns.take(key):
            self._pulse.require()
            with self._tree.changing(key), self._patience.waiting(key) as seconds:
                ref = ImageRef(datastore=key[0], image_id=key[1])
                self._tree.changed(self._client.restore(ref, lock_timeout=seconds))
        self.lay(key)
        _log.info("restored image=%s/%s", *key)

    def purge(self, key: Key, image: IndexedImage, *, removing: str) -> None:
        """Frees a tombstoned image, once, by unlinking this file of it; others may follow."""
        ref = ImageRef(datastore=key[0], image_id=key[1])
        with self._turns.take(key):
            current = self._tree.image(*key)
            if current is not None and current.is_tombstoned and current.number == image.number:
                self._pulse.require()
                with self._tree.changing(key):
                    try:
                        with self._patience.waiting(key) as seconds:
                            freed = self._client.purge(ref, lock_timeout=seconds)
                    except ImageNotFound as error:
                        _log.info("purged already image=%s/%s cause=%s", *key, error.message)
                    else:
                        _log.info("purged image=%s/%s freed_bytes=%s", *key, freed)
                    self._leave_ghost(purged_key(key), image, set())
                    self._tree.purged(ref)
            elif self.ghost(purged_key(key)) is None:
                fail(errno.ENOENT, f"{key[0]}/{key[1]} is no deleted image any more")
        self._note_removed(purged_key(key), removing)

    def _note_removed(self, key: Key, name: str) -> None:
        with self._lock:
            if name and (ghost := self._ghosts.get(key)) is not None:
                ghost.removed.add(name)

    def remove_later(self, key: Key, image: IndexedImage, file: IndexedFile) -> None:
        """Hides a companion file, and removes it when the image is still there after the settle time."""
        with self._lock:
            removal = self._removals.get(key)
            if removal is None or removal.number != image.number:
                removal = self._removals[key] = _Removal(image.number)
            removal.files = {**removal.files, file.name: file.generation}
            removal.due = self._clock() + self._settle_seconds

    def cancel(self, key: Key, name: str) -> None:
        """There will be a new companion file of that name; returns when it is safe from the removal of the old one."""
        with self._turns.take(key), self._lock:
            removal = self._removals.get(key)
            if removal is not None:
                removal.files = {other: generation for other, generation in removal.files.items() if other != name}

    def next_due(self) -> float | None:
        """When `run_due` has something to do."""
        with self._lock:
            return min((removal.due for removal in self._removals.values()), default=None)

    def run_due(self, *, everything: bool = False) -> None:
        """Removes the companion files whose time has come; not those of an image that is being deleted.

        The delete may wait for the image's lock: a removal that got it first would take them from the tombstone.
        `everything`: those whose time has not come, too, as the mount ends.
        """
        now = self._clock()
        with self._lock:
            due = [(key, item) for key, item in self._removals.items() if everything or item.due <= now]
        for key, removal in due:
            if self._turns.is_taken(key):
                removal.due = now + _RETRY_SECONDS
                continue
            with self._turns.take(key):
                # Short, as a request may wait for its turn meanwhile; at the end there is none, and no other try.
                self._run(key, removal, now, None if everything else LOCK_SECONDS)

    def _run(self, key: Key, removal: _Removal, now: float, lock_timeout: float | None) -> None:
        files = dict(removal.files)
        image = self._tree.image(*key)
        names = sorted(removal.names_in(image)) if image is not None else []
        try:
            if names:
                ref = ImageRef(datastore=key[0], image_id=key[1])
                self._pulse.require()
                with self._tree.changing(key):
                    changed = self._client.update_metadata(ref, remove=names, lock_timeout=lock_timeout)
                    self._tree.changed(changed)
                _log.info("companion files removed image=%s/%s names=%s", *key, names)
        except ImagesError as error:
            trying_again = is_transient(error)
            _log.warning(
                "companion files not removed image=%s/%s names=%s again=%s cause=%s",
                *key, names, trying_again, error.message,
            )  # fmt: skip
            if trying_again:
                removal.due = self._clock() + _RETRY_SECONDS
                return
        with self._lock:
            removal.files = {
                name: generation for name, generation in removal.files.items() if files.get(name) != generation
            }
            if not removal.files and self._removals.get(key) is removal:
                del self._removals[key]
