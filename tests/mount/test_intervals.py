"""Sets of ranges, against sets of numbers."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fusefs.intervals import IntervalSet

bounds = st.tuples(st.integers(0, 60), st.integers(0, 60))
steps = st.lists(st.tuples(st.sampled_from(["add", "remove"]), bounds), max_size=30)


def made_by(steps: list[tuple[str, tuple[int, int]]]) -> tuple[IntervalSet, set[int]]:
    intervals, numbers = IntervalSet(), set[int]()
    for what, (start, end) in steps:
        if what == "add":
            intervals.add(start, end)
            numbers |= set(range(start, end))
        else:
            intervals.remove(start, end)
            numbers -= set(range(start, end))
    return intervals, numbers


@given(steps)
def test_holds_what_was_added_and_not_removed_in_the_fewest_ranges(
    steps: list[tuple[str, tuple[int, int]]],
) -> None:
    intervals, numbers = made_by(steps)
    ranges = list(intervals)
    assert {number for start, end in ranges for number in range(start, end)} == numbers
    assert all(start < end for start, end in ranges)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges))
    assert bool(intervals) == bool(numbers)


@given(steps, bounds)
def test_covers_and_overlaps(steps: list[tuple[str, tuple[int, int]]], asked: tuple[int, int]) -> None:
    intervals, numbers = made_by(steps)
    wanted = set(range(*asked))
    assert intervals.covers(*asked) == (wanted <= numbers)
    assert intervals.overlaps(*asked) == bool(wanted & numbers)
    assert intervals.includes([asked]) == (wanted <= numbers)


@given(steps, st.lists(bounds, max_size=4))
def test_missing_is_what_of_the_ranges_is_not_in(
    steps: list[tuple[str, tuple[int, int]]], asked: list[tuple[int, int]]
) -> None:
    intervals, numbers = made_by(steps)
    missing = intervals.missing(asked)
    wanted = [number for start, end in asked for number in range(start, end) if number not in numbers]
    assert [number for start, end in missing for number in range(start, end)] == wanted
    assert all(start < end for start, end in missing)
