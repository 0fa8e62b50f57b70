"""Sets of byte ranges of a file."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class IntervalSet:
    """A set of offsets, kept as the fewest half-open ranges [start, end) that make it up, in order.

    Not safe to share between threads: the owner has a lock.
    """

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __repr__(self) -> str:
        return f"IntervalSet({list(self)})"

    def add(self, start: int, end: int) -> None:
        """Puts [start, end) in; an empty range changes nothing."""
        if start >= end:
            return
        # Ranges that overlap or touch the new one become one with it.
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        """Takes [start, end) out."""
        if start >= end:
            return
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        starts, ends = [], []
        if self._starts[first] < start:
            starts.append(self._starts[first])
            ends.append(start)
        if self._ends[last - 1] > end:
            starts.append(end)
            ends.append(self._ends[last - 1])
        self._starts[first:last] = starts
        self._ends[first:last] = ends

    def covers(self, start: int, end: int) -> bool:
        """Whether every offset of [start, end) is in; true of an empty range."""
        if start >= end:
            return True
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and self._ends[index] >= end

    def missing(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """What of the ranges is not in."""
        gaps = []
        for start, end in ranges:
            position = start
            for index in range(bisect_right(self._ends, start), bisect_left(self._starts, end)):
                if position < self._starts[index]:
                    gaps.append((position, self._starts[index]))
                position = self._ends[index]
            if position < end:
                gaps.append((position, end))
        return gaps

    def includes(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Whether every one of the ranges is in."""
        return all(self.covers(start, end) for start, end in ranges)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any offset of [start, end) is in."""
        if start >= end:
            return False
        index = bisect_right(self._ends, start)
        return index < len(self._starts) and self._starts[index] < end
