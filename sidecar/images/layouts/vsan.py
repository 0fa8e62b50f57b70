"""The layout for VSAN, where a directory is an object of its own that cannot be renamed into another one.

Images are published and removed entry by entry. What makes an image valid comes last and goes first: after a crash
in between there is an incomplete image, which nobody uses and the next publish or purge clears away.
"""

import contextlib
from collections.abc import Callable, Iterable

from sidecar.datastores.interface import Datastore
from sidecar.errors import DatastoreUnavailable, InvalidRequest, NoSpace
from sidecar.images.layouts.interface import StagingPlace
from sidecar.images.layouts.renaming import move_back, prefixed_image_id, prefixed_vm_directories
from sidecar.images.names import (
    LOCK_SUFFIX,
    STAGING_PREFIX,
    TIMESTAMP,
    TOMBSTONE,
    descriptor_name,
    is_bookkeeping,
    is_lock_or_staging,
    is_temporary,
)
from sidecar.images.vmdk_descriptor import MAX_DESCRIPTOR_BYTES, without_deletable

_LOCK = f"lock{LOCK_SUFFIX}"


class VsanLayout:
    """The third version on VSAN: staging inside the image's directory, entries moved one by one."""

    id = "vsan"
    names_only = True

    def prepare(self, datastore: Datastore) -> None:
        """Nothing is shared."""

    def image_directory(self, image_id: str) -> str:
        return f"image_{image_id}"

    def image_lock(self, image_id: str) -> str:
        return f"{self.image_directory(image_id)}/{_LOCK}"

    def collections(self, datastore: Datastore) -> list[str]:
        return [""]

    def collection_parent(self) -> str | None:
        return None

    def image_id(self, collection: str, name: str) -> str | None:
        return prefixed_image_id(name)

    def vm_directories(self, datastore: Datastore) -> list[str]:
        return prefixed_vm_directories(datastore)

    def make_lockable(self, datastore: Datastore, image_id: str) -> None:
        with contextlib.suppress(FileExistsError):
            datastore.make_directory(self.image_directory(image_id))

    def staging_place(self, image_id: str, token: str) -> StagingPlace:
        directory = f"{self.image_directory(image_id)}/{STAGING_PREFIX}{token}"
        return StagingPlace(directory, f"{directory}/{_LOCK}")

    def staging_places(self, datastore: Datastore) -> list[StagingPlace]:
        places = []
        for name in sorted(datastore.names("")):
            image_id = prefixed_image_id(name)
            if image_id is None:
                continue
            # Gone meanwhile; or a file or a link, which is no image's directory.
            with contextlib.suppress(FileNotFoundError, InvalidRequest):
                for inner in sorted(datastore.names(name)):
                    if inner.startswith(STAGING_PREFIX) and "." not in inner:
                        directory = f"{name}/{inner}"
                        places.append(StagingPlace(directory, f"{directory}/{_LOCK}", image_id))
        return places

    def trash(self, datastore: Datastore) -> list[str]:
        """Nothing is put aside there."""
        return []

    def publish(self, datastore: Datastore, staging: StagingPlace, image_id: str) -> None:
        destination = self.image_directory(image_id)
        if any(not (is_lock_or_staging(name) or is_temporary(name)) for name in datastore.names(destination)):
            raise FileExistsError(destination)
        descriptor, moved = descriptor_name(image_id), list[str]()
        may_be_moved_later = False

        def left() -> list[str]:
            return sorted(name for name in datastore.names(staging.directory) if not is_lock_or_staging(name))

        def move(names: Iterable[str], how: Callable[[str, str], None] = datastore.rename) -> None:
            for name in names:
                how(f"{staging.directory}/{name}", f"{destination}/{name}")
                moved.append(name)

        try:
            names = left()
            disk = [name for name in names if name.endswith(".vmdk")]
            # The disk after its companions: whole and without a timestamp, it is taken for complete by a repair.
            move(name for name in names if name not in disk and name != TIMESTAMP)
            if set(disk) <= {descriptor, f"{image_id}-flat.vmdk"}:
                try:
                    move([descriptor], datastore.move_disk)
                except DatastoreUnavailable:
                    may_be_moved_later = True
                    raise
                stayed = left()
                moved += [name for name in disk if name != descriptor and name not in stayed]
            move(sorted(set(disk).difference(moved), key=lambda name: name == descriptor))
            datastore.sync_directory(destination)
            # After everything what makes the image valid.
            move([TIMESTAMP])
            datastore.sync_directory(destination)
        except BaseException:
            # Who is told that it failed must not find a valid image there, to be lost by the next power cut; nor a
            # whole one without its timestamp, which the next repair would take for durable.
            # A disk that its server may still move finds its companions there, for the same reason.
            for name in reversed(moved) if not may_be_moved_later else ():
                move_back(datastore, f"{destination}/{name}", f"{staging.directory}/{name}")
            raise

    def withdraw(self, datastore: Datastore, staging: StagingPlace, token: str) -> str | None:
        """What comes late is one entry, whose others were moved back, or all there; or the disk, to its companions."""
        return staging.directory

    def discard(self, datastore: Datastore, image_id: str, token: str) -> str | None:
        directory = self.image_directory(image_id)
        names = datastore.names(directory)
        # Without the first of them the image is not valid, without the other it can be neither restored nor repaired.
        # Durable before anything else goes: or, after a power cut, it might come back without its companion files.
        descriptor = descriptor_name(image_id)
        first = (TIMESTAMP, descriptor)
        datastore.remove_tree(f"{directory}/{TIMESTAMP}")
        if descriptor in names:
            _make_deletable(datastore, f"{directory}/{descriptor}")
            datastore.remove_disk(f"{directory}/{descriptor}")
        datastore.sync_directory(directory)
        for name in sorted(names, key=_removal_rank):
            if name not in first and not is_lock_or_staging(name):
                datastore.remove_tree(f"{directory}/{name}")
        datastore.sync_directory(directory)
        return None

    def tidy(self, datastore: Datastore, image_id: str) -> None:
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            datastore.remove_directory(self.image_directory(image_id))


def _make_deletable(datastore: Datastore, descriptor: str) -> None:
    """Takes the mark out of a descriptor by which a server refuses to remove the disk."""
    # Gone, or no file; or a full datastore, which is to get room by this: then it is tried with the mark.
    with contextlib.suppress(FileNotFoundError, InvalidRequest, NoSpace):
        raw = datastore.read_file(descriptor, MAX_DESCRIPTOR_BYTES)
        if (without := without_deletable(raw)) != raw:
            datastore.write_file(descriptor, without)


def _removal_rank(name: str) -> int:
    if name == TOMBSTONE:
        return 3
    return 2 if is_bookkeeping(name) else 1
