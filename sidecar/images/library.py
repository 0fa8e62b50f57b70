"""All datastores of a sidecar together: what the services call, and what starts and ends with the process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from sidecar.errors import DatastoreNotFound
from sidecar.images.catalog import Catalog
from sidecar.images.copying import copy_image
from sidecar.images.discovery import Discovery
from sidecar.images.ending import end_all
from sidecar.images.holding import Holders
from sidecar.images.image import Image, ImageKey
from sidecar.images.maintenance import Maintenance
from sidecar.images.operations import Operation, Operations
from sidecar.images.progress import Progress
from sidecar.images.sessions import StagingSessions
from sidecar.images.store import ImageStore


class Library:
    """The datastores by name, the catalogue of their images, and the operations that run."""

    def __init__(
        self,
        discoveries: Sequence[Discovery],
        catalog: Catalog,
        *,
        max_copies: int,
        lease_seconds: float,
        maintained: Sequence[Maintenance] = (),
    ) -> None:
        self.catalog = catalog
        self.discoveries = {discovery.store.datastore.name: discovery for discovery in discoveries}
        self.maintained = {each.store.datastore.name: each for each in maintained}
        self.sessions = StagingSessions(lease_seconds)
        self.holders = Holders()
        self.copies: Operations[Image] = Operations(max_copies, "copy")
        self.clones: Operations[None] = Operations(max_copies, "clone")
        stores = [discovery.store for discovery in discoveries]
        for discovery in discoveries:
            discovery.store.share_host(stores)
            discovery.store.observe(discovery.note_change, discovery.note_use)
            discovery.store.admission.ask(discovery.silence, discovery.fault)

    def start(self) -> None:
        """Prepares the datastores, as far as they can be used now, and begins to read them."""
        for discovery in self.discoveries.values():
            discovery.start()
        for maintenance in self.maintained.values():
            maintenance.start()
        self.sessions.start(discovery.store for discovery in self.discoveries.values())

    def interrupt(self) -> None:
        """Ends every wait for a lock: the sidecar shuts down."""
        for discovery in self.discoveries.values():
            discovery.store.datastore.interrupt()

    def close(self) -> None:
        """Ends what runs, leaves nothing half made, joins every thread but those of looks at VMs that hang.

        Does not return while anything else hangs; what is of other datastores ends cleanly all the same.
        """
        discoveries = self.discoveries.values()
        maintained = self.maintained.values()
        end_all(
            (
                self.copies.close,
                self.clones.close,
                self.sessions.close,
                *(m.close for m in maintained),
                *(d.close for d in discoveries),
            )
        )
        # Not before: what still runs would change whatever has the number of a closed descriptor next. A look that was
        # left may read that, and nobody asks for what it finds.
        end_all((self.holders.close, *(d.store.datastore.close for d in discoveries)))

    def store(self, datastore: str) -> ImageStore:
        return self.discovery(datastore).store

    def discovery(self, datastore: str) -> Discovery:
        discovery = self.discoveries.get(datastore)
        if discovery is None:
            names = ", ".join(sorted(self.discoveries)) or "none"
            raise DatastoreNotFound(f"there is no datastore {datastore[:128]!r}; this sidecar has {names}")
        return discovery

    def maintenance(self, datastore: str) -> Maintenance:
        """Of a datastore; DatastoreNotFound."""
        return self.maintained[self.discovery(datastore).store.datastore.name]

    @contextmanager
    def using(
        self, datastore: str, wanted: Callable[[], bool], *, long: bool = False, looks: bool = False
    ) -> Iterator[ImageStore]:
        """The datastore's images for a call, a `long` one or a small one, while its caller wants it.

        DatastoreUnavailable when it seems to hang, or has a known fault, unless the call `looks` whether it has;
        TooManyCalls when too many wait for it.
        """
        admission = self.store(datastore).admission
        with admission.long_call(wanted) if long else admission.call(wanted, looks=looks):
            yield self.store(datastore)

    def start_copy(
        self, source: ImageKey, destination: ImageKey, request_id: str, *, lock_timeout: float | None = None
    ) -> Operation[Image]:
        """Starts a copy, or finds the one that this request id started."""
        from_store, to_store = self.store(source.datastore), self.store(destination.datastore)

        def work(progress: Progress) -> Image:
            return copy_image(
                from_store, source.image_id, to_store, destination.image_id, progress, lock_timeout=lock_timeout
            )

        return self.copies.start(
            request_id,
            f"copy {source} to {destination}",
            work,
            lambda: from_store.admission.copy_to(to_store.admission),
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
