"""Writes into staged files, and which of them are copies of an image's file.

A copy_file_range names its source: the sidecar copies that range. A copier that reads and writes has the source open,
or another process has that it talks to: what is written is compared with the bytes at the same place there, and where
they are equal that is remembered.
"""

import errno
from contextlib import closing
from typing import NamedTuple

from fusefs.errors import fail
from fusefs.handles import Borrowed, Handles, ImageHandle, StagedHandle
from fusefs.processes import thread_group
from fusefs.provenance import Provenance, SourceFile
from fusefs.reading import Reader, expected_file
from fusefs.sources import Sources
from fusefs.staged import StagedDirectory, StagedFile
from fusefs.tree import Tree
from sidecar.client import ImageRef
from sidecar.errors import (
    DeadlineExceeded,
    FileChanged,
    InternalError,
    OperationCancelled,
    SidecarUnavailable,
    TooManyCalls,
)
from sidecar.holes import data_ranges

# A writer whose bytes differ this often in a row is making something else.
_MOST_MISMATCHES = 8


class _Equal(NamedTuple):
    """A file that has the bytes that are written, at the same offset, and is open."""

    source: SourceFile
    reader: Reader
    borrowed: bool = False  # the writer does not have it open: it was found by its name

    def learn(self, provenance: Provenance) -> None:
        size = self.source.generation.size
        provenance.learn(self.source, lambda: list(data_ranges(self.reader.seek, 0, size)), borrowed=self.borrowed)


class Copying:
    def __init__(self, tree: Tree, handles: Handles, sources: Sources) -> None:
        self._tree = tree
        self._handles = handles
        self._sources = sources

    def write(self, handle: StagedHandle, data: memoryview, offset: int, pid: int) -> None:
        file = handle.file
        with handle.directory.change():
            equal = self._equal_source(handle, data, offset, pid)
            with file.lock, file.complete_or_given_up():
                if equal is None:
                    file.content.write(data, offset)
                else:
                    self._take(file, equal, data, offset)
                    equal.learn(file.provenance)
                file.provenance.wrote(offset, len(data), equal.source if equal else None)

    def truncate(self, directory: StagedDirectory, file: StagedFile, size: int) -> None:
        with directory.change(), file.lock:
            with file.complete_or_given_up():
                self._complete_before_growing(file, size)
                file.content.truncate(size)
            file.provenance.truncated(size)
            if size == 0:
                file.given_up = ""

    def clone(self, source: ImageHandle, source_offset: int, target: StagedHandle, offset: int, length: int) -> int:
        """Has the sidecar copy a range; returns how much it did. EXDEV where the caller has to copy by itself."""
        origin, file = source.source, target.file
        length = min(length, origin.generation.size - source_offset)
        if length <= 0:
            return 0
        if not self._is_current(origin):
            fail(errno.EXDEV)
        with target.directory.change(), file.lock:
            # The sidecar's copy keeps holes as they are: it is exact only where there was nothing.
            if file.removed or file.provenance.was_written(offset, length):
                fail(errno.EXDEV)
            ref = ImageRef(datastore=origin.datastore, image_id=origin.image_id)
            with file.complete_or_given_up():
                try:
                    answer = target.directory.staging.clone_range(
                        ref, origin.name, source_offset, file.name, offset, length, expected_file(origin.generation)
                    )
                except (TooManyCalls, FileChanged):
                    fail(errno.EXDEV)
                except (DeadlineExceeded, SidecarUnavailable, OperationCancelled, InternalError) as error:
                    # It may go on, and would write over what comes to the same place later.
                    target.directory.spoil(f"nobody knows when the copying of {file.name} ends: {error.message}")
                    raise
                if answer.done_bytes <= 0:
                    fail(errno.EIO, f"nothing was copied at {source_offset} of {origin.name}")
                file.content.changed_elsewhere()
            file.provenance.learn(origin, lambda: list(data_ranges(source.reader.seek, 0, origin.generation.size)))
            file.provenance.wrote(offset, answer.done_bytes, origin if source_offset == offset else None)
            return answer.done_bytes

    def _take(self, file: StagedFile, equal: _Equal, data: memoryview, offset: int) -> None:
        """Shares the whole blocks that the data makes equal to the source, and writes what is beside them."""
        end = offset + len(data)
        self._complete_last_block(file, equal, offset)
        begin = self._with_zeroes_before(file, equal, offset)
        start, stop = file.provenance.equal_blocks(equal.source, begin, end, file.content.block_size)
        if stop > end and stop > file.content.status().size:
            stop -= file.content.block_size  # the file ends in its last block, where the source goes on
        if start < stop and self._share(file, equal, start, stop - start):
            if offset < start:
                file.content.write(data[: start - offset], offset)
            if stop < end:
                file.content.write(data[stop - offset :], stop)
        else:
            file.content.write(data, offset)

    def _share(self, file: StagedFile, equal: _Equal, offset: int, length: int) -> bool:
        if file.content.share(equal.reader, offset, length):
            return True
        # By whoever read it, since the comparison: it is opened again, while it is the same file.
        if not equal.reader.closed:
            return False
        try:
            reader = self._sources.open(equal.source)
        except OSError:
            return False
        with closing(reader):
            return file.content.share(reader, offset, length)

    def _with_zeroes_before(self, file: StagedFile, equal: _Equal, offset: int) -> int:
        """Where what is equal begins: before the data when the source has zeroes there, which the writer skipped.

        `rsync --sparse` leaves out each zero that a piece of it begins or ends with: a block with one in it would never
        be written as a whole. Looked for beyond the end of the file only, and no further back than one block: what the
        file ends in is `_complete_last_block`'s.
        """
        size, block = file.content.status().size, file.content.block_size
        begin = max(size, (offset - 1) // block * block)
        if begin >= offset or (size < begin and offset % block == 0):
            return offset
        if not equal.reader.equals(memoryview(bytes(offset - begin)), begin):
            return offset
        return begin if file.provenance.skipped(begin, offset, equal.source) else offset

    def _complete_before_growing(self, file: StagedFile, size: int) -> None:
        for source in file.provenance.sources:
            if _rest_of_last_block(file, source, size):
                try:
                    reader = self._sources.open(source)
                except OSError:  # it is another file by now
                    continue
                with closing(reader):
                    self._complete_last_block(file, _Equal(source, reader), size)

    def _complete_last_block(self, file: StagedFile, equal: _Equal, limit: int) -> None:
        """Shares the block that the file ends in, when the source has zeroes in its rest, which the writer skipped.

        `limit`: where the file goes on, or is to end.
        """
        rest = _rest_of_last_block(file, equal.source, limit)
        if not rest or not equal.reader.equals(memoryview(bytes(len(rest))), rest.start):
            return
        if file.provenance.skipped(rest.start, rest.stop, equal.source):
            start, stop = file.provenance.equal_blocks(equal.source, rest.start, rest.stop, file.content.block_size)
            if start < stop:
                self._share(file, equal, start, stop - start)

    def _equal_source(self, handle: StagedHandle, data: memoryview, offset: int, pid: int) -> "_Equal | None":
        """The file of an image with the same bytes at the same offset, when the writer may have read it from there."""
        if not handle.compared:
            return None
        if handle.writer[0] != pid:
            handle.writer = (pid, thread_group(pid))
        candidates = self._handles.images_open_in(handle.writer[1])
        candidates.sort(key=lambda candidate: candidate.source.name != handle.file.name)
        for candidate in candidates:
            if candidate.reader.equals(data, offset):
                handle.mismatches = 0
                return _Equal(candidate.source, candidate.reader)
        if handle.borrowed is not None and handle.borrowed.reader.equals(data, offset):
            handle.mismatches = 0
            return _Equal(*handle.borrowed, borrowed=True)
        if handle.borrowed is None and (equal := self._borrow(handle, data, offset)) is not None:
            return equal
        handle.mismatches += 1
        handle.compared = handle.mismatches < _MOST_MISMATCHES
        return None

    def _borrow(self, handle: StagedHandle, data: memoryview, offset: int) -> "_Equal | None":
        """A file of the same name that another process reads, or has read; it stays open with the handle."""
        for source in self._sources.named(handle.file.name):
            try:
                reader = self._sources.open(source)
            except OSError:  # it is another file by now
                continue
            if reader.equals(data, offset):
                handle.borrowed = Borrowed(source, reader)
                return _Equal(source, reader, borrowed=True)
            reader.close()
        return None

    def _is_current(self, source: SourceFile) -> bool:
        image = self._tree.image(source.datastore, source.image_id)
        file = image.file(source.name) if image is not None and image.is_valid else None
        return file is not None and file.generation == source.generation


def _rest_of_last_block(file: StagedFile, source: SourceFile, limit: int) -> range:
    """From the end of the file to that of the block it ends in, or of the source; empty when `limit` is before that.

    Empty, too, where nothing can be shared.
    """
    if not file.content.shares:
        return range(0)
    size, block = file.content.status().size, file.content.block_size
    end = min(-(-size // block) * block, source.generation.size)
    return range(size, end if end <= limit else size)
