"""Copying an image, within a datastore or to another one, of another layout too."""

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from sidecar.datastores.interface import Datastore, DiskCopier, ReadableFile
from sidecar.errors import (
    DiskFileFault,
    ImageIncomplete,
    ImagesError,
    InvalidDisk,
    InvalidRequest,
)
from sidecar.images import vmdk
from sidecar.images.image import FileKind, Image, ImageFile, reader_of
from sidecar.images.names import descriptor_name, is_reserved, renamed_companion
from sidecar.images.progress import Progress
from sidecar.images.publishing import publish
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore

# For what a server has written to come into sight of this host.
_APPEARING_SECONDS = 5.0
_LOOK_SECONDS = 0.1


class OpenImage:
    """A valid image with all its files open, so that nobody can purge it until it is closed."""

    def __init__(self, store: ImageStore, image_id: str) -> None:
        """Opens and locks the files, and judges the image then; ImageTombstoned, ImageIncomplete, ImageNotFound."""
        self.store = store
        self.files: dict[str, ReadableFile] = {}
        before = store.read_valid(image_id)
        try:
            for file in before.files:
                self._open(before, file)
            self.image = store.read_valid(image_id)
            if not _are_same(self.image, before):
                raise ImageIncomplete(f"{self.image.key} was replaced while it was opened; try again")
            self.disk = self._read_disk()
        except BaseException:
            self.close()
            raise

    def _open(self, image: Image, file: ImageFile) -> None:
        try:
            self.files[file.name] = self.store.datastore.open_readable(image.path(file.name))
        except FileNotFoundError:
            raise ImageIncomplete(f"{image.key}: {file.name} vanished while it was opened; try again") from None

    def _read_disk(self) -> vmdk.Disk:
        try:
            disk = vmdk.check_disk(descriptor_name(self.image.key.image_id), self)
            vmdk.require_standalone(disk.descriptor)
            return disk
        except InvalidDisk as error:
            raise ImageIncomplete(f"{self.image.key} is not whole: {error.message}") from error

    def size(self, name: str) -> int:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name].size

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self.files[name].read(offset, length)

    def require_same(self) -> None:
        """FileChanged when what was read of the disk may be of another image: where open files are known to this
        process alone, another host may have purged the image, and made a new one. Nobody changes a disk in place."""
        for name in self.disk.file_names:
            self.files[name].require_same()

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _are_same(image: Image, other: Image) -> bool:
    """Whether they have the same files: not every datastore has inodes."""

    def identities(image: Image) -> list[tuple[str, int, int, int]]:
        return [(file.name, file.inode, file.modified_ns, file.size) for file in image.files]

    return identities(image) == identities(other)


def copy_image(
    source: ImageStore,
    source_id: str,
    destination: ImageStore,
    destination_id: str,
    progress: Progress,
    *,
    lock_timeout: float | None = None,
) -> Image:
    """Copies an image; the destination is published complete or not at all. Returns it.

    Cancelled by `progress` at any point before it is published. ImageAlreadyExists, NoSpace, ImageTombstoned,
    ImageIncomplete, LockTimeout, OperationCancelled, or what the datastores say.
    """
    destination.require_absent(destination_id)
    with OpenImage(source, source_id) as opened:
        require_space_for_copy(opened, destination)
        with StagingDirectory(destination, destination_id, f"copy {opened.image.key} to") as staging:
            clone_files(opened, staging, progress, disk_only=False)
            return publish(staging, progress.check, lock_timeout=lock_timeout)


def require_space_for_copy(opened: OpenImage, destination: ImageStore) -> None:
    """NoSpace when the destination cannot hold what a copy would write: nothing where extents are shared."""
    if destination.datastore.shares_extents_with(opened.store.datastore):
        return
    copier = _disk_copier(opened, destination)
    fills_holes = destination.datastore.fills_holes if copier is None else copier.may_preallocate()
    image = opened.image
    destination.require_space(max(image.allocated, image.size) if fills_holes else image.allocated)


def _disk_copier(opened: OpenImage, destination: ImageStore) -> DiskCopier | None:
    if not opened.disk.is_as_esx_makes_them:
        return None
    return destination.datastore.disk_copier(opened.store.datastore)


def clone_files(opened: OpenImage, staging: StagingDirectory, progress: Progress, *, disk_only: bool) -> None:
    """Copies an image's files into a staging directory, named for its image, and so named by the descriptor too."""
    files = [file for file in opened.image.files if file.kind is not FileKind.COMPANION or not disk_only]
    renames = _new_names(opened, files, staging.image_id)
    progress.expect(sum(file.size for file in files))
    disk = opened.disk
    copier = _disk_copier(opened, staging.store)
    if copier is not None:
        try:
            _copy_whole_disk(copier, opened, staging, renames, progress)
        except DiskFileFault:
            opened.require_same()  # or that is why
            raise
        files = [file for file in files if file.name not in disk.file_names]
    for file in files:
        _clone_file(opened, file.name, staging, renames[file.name], progress)
    if copier is None:
        raw = opened.read(disk.name, disk.descriptor_offset, disk.descriptor_length)
        rewrite_staged_descriptor(staging, disk, renames, raw)
    opened.require_same()


def _new_names(opened: OpenImage, files: Iterable[ImageFile], image_id: str) -> dict[str, str]:
    """New name by old name; InvalidRequest when a companion file would get a name that is another file's."""
    renames = vmdk.renamed_files(opened.disk, image_id)
    taken = set(renames.values())
    for file in files:
        if file.name in renames:
            continue
        name = renamed_companion(file.name, opened.image.key.image_id, image_id)
        if name in taken or is_reserved(name):
            raise InvalidRequest(
                f"{opened.image.key}: in the image {image_id}, {file.name} would be called {name}, as another file is; "
                "choose another image id"
            )
        renames[file.name] = name
        taken.add(name)
    return renames


def _clone_file(opened: OpenImage, name: str, staging: StagingDirectory, new_name: str, progress: Progress) -> None:
    source = opened.files[name]
    target = staging.open_writable(new_name)
    try:
        target.resize(0)
        done = target.clone(source, 0, 0, source.size, progress)
        if done != source.size:
            raise DiskFileFault(
                f"{opened.image.key}: {name} ended after {done} of {source.size} bytes; validate the image"
            )
        staging.sync_written(target)
    finally:
        target.close()


def _copy_whole_disk(
    copier: DiskCopier, opened: OpenImage, staging: StagingDirectory, renames: dict[str, str], progress: Progress
) -> None:
    """Has the disk copied, and checks what came of it: DiskFileFault when it is not a whole disk of the same size."""
    disk, datastore = opened.disk, staging.store.datastore
    new_names = [renames[name] for name in disk.file_names]
    size = sum(opened.files[name].size for name in disk.file_names)
    try:
        source_path, path = opened.image.path(disk.name), staging.path(new_names[0])
        copier.copy(source_path, path, size, disk.descriptor.adapter_type, progress)
    except ImagesError as error:
        if copier.begun:
            # Whoever copies may go on with it, into whatever is staged there then.
            staging.damage = staging.damage or error
        raise
    try:
        for name in new_names:
            _wait_until_there(datastore, staging.path(name), progress)
        raw = datastore.read_file(staging.path(new_names[0]), vmdk.MAX_DESCRIPTOR_BYTES + 1)
        rewrite_staged_descriptor(staging, disk, renames, raw)
        # Each by its name: a listing by an NFS client may be older than what others made.
        sizes = {name: datastore.entry(staging.path(name)).size for name in new_names}
        copied = vmdk.check_disk(new_names[0], reader_of(datastore, staging.directory, sizes))
        vmdk.require_standalone(copied.descriptor)
    except (FileNotFoundError, InvalidDisk) as error:
        raise DiskFileFault(
            f"{opened.image.key}: its disk was copied to {staging.path(new_names[0])}, and is not whole there: "
            f"{error}; look at the space on the datastore, and at the log of its server"
        ) from error
    if copied.capacity_bytes != disk.capacity_bytes:
        raise DiskFileFault(
            f"{opened.image.key}: its disk has {disk.capacity_bytes} bytes, and the copy {copied.capacity_bytes}; "
            "look at the log of the datastore's server"
        )


def _wait_until_there(datastore: Datastore, path: str, progress: Progress) -> None:
    """Until a file that others made can be seen here; FileNotFoundError when that takes too long."""
    until = time.monotonic() + _APPEARING_SECONDS
    while True:
        try:
            datastore.entry(path)
            return
        except FileNotFoundError:
            if time.monotonic() > until:
                raise
        progress.check()
        time.sleep(_LOOK_SECONDS)


def rewrite_staged_descriptor(staging: StagingDirectory, disk: vmdk.Disk, renames: dict[str, str], raw: bytes) -> None:
    """Writes the descriptor `raw`, with the new names of its extents, into the staged disk under its new name."""
    new_name = renames[disk.name]
    content = vmdk.rewrite_embedded(raw, new_name) if disk.embedded else vmdk.rewrite_descriptor(raw, renames)
    if content != raw:
        put_staged_descriptor(staging, disk, new_name, content)


def put_staged_descriptor(staging: StagingDirectory, disk: vmdk.Disk, name: str, content: bytes) -> None:
    """Writes the text of a descriptor to where the staged file `name` has it."""
    target = staging.open_writable(name)
    try:
        target.write(disk.descriptor_offset, content)
        if not disk.embedded:
            target.resize(len(content))
        staging.sync_written(target)
    finally:
        target.close()
