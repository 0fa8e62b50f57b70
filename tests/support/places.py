"""Datastores as they are on the disk, by the written rules of the layouts and not by the sidecar's code."""

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.disks import pseudo_random

KIB, MIB = 1 << 10, 1 << 20
TIMESTAMP = "image_timestamp.txt"
RENAMED = "image_timestamp.txt.renamed"
TOMBSTONE = "image_tombstone.txt"
MARKER = "unused_image_marker.txt"
LAYOUTS = {"one": "compound", "two": "sharded", "three": "vsan"}

# What a layout keeps for all images: there or not, and empty.
_SHARED = {"compound": {"deleted_images"}, "sharded": {"deleted_images", "tmp_images", "images"}, "vsan": set[str]()}


def flat_files(image_id: str, *more: str) -> set[str]:
    """The files of a valid image with a flat disk."""
    return {f"{image_id}.vmdk", f"{image_id}-flat.vmdk", TIMESTAMP, *more}


@dataclass(frozen=True, slots=True)
class Place:
    """A datastore's root and its layout."""

    name: str
    layout: str
    root: Path

    def directory(self, image_id: str) -> Path:
        if self.layout == "sharded":
            return self.root / "images" / image_id[:2] / image_id
        return self.root / f"image_{image_id}"

    def file(self, image_id: str, name: str) -> Path:
        return self.directory(image_id) / name

    def descriptor(self, image_id: str) -> Path:
        return self.file(image_id, f"{image_id}.vmdk")

    def lock_file(self, image_id: str) -> Path:
        if self.layout == "vsan":
            return self.file(image_id, "lock.ec_lock")
        directory = self.directory(image_id)
        return directory.with_name(f"{directory.name}.ec_lock")

    def staging_directories(self) -> list[Path]:
        pattern = {"compound": "tmp_image_*", "sharded": "tmp_images/*", "vsan": "image_*/tmp_image_*"}[self.layout]
        return [path for path in self.root.glob(pattern) if path.is_dir() and not path.name.endswith(".ec_lock")]

    def complete_staging_directories(self) -> list[Path]:
        """Those that only wait to be published."""
        return [path for path in self.staging_directories() if (path / TIMESTAMP).exists()]

    def contents(self) -> set[str]:
        """Every path below the root, but for the directories that stay."""
        found = set()
        for directory, subdirectories, files in os.walk(self.root):  # never minds what vanishes meanwhile
            parent = os.path.relpath(directory, self.root)
            for name in subdirectories + files:
                relative = os.path.normpath(f"{parent}/{name}")
                is_shard = self.layout == "sharded" and parent == "images" and len(name) <= 2
                if relative not in _SHARED[self.layout] and not (is_shard and name in subdirectories):
                    found.add(relative)
        return found

    def expected(self, images: Mapping[str, Iterable[str]]) -> set[str]:
        paths = {self.directory(image_id) for image_id in images}
        paths |= {self.file(image_id, name) for image_id, names in images.items() for name in names}
        return {str(path.relative_to(self.root)) for path in paths}

    def assert_holds(self, images: Mapping[str, Iterable[str]]) -> None:
        """Exactly these files of these images, and no lock, staging directory, trash or anything else."""
        assert self.contents() == self.expected(images)

    def holds(self, images: Mapping[str, Iterable[str]]) -> bool:
        return self.contents() == self.expected(images)

    def leftovers(self) -> set[str]:
        """What is neither a file of an image nor stays: locks, staging directories, trash, temporary files."""
        pattern = "images/*/*" if self.layout == "sharded" else "image_*"
        directories = [path for path in self.root.glob(pattern) if path.is_dir()]
        images = {
            directory.name if self.layout == "sharded" else directory.name.removeprefix("image_"): [
                path.name for path in directory.iterdir() if not is_passing(path.name)
            ]
            for directory in directories
        }
        return self.contents() - self.expected({image_id: names for image_id, names in images.items() if names})

    def snapshot(self) -> dict[str, tuple[int, int, int, bytes]]:
        """Every file with inode, size, mtime and content: equal only when nothing was changed."""
        found = {}
        for relative in sorted(self.contents()):
            path = self.root / relative
            status = path.lstat()
            is_plain = stat.S_ISREG(status.st_mode)
            modified = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            found[relative] = (status.st_ino, size, modified, path.read_bytes() if is_plain else b"")
        return found

    def clear(self) -> None:
        """Takes everything away by hand."""
        for directory in (self.root, self.root / "images", self.root / "deleted_images", self.root / "tmp_images"):
            for path in directory.iterdir() if directory.is_dir() else ():
                if str(path.relative_to(self.root)) not in _SHARED[self.layout]:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def plant(
        self,
        image_id: str,
        *,
        size: int = 2 * MIB,
        data: Sequence[tuple[int, int]] = ((0, 64 * KIB), (1 * MIB, 64 * KIB)),
        companions: Mapping[str, bytes] | None = None,
        timestamp: bool = True,
        seed: int = 1,
    ) -> Path:
        """Writes an image with a flat disk, as other programs that know the format do; returns its descriptor."""
        directory = self.directory(image_id)
        directory.mkdir(parents=True)
        write_flat_disk(directory, image_id, size=size, data=data, seed=seed)
        for name, content in (companions or {}).items():
            (directory / name).write_bytes(content)
        if timestamp:
            (directory / TIMESTAMP).touch()
        return self.descriptor(image_id)

    @contextlib.contextmanager
    def locked(self, image_id: str) -> Iterator[None]:
        """Holds the lock of an image, as another process of this project, or the origin, would."""
        path = self.lock_file(image_id)
        made = [directory for directory in (path.parent, *path.parent.parents) if not directory.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                if self.layout == "vsan":
                    for directory in made:
                        with contextlib.suppress(OSError):
                            directory.rmdir()


def is_passing(name: str) -> bool:
    """Whether a name in an image's directory must be gone when nothing runs."""
    staging = name.startswith("tmp_image_") and "." not in name
    return name.endswith((".ec_lock", ".renaming")) or name.startswith(".") or staging


def flat_descriptor(extent: str, size: int) -> str:
    return (
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        'createType="monolithicFlat"\n\n# Extent description\n'
        f'RW {size // 512} FLAT "{extent}" 0\n\n# The Disk Data Base\n#DDB\n\n'
        'ddb.virtualHWVersion = "4"\nddb.geometry.cylinders = "4"\nddb.geometry.heads = "16"\n'
        'ddb.geometry.sectors = "63"\nddb.adapterType = "lsilogic"\n'
    )


def write_flat_disk(
    directory: Path,
    stem: str,
    *,
    size: int = 2 * MIB,
    data: Sequence[tuple[int, int]] = ((0, 64 * KIB), (1 * MIB, 64 * KIB)),
    seed: int = 1,
) -> None:
    """`<stem>.vmdk` and `<stem>-flat.vmdk` with bytes in the (offset, length) ranges of `data`, holes elsewhere."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{stem}-flat.vmdk").open("wb") as file:
        for offset, length in data:
            os.pwrite(file.fileno(), pseudo_random(length, seed + offset), offset)
        file.truncate(size)
    (directory / f"{stem}.vmdk").write_text(flat_descriptor(f"{stem}-flat.vmdk", size))
