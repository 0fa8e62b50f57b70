"""Where the bytes of a staged file came from: which of its ranges are known to equal which image's file.

Nothing here is guessed. A range is known to be an image's because the sidecar copied it from there, or because the
bytes that were written were compared with the bytes there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fusefs.intervals import IntervalSet

Ranges = Sequence[tuple[int, int]]


class Generation(NamedTuple):
    """Tells the content of a file from that of another one which has the same path at another time."""

    inode: int
    modified_ns: int
    size: int


class SourceFile(NamedTuple):
    """A file of an image, as it was when bytes of it were copied."""

    datastore: str
    image_id: str
    name: str
    generation: Generation

    @property
    def key(self) -> tuple[str, str]:
        return (self.datastore, self.image_id)


class Provenance:
    """The history of one staged file's bytes. Not safe to share between threads: the staged file has a lock."""

    __slots__ = ("_borrowed", "_data", "_equal", "_written")

    def __init__(self) -> None:
        self._written = IntervalSet()
        self._equal: dict[SourceFile, IntervalSet] = {}
        self._data: dict[SourceFile, Ranges] = {}
        self._borrowed: set[SourceFile] = set()

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """Every file of an image that a range of this one is known to equal."""
        return tuple(source for source, ranges in self._equal.items() if ranges)

    @property
    def meant(self) -> tuple[SourceFile, ...]:
        """The sources that the writer had open itself, or named: this is to be a copy of them."""
        return tuple(source for source in self.sources if source not in self._borrowed)

    def learn(self, source: SourceFile, data_ranges: Callable[[], Ranges], *, borrowed: bool = False) -> None:
        """Remembers where a source has data, the first time: the source may be gone when that is asked for.

        `borrowed`: it was found by its name. Then equal bytes are equal bytes, and tell nothing of what is to come.
        """
        if not borrowed:
            self._borrowed.discard(source)
        elif source not in self._data:
            self._borrowed.add(source)
        if source not in self._data:
            try:
                self._data[source] = data_ranges()
            except OSError:  # it is being closed: then all of it counts as data
                self._data[source] = [(0, source.generation.size)]

    def data_ranges(self, source: SourceFile) -> Ranges | None:
        """Where the source has data; None when that was never learned."""
        return self._data.get(source)

    def wrote(self, offset: int, length: int, source: SourceFile | None = None) -> None:
        """Bytes were written there; `source` is the file that has the same bytes at the same offset, if one does."""
        self._written.add(offset, offset + length)
        for other, ranges in self._equal.items():
            if other != source:
                ranges.remove(offset, offset + length)
        if source is not None:
            self._equal.setdefault(source, IntervalSet()).add(offset, offset + length)

    def equal_blocks(self, source: SourceFile, start: int, end: int, block: int) -> tuple[int, int]:
        """The whole blocks that are the source's when [start, end) is, as a range that may be empty.

        Direct writes come in pieces that begin and end anywhere. The source's last block is whole at its end.
        """
        equal = self._equal.get(source, IntervalSet())
        first, last = start // block * block, -(-end // block) * block
        if not equal.covers(first, start):
            first += block
        if end == source.generation.size:
            last = end
        elif not equal.covers(end, last):
            last -= block
        return first, max(first, last)

    def truncated(self, size: int) -> None:
        """Nothing is left at and after `size`; what was beyond reads as a hole when the file grows again."""
        if size == 0:  # whoever writes it anew may make something else
            self._data.clear()
            self._borrowed.clear()
        self._written.remove(size, 1 << 63)
        for ranges in self._equal.values():
            ranges.remove(size, 1 << 63)

    def was_written(self, offset: int, length: int) -> bool:
        """Whether any byte there was ever written."""
        return self._written.overlaps(offset, offset + length)

    def skipped(self, start: int, end: int, source: SourceFile) -> bool:
        """The source has zeroes there, and what was never written here reads as zeroes. False where it was written."""
        if self.was_written(start, end - start):
            return False
        self._equal.setdefault(source, IntervalSet()).add(start, end)
        return True

    def is_copy(self, source: SourceFile) -> bool:
        """Whether all that was written came from the source."""
        return self._equal.get(source, IntervalSet()).includes(self._written)

    def to_come(self, source: SourceFile, data_ranges: Ranges) -> list[tuple[int, int]]:
        """Where the source has data that was not written here, nor found to be zeroes.

        `data_ranges`: where the source has data; it reads as zeroes elsewhere. A copier that preallocates and dies
        leaves some; a changed copy was written everywhere, if with other bytes.
        """
        return self._equal.get(source, IntervalSet()).missing(self._written.missing(data_ranges))
