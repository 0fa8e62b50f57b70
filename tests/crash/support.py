"""What the tests of dying and running out share: images written by hand, and a look at what is left on a datastore."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from sidecar.errors import ImagesError
from sidecar.pools import PREFIX

MIB = 1024 * 1024
LAYOUTS = ("compound", "sharded", "vsan")
TIMESTAMP = "image_timestamp.txt"

_DESCRIPTOR = """\
# Disk DescriptorFile
version=1
CID=9f2c1a44
parentCID=ffffffff
createType="monolithicFlat"

# Extent description
RW {sectors} FLAT "{image_id}-flat.vmdk" 0

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "{cylinders}"
ddb.geometry.heads = "16"
ddb.geometry.sectors = "63"
ddb.adapterType = "lsilogic"
ddb.deletable = "true"
"""


def image_directory(root: Path, layout: str, image_id: str) -> Path:
    return root / (f"images/{image_id[:2]}/{image_id}" if layout == "sharded" else f"image_{image_id}")


def image_lock(root: Path, layout: str, image_id: str) -> Path:
    directory = image_directory(root, layout, image_id)
    return directory / "lock.ec_lock" if layout == "vsan" else directory.with_name(f"{directory.name}.ec_lock")


def staging_place(layout: str, image_id: str, token: str) -> str:
    """Relative to the root."""
    return {
        "compound": f"tmp_image_{token}",
        "sharded": f"tmp_images/{token}",
        "vsan": f"image_{image_id}/tmp_image_{token}",
    }[layout]


def write_image(root: Path, layout: str, image_id: str, *, size: int = 1 * MIB, dense: bool = False) -> Path:
    """An image as another program would leave it there, in one rename; the path of its extent.

    `dense`: every byte of the disk is data, else none is.
    """
    directory = image_directory(root, layout, image_id)
    directory.parent.mkdir(parents=True, exist_ok=True)
    making = directory.with_name(f".making-{image_id}")
    making.mkdir()
    write_image_files(making, image_id, size=size, dense=dense)
    making.rename(directory)
    return directory / f"{image_id}-flat.vmdk"


@functools.cache
def _block() -> bytes:
    return hashlib.shake_256(b"image").digest(1 * MIB)


def write_image_files(directory: Path, image_id: str, *, size: int = 1 * MIB, dense: bool = False) -> None:
    with (directory / f"{image_id}-flat.vmdk").open("wb") as file:
        if dense:
            block = _block()
            for _ in range(size // MIB):
                file.write(block)
        file.truncate(size)
    text = _DESCRIPTOR.format(sectors=size // 512, cylinders=max(size // (512 * 16 * 63), 1), image_id=image_id)
    (directory / f"{image_id}.vmdk").write_text(text)
    (directory / TIMESTAMP).write_bytes(b"")


def staging_directories(root: Path) -> list[Path]:
    """Every staging directory of whatever layout."""
    places = (*root.glob("tmp_image_*"), *root.glob("image_*/tmp_image_*"), *root.glob("tmp_images/*"))
    return sorted(place for place in places if place.is_dir())


def lock_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.ec_lock"))


def trash(root: Path) -> list[Path]:
    return sorted(root.glob("deleted_images/*"))


def remains(root: Path, *keep: str) -> list[str]:
    """Everything below `root` but the images named in `keep` and the empty directories that a layout always has."""
    found = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if parts == ("lost+found",) or any(
            parts[0] == f"image_{image_id}" or parts[:3] == ("images", image_id[:2], image_id) for image_id in keep
        ):
            continue
        if path.is_dir() and parts[0] in ("images", "tmp_images", "deleted_images") and len(parts) < 2:
            continue
        if path.is_dir() and parts[0] == "images" and len(parts) == 2:
            continue
        found.append("/".join(parts))
    return found


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def pooled_threads(pid: int) -> int:
    """Those of its pools, which keep as many as they needed at once. What they start has their names, and is none."""
    names = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            names.add((task / "comm").read_text())
    return sum(name.startswith(PREFIX) for name in names)


def answers(call: Callable[[], object]) -> str:
    """`ok`, or the reason of the error that the call ended with."""
    try:
        call()
    except ImagesError as error:
        return error.reason
    return "ok"
