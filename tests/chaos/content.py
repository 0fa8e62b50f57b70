"""What the images of a chaos run hold: every block of a disk says whose it is and where it belongs.

A content is known by its id alone, which is that of the operation that made it: size, extents, holes and bytes follow
from it. So whoever finds a file can say which content it should be, and see a mix, a short or a zeroed range at once.
"""

import functools
import hashlib
import json
import os
import random
import re
import struct
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096
SECTOR = 512
NOTES = "notes.txt"
UPDATE_OF_IMPORT = 0

_HEADER = struct.Struct("<12sQQ")
_MAGIC = b"chaos-block\n"
_FEW, _MANY, _VERY_MANY = 16, 256, 2048  # blocks of a small, an ordinary and a large disk
_EXTENT = re.compile(r'^(?:RW|RDONLY)\s+(\d+)\s+FLAT\s+"([^"]+)"(?:\s+(\d+))?\s*$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Content:
    """`extents`: the number of blocks of each. `runs`: (first block, blocks) of data, over the whole disk."""

    id: int
    extents: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def blocks(self) -> int:
        return sum(self.extents)

    def has_data(self, number: int) -> bool:
        return any(first <= number < first + count for first, count in self.runs)

    def extent_names(self, stem: str) -> list[str]:
        if len(self.extents) == 1:
            return [f"{stem}-flat.vmdk"]
        return [f"{stem}-f{number:03d}.vmdk" for number in range(1, len(self.extents) + 1)]

    def extent_runs(self, index: int) -> list[tuple[int, bytes]]:
        """The (offset, bytes) of the data in one extent."""
        start = sum(self.extents[:index])
        end = start + self.extents[index]
        found = []
        for first, count in self.runs:
            low, high = max(first, start), min(first + count, end)
            if low < high:
                found.append(((low - start) * BLOCK, b"".join(block(self.id, number) for number in range(low, high))))
        return found

    def descriptor(self, stem: str) -> bytes:
        names = self.extent_names(stem)
        kind = "monolithicFlat" if len(names) == 1 else "twoGbMaxExtentFlat"
        extents = "".join(
            f'RW {blocks * BLOCK // SECTOR} FLAT "{name}" 0\n' for blocks, name in zip(self.extents, names, strict=True)
        )
        return (
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
            f'createType="{kind}"\n\n# Extent description\n{extents}\n'
            '# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = "4"\nddb.geometry.cylinders = "4"\n'
            'ddb.geometry.heads = "16"\nddb.geometry.sectors = "63"\nddb.adapterType = "lsilogic"\n'
        ).encode()

    def notes(self) -> bytes:
        return f"content {self.id}\n".encode() * (1 + self.id % 500)

    def metadata(self) -> bytes:
        return metadata(UPDATE_OF_IMPORT)

    def write(self, directory: Path, stem: str) -> None:
        """Every file of the image to be, with its holes."""
        directory.mkdir()
        (directory / NOTES).write_bytes(self.notes())
        (directory / f"{stem}.ecv").write_bytes(self.metadata())
        for index, name in enumerate(self.extent_names(stem)):
            with (directory / name).open("wb") as file:
                for offset, data in self.extent_runs(index):
                    os.pwrite(file.fileno(), data, offset)
                file.truncate(self.extents[index] * BLOCK)
        (directory / f"{stem}.vmdk").write_bytes(self.descriptor(stem))


@functools.lru_cache(maxsize=4096)
def content_of(content_id: int) -> Content:
    choose = random.Random(content_id)
    most = choose.choices((_FEW, _MANY, _VERY_MANY), weights=(40, 55, 5))[0]
    blocks = choose.randint(8, most)
    if choose.random() < 0.25:
        first = choose.randint(1, blocks - 1)
        extents: tuple[int, ...] = (first, blocks - first)
    else:
        extents = (blocks,)
    if choose.random() < 0.3:
        return Content(content_id, extents, ((0, blocks),))
    # The first block always has data: it says which content this is.
    runs = [(0, choose.randint(1, 3))]
    while (start := sum(runs[-1]) + choose.randint(1, max(blocks // 4, 1))) < blocks:
        runs.append((start, min(choose.randint(1, max(blocks // 4, 1)), blocks - start)))
    return Content(content_id, extents, tuple(runs))


def metadata(update: int) -> bytes:
    """What the companion file `<id>.ecv` says: the operation that wrote it. Long enough to be seen when it is cut."""
    return json.dumps({"update": update, "again": [update] * 200}).encode()


def block(content_id: int, number: int) -> bytes:
    header = _HEADER.pack(_MAGIC, content_id, number)
    filler = hashlib.blake2b(header).digest()
    return header + (filler * (BLOCK // len(filler)))[: BLOCK - len(header)]


@functools.lru_cache(maxsize=1)
def _zeroes() -> bytes:
    return bytes(BLOCK)


def content_id_in(data: bytes) -> int | None:
    """The content that the block says it belongs to."""
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        return None
    content_id: int = _HEADER.unpack_from(data)[1]
    return content_id


def fault_in(data: bytes, content: Content, first: int) -> str:
    """What is wrong with the blocks from number `first` on; empty when they are the content's."""
    for number in range(first, first + len(data) // BLOCK):
        at = (number - first) * BLOCK
        found = data[at : at + BLOCK]
        if found == (block(content.id, number) if content.has_data(number) else _zeroes()):
            continue
        if found == _zeroes():
            return f"block {number} is zeroed"
        if (other := content_id_in(found)) is None:
            return f"block {number} is garbage" if content.has_data(number) else f"block {number} is no hole"
        place: int = _HEADER.unpack_from(found)[2]
        return f"block {number} is block {place} of content {other}"
    return ""


def named_extents(descriptor: bytes) -> list[tuple[str, int]]:
    """The (file, bytes) of the extents that the text of a descriptor names."""
    text = descriptor.decode("utf-8", "replace")
    return [(name, int(sectors) * SECTOR) for sectors, name, _ in _EXTENT.findall(text)]


def update_in(data: bytes) -> int | None:
    """The operation that wrote the metadata; None for what is not whole."""
    try:
        update = json.loads(data)["update"]
    except (ValueError, TypeError, KeyError):
        return None
    return update if type(update) is int and data == metadata(update) else None
