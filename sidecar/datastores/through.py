"""Bytes that go from one datastore to another through this process, where nothing else can move them."""

from typing import Protocol

from sidecar.datastores.interface import ReadableFile, Transfer

_PIECE = 1 << 20


class Target(Protocol):
    """A file that is written to."""

    def write(self, offset: int, data: bytes) -> None: ...

    def make_hole(self, offset: int, length: int) -> None: ...


def copy_through(
    source: ReadableFile, source_offset: int, target: Target, offset: int, length: int, transfer: Transfer
) -> int:
    """Makes a range equal to one of the source, holes kept; see WritableFile.clone."""
    end = min(source_offset + length, source.size)
    shift = offset - source_offset
    position = source_offset
    for start, size in source.data_ranges(source_offset, max(end - source_offset, 0)):
        _leave_hole(target, position + shift, start - position, transfer)
        position = start
        while position < start + size:
            data = source.read(position, min(_PIECE, start + size - position))
            if not data:
                return position - source_offset
            target.write(position + shift, data)
            transfer.advance(len(data))
            position += len(data)
    _leave_hole(target, position + shift, end - position, transfer)
    return max(end - source_offset, 0)


def _leave_hole(target: Target, offset: int, length: int, transfer: Transfer) -> None:
    if length > 0:
        target.make_hole(offset, length)
        transfer.advance(length)
