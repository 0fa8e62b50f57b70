"""When is a staged file known to be a whole copy, and when is it known to be half of one?"""

from fusefs.provenance import Generation, Provenance, Ranges, SourceFile

SIZE = 1000
SOURCE = SourceFile("one", "a", "a-flat.vmdk", Generation(7, 1, SIZE))
OTHER = SourceFile("one", "b", "b-flat.vmdk", Generation(8, 1, SIZE))
DATA = [(0, 100), (500, 600)]


def is_whole(provenance: Provenance, source: SourceFile, data_ranges: Ranges) -> bool:
    return provenance.is_copy(source) and not provenance.to_come(source, data_ranges)


def test_a_file_whose_data_came_from_the_source_is_whole() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    assert is_whole(provenance, SOURCE, DATA)
    assert not provenance.to_come(SOURCE, DATA)
    assert provenance.sources == (SOURCE,)


def test_a_file_of_the_right_size_without_all_of_its_data_is_not_whole() -> None:
    """A copier that preallocates, and dies."""
    provenance = Provenance()
    provenance.wrote(0, 100, SOURCE)
    assert not is_whole(provenance, SOURCE, DATA)
    assert provenance.to_come(SOURCE, DATA)


def test_another_byte_makes_it_another_file_which_is_still_complete() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    provenance.wrote(550, 1)
    assert not is_whole(provenance, SOURCE, DATA)
    assert not provenance.to_come(SOURCE, DATA)


def test_a_byte_in_a_hole_of_the_source_makes_it_another_file() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    provenance.wrote(300, 1)
    assert not is_whole(provenance, SOURCE, DATA)


def test_truncating_forgets_what_was_beyond() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    provenance.truncated(550)
    assert not is_whole(provenance, SOURCE, DATA)
    assert provenance.to_come(SOURCE, DATA)
    provenance.wrote(550, 50, SOURCE)
    assert is_whole(provenance, SOURCE, DATA)
    assert not provenance.was_written(600, 400)


def test_bytes_of_another_image_are_not_the_sources() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    provenance.wrote(0, 100, OTHER)
    assert not is_whole(provenance, SOURCE, DATA)
    assert set(provenance.sources) == {SOURCE, OTHER}


def test_the_same_path_at_another_time_is_another_source() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    later = SOURCE._replace(generation=Generation(9, 2, SIZE))
    assert not is_whole(provenance, later, DATA)


def test_equal_bytes_of_what_somebody_else_read_are_no_promise() -> None:
    provenance = Provenance()
    provenance.learn(SOURCE, lambda: DATA, borrowed=True)
    provenance.wrote(0, 100, SOURCE)
    assert provenance.sources == (SOURCE,)
    assert not provenance.meant
    provenance.learn(SOURCE, lambda: DATA)
    assert provenance.meant == (SOURCE,)
    provenance.learn(SOURCE, lambda: DATA, borrowed=True)
    assert provenance.meant == (SOURCE,)
    provenance.truncated(0)
    provenance.learn(SOURCE, lambda: DATA, borrowed=True)
    provenance.wrote(0, 100, SOURCE)
    assert not provenance.meant


def test_a_source_of_holes_only_is_whole_without_a_write() -> None:
    assert is_whole(Provenance(), SOURCE, [])


def test_zeroes_that_were_left_out_are_the_sources_until_something_else_is_written_there() -> None:
    provenance = Provenance()
    provenance.wrote(0, 100, SOURCE)
    assert provenance.to_come(SOURCE, DATA) == [(500, 600)]
    assert provenance.skipped(500, 600, SOURCE)
    assert is_whole(provenance, SOURCE, DATA)
    assert not provenance.skipped(50, 150, SOURCE)
    provenance.wrote(550, 10)
    assert not is_whole(provenance, SOURCE, DATA)
    assert provenance.to_come(SOURCE, DATA) == []
