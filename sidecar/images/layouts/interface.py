"""Where a datastore keeps its images, and how they come and go there."""

from dataclasses import dataclass
from typing import Protocol

from sidecar.datastores.interface import Datastore


@dataclass(frozen=True, slots=True)
class StagingPlace:
    """The paths of one staging directory."""

    directory: str
    lock: str
    image_id: str = ""  # of the image in whose directory it is, where there is one

    @property
    def locked_inside(self) -> bool:
        """The lock is in the directory."""
        return self.lock.startswith(f"{self.directory}/")


class Layout(Protocol):
    """One way to arrange images. Stateless; paths are relative to the datastore's root."""

    id: str
    names_only: bool
    """Attributes are slow to read there: list by names."""

    def prepare(self, datastore: Datastore) -> None:
        """Makes the directories that every image shares."""

    def image_directory(self, image_id: str) -> str: ...

    def image_lock(self, image_id: str) -> str: ...

    def collections(self, datastore: Datastore) -> list[str]:
        """The directories that hold image directories now."""

    def collection_parent(self) -> str | None:
        """The directory in which collections appear and vanish; None where there is one that stays."""

    def image_id(self, collection: str, name: str) -> str | None:
        """The id of the image that a name in a collection may be; None for what is no image's name."""

    def vm_directories(self, datastore: Datastore) -> list[str]:
        """What may be the directories of VMs now, by name alone; something else of such a name is among them."""

    def make_lockable(self, datastore: Datastore, image_id: str) -> None:
        """Makes what the lock of an image that is not there yet needs."""

    def staging_place(self, image_id: str, token: str) -> StagingPlace: ...

    def staging_places(self, datastore: Datastore) -> list[StagingPlace]:
        """Of all staging directories there are, in use or abandoned, and of their locks where only those are left."""

    def trash(self, datastore: Datastore) -> list[str]:
        """What was discarded and is not freed."""

    def publish(self, datastore: Datastore, staging: StagingPlace, image_id: str) -> None:
        """Turns a staging directory, durable already, into the image, durably. Call under the image's lock.

        FileExistsError when something is there; then, and after any error, there is no valid image that was not before,
        but for one that a server made, whole, without an answer. `withdraw` keeps it from doing so later.
        """

    def withdraw(self, datastore: Datastore, staging: StagingPlace, token: str) -> str | None:
        """After a publish that failed: what is to be removed of the staging directory, so that what becomes the image
        late, on a server that did not answer, is never a part of it. None when it is not there."""

    def discard(self, datastore: Datastore, image_id: str, token: str) -> str | None:
        """Takes the image's directory away. Call under the image's lock. Durable when it returns.

        After an error the image may be there, in part, or in the trash, where the reaper finds it: nothing is put back.
        Returns what is left to be freed, outside the lock, by `remove_tree`; None where all is freed already.
        Staging directories inside the image's directory stay.
        """

    def tidy(self, datastore: Datastore, image_id: str) -> None:
        """Removes the image's directory if nothing is left in it. Call without the image's lock."""
