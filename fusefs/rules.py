"""When is a staged image done? The rules, apart from who acts on them.

Nothing tells a file system that a copy is complete. Two things are known: that every byte of a disk came from one image
(then it is done, at once), and that nobody has touched the directory for a while (then the sidecar may look whether the
disk is whole; it checks descriptor, extents and the tables of sparse ones, and refuses otherwise).

The ways in which half a copy could be taken for a whole one, and what stops each:
- files are missing: a copy needs every disk file of its image; an import needs what its descriptor names;
- a file ends early: sizes are compared, by the sidecar with the descriptor, here with the source;
- a file has its full size before its data (preallocation): where its source has data, it has to have been written;
- a copier pauses with a file open: nothing is published while a file is open for writing;
- a copier is killed in a file: that file is given up, until somebody writes it anew;
- a file of another image, or an own one, is among them: then the disk is not wholly that image's.
"""

import contextlib
import logging
from collections.abc import Callable

from fusefs.provenance import Ranges, SourceFile
from fusefs.reading import Reader, data_ranges
from fusefs.staged import StagedDirectory, StagedFile
from fusefs.tree import IndexedImage, Tree
from sidecar.client import ImageRef

_log = logging.getLogger(__name__)

OpenSource = Callable[[SourceFile], Reader]


class Rules:
    """Asks the tree about the images that staged files came from. Safe to share between threads."""

    def __init__(self, tree: Tree, open_source: OpenSource) -> None:
        """`open_source` opens a file of an image; OSError when it is not the same file any more."""
        self._tree = tree
        self._open_source = open_source

    def copied_from(self, directory: StagedDirectory) -> ImageRef | None:
        """The image that the whole staged disk is a copy of; None when it is not, or not yet."""
        files = {file.name: file for file in directory.files}
        origins = {(source.datastore, source.image_id) for file in files.values() for source in file.provenance.sources}
        for datastore, image_id in origins:
            image = self._tree.image(datastore, image_id)
            if image is not None and image.is_valid and self._is_whole(files, datastore, image):
                return ImageRef(datastore=datastore, image_id=image_id)
        return None

    def held_back(self, directory: StagedDirectory) -> str:
        """Why the sidecar need not even look whether the disk is whole; empty when it may."""
        files = directory.files
        if not any(file.name.endswith(".vmdk") for file in files):
            return "no file named *.vmdk yet"
        for file in files:
            if file.given_up:
                return f"{file.name} is not complete: {file.given_up}"
            for source in file.provenance.sources:
                ranges = self._data_ranges(file, source)
                if source.name != file.name:  # a part of it may be what is wanted
                    size = file.content.status().size
                    ranges = [(start, min(end, size)) for start, end in ranges if start < size]
                with file.lock:
                    unfinished = file.provenance.is_unfinished(ranges)
                if unfinished:
                    return f"{file.name} is not complete: data of {_text(source)} is missing in it"
        return ""

    def _is_whole(self, files: dict[str, StagedFile], datastore: str, image: IndexedImage) -> bool:
        disk = [file for file in image.files if file.is_disk]
        disk_names = {file.name for file in disk}
        if not disk or any(name.endswith(".vmdk") for name in files.keys() - disk_names):
            return False
        # All that is cheap to ask for first: this is asked at every close.
        pairs = []
        for file in disk:
            staged = files.get(file.name)
            if staged is None or staged.given_up or staged.content.status().size != file.size:
                return False
            pairs.append((staged, SourceFile(datastore, image.image_id, file.name, file.generation)))
        for staged, source in pairs:
            ranges = self._data_ranges(staged, source)
            with staged.lock:
                if not staged.provenance.is_whole(source, staged.content.status().size, ranges):
                    return False
        return True

    def _data_ranges(self, file: StagedFile, source: SourceFile) -> Ranges:
        """Where the source has data; all of it where that cannot be known: then every byte has to have been written."""
        known = file.provenance.data_ranges(source)
        if known is not None:
            return known
        try:
            with contextlib.closing(self._open_source(source)) as reader:
                return data_ranges(reader, source.generation.size)
        except OSError as error:
            _log.info("source of a copy not opened file=%s cause=%s", _text(source), error)
            return [(0, source.generation.size)]


def _text(source: SourceFile) -> str:
    return f"{source.datastore}/{source.image_id}/{source.name}"
