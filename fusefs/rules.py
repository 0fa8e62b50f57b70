"""When is a staged image done? The rules, apart from who acts on them.

Nothing tells a file system that a copy is complete. Two things are known: that every byte of a disk came from one image
(then it is done, at once), and that nobody has touched the directory for a while (then the sidecar may look whether the
disk is whole; it checks descriptor, extents and the tables of sparse ones, and refuses otherwise).

The ways in which half a copy could be taken for a whole one, and what stops each:
- files are missing: a copy needs every disk file of its image, and the companion files that are too large to come
  later; an import needs what its descriptor names;
- a file ends early: sizes are compared, by the sidecar with the descriptor, here with the source;
- a file has its full size before its data (preallocation): where its source has data, it has to have been written, but
  for zeroes, which copiers leave out; its source is what the writer had open, or named: bytes that are equal to those
  of a file that somebody else read are no promise to copy the rest of it;
- a copier pauses with a file open: nothing is published while a file is open for writing;
- a copier is killed in a file: that file is given up, until somebody writes it anew;
- a file of another image, or an own one, is among them: then the disk is not wholly that image's.
"""

import contextlib
import enum
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from fusefs.doubts import Key
from fusefs.provenance import Ranges, SourceFile
from fusefs.sources import OpenSource
from fusefs.staged import StagedDirectory, StagedFile
from fusefs.tree import IndexedImage, Tree
from sidecar.client import MAX_COMPANION_BYTES, ImageRef
from sidecar.holes import data_ranges

_log = logging.getLogger(__name__)


# How long one question may look for zeroes in a source: a close waits for the answer. What was found is remembered.
_LOOK_SECONDS = 0.5
_PIECE = 1 << 20
_ZEROES = bytes(_PIECE)


class Answer(enum.Enum):
    YES = enum.auto()
    NO = enum.auto()
    UNDECIDED = enum.auto()  # not in the time that one question may take


class Held(NamedTuple):
    """Why a staged image is not published; `undecided`: ask again, the answer was not found in the time there is."""

    reason: str
    undecided: bool = False


class Rules:
    """Asks the tree about the images that staged files came from. Safe to share between threads."""

    def __init__(self, tree: Tree, open_source: OpenSource, clock: Callable[[], float] = time.monotonic) -> None:
        """`open_source` opens a file of an image; OSError when it is not the same file any more."""
        self._tree = tree
        self._open_source = open_source
        self._clock = clock

    def copied_from(self, directory: StagedDirectory) -> ImageRef | None:
        """The image that the whole staged disk is a copy of; None when it is not, or not yet."""
        files = {file.name: file for file in directory.files}
        origins: set[Key] = set()
        for file in files.values():
            with file.lock:
                origins.update((source.datastore, source.image_id) for source in file.provenance.sources)
        for datastore, image_id in origins:
            image = self._tree.image(datastore, image_id)
            if image is not None and image.is_valid and self._is_whole(files, datastore, image):
                return ImageRef(datastore=datastore, image_id=image_id)
        return None

    def held_back(self, directory: StagedDirectory) -> Held | None:
        """Why the sidecar need not even look whether the disk is whole; None when it may."""
        files = directory.files
        if directory.spoiled:
            return Held(directory.spoiled)
        if not any(file.name.endswith(".vmdk") for file in files):
            return Held("no file named *.vmdk yet")
        for file in files:
            if file.given_up:
                return Held(f"{file.name} is not complete: {file.given_up}")
            with file.lock:
                meant = list(file.provenance.meant)
            for source in meant:
                ranges = self._data_ranges(file, source)
                if source.name != file.name:  # a part of it may be what is wanted
                    size = file.content.status().size
                    ranges = [(start, min(end, size)) for start, end in ranges if start < size]
                match self._data_has_come(file, source, ranges):
                    case Answer.NO:
                        return Held(f"{file.name} is not complete: data of {_text(source)} is missing in it")
                    case Answer.UNDECIDED:
                        return Held(f"{file.name}: looking what is missing of {_text(source)}", undecided=True)
        return None

    def _is_whole(self, files: dict[str, StagedFile], datastore: str, image: IndexedImage) -> bool:
        disk = [file for file in image.files if file.is_disk]
        disk_names = {file.name for file in disk}
        if not disk or any(name.endswith(".vmdk") for name in files.keys() - disk_names):
            return False
        # All that is cheap to ask for first: this is asked at every close.
        pairs = []
        for file in image.files:
            if not file.is_disk and file.size <= MAX_COMPANION_BYTES:
                continue
            staged = files.get(file.name)
            if staged is None or staged.given_up or staged.content.status().size != file.size:
                return False
            if file.is_disk:
                pairs.append((staged, SourceFile(datastore, image.image_id, file.name, file.generation)))
        for staged, source in pairs:
            with staged.lock:
                is_copy = staged.provenance.is_copy(source)
            if not is_copy or self._data_has_come(staged, source, self._data_ranges(staged, source)) is not Answer.YES:
                return False
        return True

    def _data_has_come(self, file: StagedFile, source: SourceFile, ranges: Ranges) -> Answer:
        """Whether the file was written wherever the source has data, but for zeroes: copiers leave them out."""
        with file.lock:
            missing = file.provenance.to_come(source, ranges)
        if not missing:
            return Answer.YES
        until = self._clock() + _LOOK_SECONDS
        try:
            with contextlib.closing(self._open_source(source)) as reader:
                for start, end in missing:
                    for offset in range(start, end, _PIECE):
                        size = min(_PIECE, end - offset)
                        if self._clock() > until:
                            return Answer.UNDECIDED
                        if reader.read(size, offset) != _ZEROES[:size]:
                            return Answer.NO
                        with file.lock:
                            if not file.provenance.skipped(offset, offset + size, source):
                                return Answer.NO  # it was written just now
        except OSError as error:
            _log.info("source of a copy not read file=%s cause=%s", _text(source), error)
            return Answer.NO
        return Answer.YES

    def _data_ranges(self, file: StagedFile, source: SourceFile) -> Ranges:
        """Where the source has data; all of it where that cannot be known: then every byte has to have been written."""
        known = file.provenance.data_ranges(source)
        if known is not None:
            return known
        try:
            with contextlib.closing(self._open_source(source)) as reader:
                return list(data_ranges(reader.seek, 0, source.generation.size))
        except OSError as error:
            _log.info("source of a copy not opened file=%s cause=%s", _text(source), error)
            return [(0, source.generation.size)]


def _text(source: SourceFile) -> str:
    return f"{source.datastore}/{source.image_id}/{source.name}"
