"""A datastore as it lies on the disk, by the written rules of the layouts and none of the sidecar's code."""

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.content import BLOCK, NOTES, content_id_in, content_of, fault_in, named_extents, update_in

TIMESTAMP = "image_timestamp.txt"
RENAMED = "image_timestamp.txt.renamed"
TOMBSTONE = "image_tombstone.txt"
MARKER = "unused_image_marker.txt"
LOCK = ".ec_lock"
STAGING = "tmp_image_"

ABSENT, VALID, DELETED, WRECK, DELETED_WRECK = "absent", "valid", "deleted", "wreck", "deleted wreck"


@dataclass(slots=True)
class Found:
    """An image. `update`: the operation that wrote its metadata, None when it has none. `used`: when, in seconds."""

    status: str
    content: int | None = None
    update: int | None = None
    has_notes: bool = False
    used: float = 0.0
    faults: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # files that an image of that content does not have


@dataclass
class Reading:
    """Everything below a datastore's root. Paths are relative to it."""

    layout: str
    images: dict[str, Found] = field(default_factory=dict)
    staging: list[str] = field(default_factory=list)
    trash: list[str] = field(default_factory=list)
    locks: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)  # of the locks
    temporary: list[str] = field(default_factory=list)  # what was being written into an image
    strangers: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in _LISTS}
        images = {
            name: {key: getattr(found, key) for key in Found.__slots__} for name, found in sorted(self.images.items())
        }
        return {"layout": self.layout, "images": images, **fields}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Reading":
        images = {name: Found(**found) for name, found in fields["images"].items()}
        return cls(fields["layout"], images, **{name: fields[name] for name in _LISTS})


_LISTS = ("staging", "trash", "locks", "held", "temporary", "strangers")


def read_datastore(root: Path, layout: str) -> Reading:
    """While nobody changes it."""
    reading = Reading(layout)
    if layout == "sharded":
        _read_sharded(root, reading)
    else:
        for path in _children(root):
            if path.name == "lost+found":
                continue
            if path.name.endswith(LOCK):
                _read_lock(root, path, reading)
            elif path.name.startswith("image_") and path.is_dir():
                _read_image(root, path, path.name.removeprefix("image_"), reading)
            elif layout == "compound" and path.name.startswith(STAGING):
                reading.staging.append(path.name)
            elif layout == "compound" and path.name == "deleted_images":
                reading.trash += [f"deleted_images/{child.name}" for child in _children(path)]
            else:
                reading.strangers.append(path.name)
    return reading


def _read_sharded(root: Path, reading: Reading) -> None:
    for path in _children(root):
        if path.name == "images":
            for shard in _children(path):
                for child in _children(shard):
                    if child.name.endswith(LOCK):
                        _read_lock(root, child, reading)
                    elif child.name[:2] == shard.name and child.is_dir():
                        _read_image(root, child, child.name, reading)
                    else:
                        reading.strangers.append(str(child.relative_to(root)))
        elif path.name == "tmp_images":
            for child in _children(path):
                if child.name.endswith(LOCK):
                    _read_lock(root, child, reading)
                else:
                    reading.staging.append(str(child.relative_to(root)))
        elif path.name == "deleted_images":
            reading.trash += [f"deleted_images/{child.name}" for child in _children(path)]
        elif path.name != "lost+found":
            reading.strangers.append(path.name)


def _read_image(root: Path, directory: Path, image_id: str, reading: Reading) -> None:
    files: dict[str, Path] = {}
    for path in _children(directory):
        if path.name.endswith(LOCK):
            _read_lock(root, path, reading)
        elif reading.layout == "vsan" and path.name.startswith(STAGING) and "." not in path.name:
            reading.staging.append(str(path.relative_to(root)))
            for child in _children(path):
                if child.name.endswith(LOCK):
                    _read_lock(root, child, reading)
        elif path.name.startswith("."):
            reading.temporary.append(str(path.relative_to(root)))
        elif path.is_symlink() or not path.is_file():
            reading.strangers.append(str(path.relative_to(root)))
        else:
            files[path.name] = path
    if not files:
        # A directory of the layout vsan that holds a lock or a staging directory, or is all that is left.
        if reading.layout != "vsan":
            reading.images[image_id] = Found(WRECK, faults=["an empty directory"])
        return
    found = Found(WRECK)
    _read_disk(files, image_id, found)
    _read_companions(files, image_id, found)
    _read_foreign(files, image_id, found)
    if TIMESTAMP in files:
        found.used = files[TIMESTAMP].stat().st_mtime
    else:
        found.faults.append("no timestamp file")
    if TOMBSTONE in files:
        found.status = DELETED_WRECK if found.faults else DELETED
    elif TIMESTAMP in files and f"{image_id}.vmdk" in files:
        found.status = VALID
    reading.images[image_id] = found


def _read_disk(files: dict[str, Path], image_id: str, found: Found) -> None:
    descriptor = files.get(f"{image_id}.vmdk")
    if descriptor is None:
        found.faults.append("no descriptor")
        return
    text = descriptor.read_bytes()
    extents = named_extents(text)
    if not extents or extents[0][0] not in files:
        found.faults.append(f"the descriptor names {[name for name, _ in extents]}, there is {sorted(files)}")
        return
    with files[extents[0][0]].open("rb") as file:
        found.content = content_id_in(file.read(BLOCK))
    if found.content is None:
        found.faults.append("the first block says nothing of a content")
        return
    content = content_of(found.content)
    if extents != [
        (name, blocks * BLOCK) for name, blocks in zip(content.extent_names(image_id), content.extents, strict=True)
    ]:
        found.faults.append(f"content {content.id} has other extents than {extents}")
        return
    if text != content.descriptor(image_id):
        found.faults.append("the text of the descriptor is another one")
    first = 0
    for name, size in extents:
        if name not in files:
            found.faults.append(f"no extent {name}")
        elif (there := files[name].stat().st_size) != size:
            found.faults.append(f"{name} has {there} bytes, not {size}")
        elif fault := fault_in(files[name].read_bytes(), content, first):
            found.faults.append(f"{name}: {fault}")
        first += size // BLOCK


def _read_companions(files: dict[str, Path], image_id: str, found: Found) -> None:
    if metadata := files.get(f"{image_id}.ecv"):
        found.update = update_in(metadata.read_bytes())
        if found.update is None:
            found.faults.append("the metadata is not whole")
    if (notes := files.get(NOTES)) and found.content is not None:
        found.has_notes = True
        if notes.read_bytes() != content_of(found.content).notes():
            found.faults.append(f"the companion file {NOTES} is another content's, or not whole")


def _read_foreign(files: dict[str, Path], image_id: str, found: Found) -> None:
    known = {f"{image_id}.vmdk", f"{image_id}.ecv", NOTES, TIMESTAMP, RENAMED, TOMBSTONE, MARKER}
    if found.content is not None:
        known.update(content_of(found.content).extent_names(image_id))
        found.foreign = sorted(files.keys() - known)


def _read_lock(root: Path, path: Path, reading: Reading) -> None:
    relative = str(path.relative_to(root))
    reading.locks.append(relative)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        reading.held.append(relative)
    finally:
        os.close(fd)


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())
