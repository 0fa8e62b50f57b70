"""Following the catalogue: what is there, then what changes, from where a watcher left off."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sidecar.errors import SidecarUnavailable
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import Discovery
from sidecar.images.image import Image, ImageKey

FIRST_SCAN_SECONDS = 30.0
LOOK_SECONDS = 5.0
_REVISION_DIGITS = 19


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """With `everything`, the images are all there are, but for those of the `incomplete` datastores.

    `datastores` are those to tell about now.
    """

    images: list[Image]
    removed: list[ImageKey]
    everything: bool
    resume_token: str
    datastores: list[Discovery]
    incomplete: list[str]


class Watches:
    """All those who follow the catalogue, until the sidecar ends.

    A resume token is `<life>:<revision>`; another life of the sidecar counted its revisions anew.
    """

    def __init__(self, catalog: Catalog, discoveries: list[Discovery]) -> None:
        self._catalog = catalog
        self._discoveries = discoveries
        self._life = uuid.uuid4().hex
        self._ended = threading.Event()

    def end(self) -> None:
        """Ends all of them with SidecarUnavailable: their clients come again when there is a sidecar again."""
        self._ended.set()
        self._catalog.wake()

    def follow(self, datastore: str, resume_token: str, wanted: Callable[[], bool]) -> Iterator[WatchEvent]:
        """Events of one datastore or (empty) of all, for as long as `wanted`. The first one comes at once."""
        discoveries = [d for d in self._discoveries if not datastore or d.store.datastore.name == datastore]
        revision = self._revision(resume_token)
        if not revision:
            # A snapshot of half a datastore would tell that the other half is gone.
            self._wait_complete(discoveries, wanted)
        told: dict[str, object] = {}
        first = True
        missing: set[str] = set()  # the datastores that were incomplete in the last snapshot
        while wanted():
            if self._ended.is_set():
                raise SidecarUnavailable("the sidecar is shutting down; watch again when it is back")
            incomplete = {d.store.datastore.name for d in discoveries if not d.complete}
            # What vanished from them while there was no sidecar can be told by another snapshot only.
            again = not missing <= incomplete
            changes = self._catalog.changes_since(0 if again else revision, datastore)
            seen = {d.store.datastore.name: _seen(d) for d in discoveries}
            changed = [d for d in discoveries if told.get(d.store.datastore.name) != seen[d.store.datastore.name]]
            everything = changes.everything and (first or again or bool(revision))
            if everything:
                missing = incomplete
            if first or changed or changes.images or changes.removed or everything:
                # Who has no whole snapshot yet must not go on from here: it would never get one.
                token = "" if missing else f"{self._life}:{changes.revision}"
                # Whoever takes a snapshot for all there is needs all datastores with it.
                about = discoveries if first or everything else changed
                yield WatchEvent(changes.images, changes.removed, everything, token, about, sorted(missing))
            first, told = False, seen
            revision = changes.revision
            self._catalog.wait(revision, LOOK_SECONDS, lambda: self._ended.is_set() or not wanted())

    def _revision(self, resume_token: str) -> int:
        life, _, revision = resume_token.partition(":")
        # None of ours is longer, and Python refuses to read thousands of digits.
        known = life == self._life and len(revision) <= _REVISION_DIGITS and revision.isascii() and revision.isdecimal()
        return int(revision) if known else 0

    def _wait_complete(self, discoveries: list[Discovery], wanted: Callable[[], bool]) -> None:
        until = time.monotonic() + FIRST_SCAN_SECONDS
        for discovery in discoveries:
            while wanted() and not self._ended.is_set() and time.monotonic() < until:
                if discovery.wait_first_scan(0.1):
                    break


def _seen(discovery: Discovery) -> object:
    """What of a datastore's status is news."""
    status = discovery.status
    return status.capacity, status.fault, discovery.image_count
