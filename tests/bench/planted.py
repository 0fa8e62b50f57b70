"""Many images, as another program leaves them on a datastore: the extent all hole."""

import os
from pathlib import Path

from tests.bench.command import MIB
from tests.support.places import TIMESTAMP, flat_descriptor

FILES_SHOWN = 2  # of each image by the mount, which does not show the timestamp
FILES = 3
EXTENT_BYTES = MIB
PREFIX = "base-image-"


def plant(root: Path, count: int, files: int = FILES) -> None:
    """Makes `image_NAME` directories with so many files each, as fast as can be: as many as a large datastore has."""
    for number in range(count):
        image_id = f"{PREFIX}{number:06d}"
        directory = os.path.join(root, f"image_{image_id}")
        os.mkdir(directory)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _write(fd, f"{image_id}-flat.vmdk", b"", EXTENT_BYTES)
            _write(fd, f"{image_id}.vmdk", flat_descriptor(f"{image_id}-flat.vmdk", EXTENT_BYTES).encode(), 0)
            _write(fd, TIMESTAMP, b"", 0)
            for companion in range(files - FILES):
                _write(fd, f"{image_id}.{companion}.json", b"", 0)
        finally:
            os.close(fd)


def _write(directory: int, name: str, data: bytes, size: int) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory)
    try:
        if data:
            os.write(fd, data)
        if size:
            os.ftruncate(fd, size)
    finally:
        os.close(fd)
