"""Real disks for tests, made by qemu-img, and ways to compare them."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from sidecar.client import SidecarClient
from tests.support.processes import run

MIB = 1024 * 1024


def make_disk(
    directory: Path,
    name: str = "disk.vmdk",
    *,
    size: int = 8 * MIB,
    subformat: str = "monolithicFlat",
    data: Sequence[tuple[int, int]] = ((0, 1 * MIB), (4 * MIB, 1 * MIB)),
    seed: int = 1,
) -> Path:
    """A VMDK with pseudo-random bytes in the (offset, length) ranges of `data`, else holes; its descriptor's path."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = directory / f".{name}.raw"
    with raw.open("wb") as file:
        for offset, length in data:
            file.seek(offset)
            file.write(pseudo_random(length, seed + offset))
        file.truncate(size)
    target = directory / name
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, target)
    raw.unlink()
    return target


def pseudo_random(length: int, seed: int) -> bytes:
    """The same bytes for the same seed, fast, not compressible."""
    return hashlib.shake_256(seed.to_bytes(8, "little", signed=False)).digest(length)


def import_image(
    client: SidecarClient, ref: str, descriptor: Path, *, companions: dict[str, bytes] | None = None
) -> None:
    """Imports every file beside the descriptor, and companion files."""
    with client.create_staging(ref) as staging:
        for path in sorted(descriptor.parent.iterdir()):
            if path.name.startswith("."):
                continue
            staging.write_file(path.name, [(0, path.read_bytes())])
        for name, content in (companions or {}).items():
            staging.write_file(name, [(0, content)])
        staging.commit()


def assert_same_disk(first: Path, second: Path) -> None:
    """By QEMU's word: the guests of both see the same bytes."""
    run("qemu-img", "compare", "-U", first, second)


def allocated(path: Path) -> int:
    """Bytes that the file takes, or all files below a directory."""
    if path.is_dir():
        return sum(allocated(child) for child in path.iterdir())
    return os.stat(path).st_blocks * 512


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(directory: Path) -> dict[str, str]:
    """Every file below, with the digest of its bytes."""
    return {str(path.relative_to(directory)): digest(path) for path in sorted(directory.rglob("*")) if path.is_file()}
