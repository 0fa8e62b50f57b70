"""Commit: a staging directory that somebody else filled becomes an image, once it is shown to hold a whole disk."""

import logging
from collections.abc import Callable

from sidecar.datastores.interface import EntryKind
from sidecar.errors import InvalidDisk
from sidecar.images import vmdk
from sidecar.images.copying import put_staged_descriptor, rewrite_staged_descriptor
from sidecar.images.image import DirectoryReader, Image, reader_of
from sidecar.images.metadata import MAX_METADATA_BYTES, has_meaning, parse_metadata
from sidecar.images.names import LOCK_SUFFIX, TIMESTAMP, is_bookkeeping, is_reserved, renamed_companion
from sidecar.images.publishing import publish
from sidecar.images.staging import StagingDirectory

_MOST_DESCRIPTORS = 4  # looked at to find the one of the disk: those of extents are refused in any case

_log = logging.getLogger(__name__)


class StagedDisk:
    """What a check of a staging directory found: the disk, and what each file will be called."""

    def __init__(self, staging: StagingDirectory) -> None:
        """Checks everything and changes nothing; InvalidDisk and InvalidMetadata say what is not yet, or wrong."""
        sizes = _plain_files(staging)
        self.reader = reader_of(staging.store.datastore, staging.directory, sizes)
        self.disk = _find_disk(self.reader, sizes)
        vmdk.require_standalone(self.disk.descriptor)
        self.renames = vmdk.renamed_files(self.disk, staging.image_id)
        stem = self.disk.name.removesuffix(".vmdk")
        for name in sizes:
            if name not in self.renames:
                self.renames[name] = _companion(staging, name, stem)
        if len(set(self.renames.values())) != len(self.renames):
            raise InvalidDisk(f"{staging.image_id}: two staged files would get the same name: {sorted(self.renames)}")


def commit(
    staging: StagingDirectory,
    staged: StagedDisk,
    check: Callable[[], None] = lambda: None,
    *,
    lock_timeout: float | None = None,
) -> Image:
    """Gives the files the image's names and publishes. Until the last moment, what `check` raises ends it.

    After an error before the files are moved into the image's place the staging directory is as it was, and can be
    committed again unless it has `damage`; after one while they are moved it is gone.
    """
    staging.store.datastore.require_in_place()
    staging.require_space()  # before anything is sent: what does not fit can be dropped, or tried again
    disk = staged.disk
    raw = staged.reader.read(disk.name, disk.descriptor_offset, disk.descriptor_length)
    renamed: list[tuple[str, str]] = []
    rewriting = False
    try:
        for old, new in _rename_steps(staged.renames):
            staging.store.datastore.rename(staging.path(old), staging.path(new))
            renamed.append((old, new))
        rewriting = True
        rewrite_staged_descriptor(staging, disk, staged.renames, raw)
        return publish(staging, check, lock_timeout=lock_timeout)
    except BaseException:
        if staging.held and staging.damage is None:
            _undo(staging, staged, renamed, raw if rewriting else None)
        raise


def _undo(staging: StagingDirectory, staged: StagedDisk, renamed: list[tuple[str, str]], raw: bytes | None) -> None:
    """Gives the files their old names, by which their maker knows them, and the descriptor its text."""
    try:
        if raw is not None:
            put_staged_descriptor(staging, staged.disk, staged.renames[staged.disk.name], raw)
        for old, new in reversed(renamed):
            staging.store.datastore.rename(staging.path(new), staging.path(old))
    except Exception as error:
        # A disk with all of its files renamed can be committed again, too.
        _log.warning("staged files not renamed back directory=%s error=%s", staging.directory, error)


def _plain_files(staging: StagingDirectory) -> dict[str, int]:
    """The sizes of the staged files by name; InvalidDisk for anything that cannot be in an image."""
    sizes = {}
    for entry in staging.store.datastore.entries(staging.directory):
        if entry.name.endswith(LOCK_SUFFIX):
            continue
        ours = entry.name == TIMESTAMP
        if entry.kind is not EntryKind.FILE or not (ours or _can_be_published(entry.name)):
            raise InvalidDisk(
                f"{entry.name!r} cannot be part of an image: only plain files, with names in UTF-8 and no dot first"
            )
        if entry.links > 1:
            # By that name an image could be changed, which is never done; and its descriptor is rewritten here.
            raise InvalidDisk(f"{entry.name!r} has another name, a hard link: copy the file instead")
        if ours:
            continue
        sizes[entry.name] = entry.size
    return sizes


def _can_be_published(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return not is_bookkeeping(name)


def _find_disk(reader: DirectoryReader, sizes: dict[str, int]) -> vmdk.Disk:
    """The one disk of the directory, checked whole. A file that is an extent of another is no disk of its own."""
    disks: list[str] = []
    extents: set[str] = set()
    faults = []
    for name in sorted(sizes):
        if not name.endswith(".vmdk"):
            continue
        try:
            disk = vmdk.read_disk(name, reader)
        except InvalidDisk as error:
            faults.append(error.message)
            continue
        # Not the disks: a descriptor of 1 MiB takes 20 MiB of memory when it is read.
        disks.append(name)
        extents.update(file.name for file in disk.files if file.name != name)
        if len(disks) > _MOST_DESCRIPTORS:
            raise InvalidDisk(f"more than one disk: {', '.join(disks)}, and maybe more; an image has one")
    tops = [name for name in disks if name not in extents]
    if not tops:
        for name in sorted(sizes):
            if (descriptor := vmdk.descriptor_of(name)) is not None and descriptor not in sizes:
                raise InvalidDisk(f"{name!r} is the data of a disk: its descriptor, {descriptor!r}, is missing")
        raise InvalidDisk("; ".join(faults[:3]) or "no VMDK descriptor among the files; a disk is named *.vmdk")
    if len(tops) > 1:
        raise InvalidDisk(f"more than one disk: {', '.join(tops)}; an image has one")
    try:
        return vmdk.check_disk(tops[0], reader)
    except FileNotFoundError as error:
        raise InvalidDisk(f"{error} vanished while the disk was checked") from None


def _companion(staging: StagingDirectory, name: str, stem: str) -> str:
    if name.endswith(".vmdk"):
        # Else a descriptor that was cut off at the end of a line would do, with an extent fewer.
        raise InvalidDisk(f"{name!r} is no part of the disk: no descriptor names it")
    new_name = renamed_companion(name, stem, staging.image_id)
    if is_reserved(new_name):
        raise InvalidDisk(f"{name!r} cannot be part of an image: the name is the sidecar's own")
    if has_meaning(new_name, staging.image_id):
        content = staging.store.datastore.read_file(staging.path(name), MAX_METADATA_BYTES + 1)
        parse_metadata(name, content)
    return new_name


def _rename_steps(renames: dict[str, str]) -> list[tuple[str, str]]:
    """By way of names that no file has, so that one file may take the name of another."""
    changes = [(old, f".{number}.renaming", new) for number, (old, new) in enumerate(renames.items()) if old != new]
    return [(old, between) for old, between, _ in changes] + [(between, new) for _, between, new in changes]
