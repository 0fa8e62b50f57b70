"""When is a staged file known to be a whole copy, and when is it known to be half of one?"""

from fusefs.provenance import Generation, Provenance, SourceFile

SIZE = 1000
SOURCE = SourceFile("one", "a", "a-flat.vmdk", Generation(7, 1, SIZE))
OTHER = SourceFile("one", "b", "b-flat.vmdk", Generation(8, 1, SIZE))
DATA = [(0, 100), (500, 600)]


def test_a_file_whose_data_came_from_the_source_is_whole() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    assert provenance.is_whole(SOURCE, SIZE, DATA)
    assert not provenance.is_whole(SOURCE, SIZE - 1, DATA)
    assert not provenance.is_unfinished(DATA)
    assert provenance.sources == (SOURCE,)


def test_a_file_of_the_right_size_without_all_of_its_data_is_not_whole() -> None:
    """A copier that preallocates, and dies."""
    provenance = Provenance()
    provenance.wrote(0, 100, SOURCE)
    assert not provenance.is_whole(SOURCE, SIZE, DATA)
    assert provenance.is_unfinished(DATA)


def test_another_byte_makes_it_another_file_which_is_still_complete() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    provenance.wrote(550, 1)
    assert not provenance.is_whole(SOURCE, SIZE, DATA)
    assert not provenance.is_unfinished(DATA)


def test_a_byte_in_a_hole_of_the_source_makes_it_another_file() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    provenance.wrote(300, 1)
    assert not provenance.is_whole(SOURCE, SIZE, DATA)


def test_truncating_forgets_what_was_beyond() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    provenance.truncated(550)
    assert not provenance.is_whole(SOURCE, SIZE, DATA)
    assert provenance.is_unfinished(DATA)
    provenance.wrote(550, 50, SOURCE)
    assert provenance.is_whole(SOURCE, SIZE, DATA)
    assert not provenance.was_written(600, 400)


def test_bytes_of_another_image_are_not_the_sources() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    provenance.wrote(0, 100, OTHER)
    assert not provenance.is_whole(SOURCE, SIZE, DATA)
    assert set(provenance.sources) == {SOURCE, OTHER}


def test_the_same_path_at_another_time_is_another_source() -> None:
    provenance = Provenance()
    for start, end in DATA:
        provenance.wrote(start, end - start, SOURCE)
    later = SOURCE._replace(generation=Generation(9, 2, SIZE))
    assert not provenance.is_whole(later, SIZE, DATA)


def test_a_source_of_holes_only_is_whole_without_a_write() -> None:
    assert Provenance().is_whole(SOURCE, SIZE, [])
