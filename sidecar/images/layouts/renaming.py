"""The layouts whose images come and go by renaming their directory: `compound` and `sharded`."""

import contextlib
import logging

from sidecar.datastores.interface import Datastore, EntryKind
from sidecar.errors import ImagesError
from sidecar.images.layouts.interface import StagingPlace
from sidecar.images.names import LOCK_SUFFIX, STAGING_PREFIX, VM_PREFIX, is_image_id

TRASH = "deleted_images"
STAGING = "tmp_images"

_log = logging.getLogger(__name__)


def parent(path: str) -> str:
    return path.rpartition("/")[0]


class RenamingLayout:
    """What the two share: publish and discard are one rename each."""

    names_only = False

    def image_directory(self, image_id: str) -> str:
        raise NotImplementedError

    def prepare(self, datastore: Datastore) -> None:
        _make(datastore, TRASH)

    def image_lock(self, image_id: str) -> str:
        return self.image_directory(image_id) + LOCK_SUFFIX

    def make_lockable(self, datastore: Datastore, image_id: str) -> None:
        if directory := parent(self.image_directory(image_id)):
            _make(datastore, directory)

    def staging_places(self, datastore: Datastore) -> list[StagingPlace]:
        raise NotImplementedError

    def trash(self, datastore: Datastore) -> list[str]:
        return [f"{TRASH}/{name}" for name in sorted(_names(datastore, TRASH))]

    def publish(self, datastore: Datastore, staging: StagingPlace, image_id: str) -> None:
        destination = self.image_directory(image_id)
        datastore.rename(staging.directory, destination)
        try:
            datastore.sync_directory(parent(destination))
            if parent(staging.directory) != parent(destination):
                datastore.sync_directory(parent(staging.directory))
        except BaseException:
            # Who is told that it failed must not find the image there, to be lost by the next power cut.
            move_back(datastore, destination, staging.directory)
            raise

    def withdraw(self, datastore: Datastore, staging: StagingPlace, token: str) -> str | None:
        _make(datastore, TRASH)
        trash = f"{TRASH}/{token}"
        try:
            datastore.rename(staging.directory, trash)
        except FileNotFoundError:
            return None
        return trash

    def discard(self, datastore: Datastore, image_id: str, token: str) -> str | None:
        _make(datastore, TRASH)
        directory = self.image_directory(image_id)
        trash = f"{TRASH}/{token}"
        datastore.rename(directory, trash)
        # Not taken back when a sync fails: a reaper, of whatever host, may have begun to free it.
        # The trash first: after a crash between the two, the directory is in both places or in one, never in none.
        datastore.sync_directory(TRASH)
        datastore.sync_directory(parent(directory))
        return trash

    def tidy(self, datastore: Datastore, image_id: str) -> None:
        """A directory that was renamed leaves nothing behind."""


class CompoundLayout(RenamingLayout):
    """The third version: `image_<id>/` in the root."""

    id = "compound"

    def image_directory(self, image_id: str) -> str:
        return f"image_{image_id}"

    def collections(self, datastore: Datastore) -> list[str]:
        return [""]

    def collection_parent(self) -> str | None:
        return None

    def image_id(self, collection: str, name: str) -> str | None:
        return prefixed_image_id(name)

    def vm_directories(self, datastore: Datastore) -> list[str]:
        return prefixed_vm_directories(datastore)

    def staging_place(self, image_id: str, token: str) -> StagingPlace:
        directory = f"{STAGING_PREFIX}{token}"
        return StagingPlace(directory, directory + LOCK_SUFFIX)

    def staging_places(self, datastore: Datastore) -> list[StagingPlace]:
        names = {name.removesuffix(LOCK_SUFFIX) for name in datastore.names("")}
        return [StagingPlace(name, name + LOCK_SUFFIX) for name in sorted(names) if name.startswith(STAGING_PREFIX)]


class ShardedLayout(RenamingLayout):
    """The first and second version: `images/<first 2 characters>/<id>/`."""

    id = "sharded"

    def prepare(self, datastore: Datastore) -> None:
        super().prepare(datastore)
        for directory in ("images", STAGING):
            _make(datastore, directory)

    def image_directory(self, image_id: str) -> str:
        return f"images/{image_id[:2]}/{image_id}"

    def collections(self, datastore: Datastore) -> list[str]:
        return [f"images/{shard}" for shard in datastore.names("images") if len(shard) <= 2]

    def collection_parent(self) -> str | None:
        return "images"

    def image_id(self, collection: str, name: str) -> str | None:
        return name if name[:2] == collection.rpartition("/")[2] and is_image_id(name) else None

    def vm_directories(self, datastore: Datastore) -> list[str]:
        found = []
        shards: list[str] = []
        with contextlib.suppress(FileNotFoundError):  # no VM was made yet
            shards = datastore.names("vms")
        for shard in shards:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                if datastore.entry(f"vms/{shard}").kind is not EntryKind.FILE:
                    found += [f"vms/{shard}/{name}" for name in datastore.names(f"vms/{shard}")]
        return found

    def staging_place(self, image_id: str, token: str) -> StagingPlace:
        directory = f"{STAGING}/{token}"
        return StagingPlace(directory, directory + LOCK_SUFFIX)

    def staging_places(self, datastore: Datastore) -> list[StagingPlace]:
        names = {name.removesuffix(LOCK_SUFFIX) for name in _names(datastore, STAGING)}
        return [StagingPlace(f"{STAGING}/{name}", f"{STAGING}/{name}{LOCK_SUFFIX}") for name in sorted(names)]


def move_back(datastore: Datastore, source: str, destination: str) -> None:
    """Undoes a rename after an error, which says more than what this meets: that is logged."""
    try:
        datastore.rename(source, destination)
    except (ImagesError, OSError) as error:
        _log.warning("not moved back datastore=%s path=%s to=%s error=%s", datastore.name, source, destination, error)


def prefixed_image_id(name: str) -> str | None:
    """The id in a name of the form `image_<id>`."""
    image_id = name.removeprefix("image_")
    return image_id if image_id != name and is_image_id(image_id) else None


def prefixed_vm_directories(datastore: Datastore) -> list[str]:
    """The names in the root of the form `vm_<id>`."""
    return [name for name in datastore.names("") if name.startswith(VM_PREFIX) and name != VM_PREFIX]


def _make(datastore: Datastore, directory: str) -> None:
    with contextlib.suppress(FileExistsError):
        datastore.make_directory(directory, parents=True)


def _names(datastore: Datastore, directory: str) -> list[str]:
    """None where the directory was not made yet."""
    try:
        return datastore.names(directory)
    except FileNotFoundError:
        return []
