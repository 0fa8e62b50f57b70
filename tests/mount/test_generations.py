"""Which file the kernel takes a path for, while images are replaced: nobody reads one file with the size of another."""

import errno
import threading

import pytest

from fusefs.attributes import Attributes, Owner
from fusefs.errors import AskAgain
from fusefs.generations import Generations
from fusefs.provenance import Generation

KEY = ("one", "a")
PATH = "/one/a/a.vmdk"
OLD, NEW = Generation(1, 1, 1), Generation(2, 1, 3)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def attributes(generation: Generation) -> Attributes:
    return Owner(0, 0).file(7, generation.size, generation.size, generation.modified_ns)


def shown(generations: Generations, generation: Generation) -> Attributes:
    return generations.shown(KEY, PATH, generation, attributes(generation), generations.begin())


def opened(generations: Generations, generation: Generation) -> bool:
    return generations.opened(KEY, PATH, generation, attributes(generation))


def closed(generations: Generations, generation: Generation, *, is_there: bool = True) -> None:
    generations.closed(KEY, PATH, generation, is_there=is_there)


def replace(generations: Generations) -> None:
    generations.changing(KEY)
    generations.told(KEY)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def generations(clock: Clock) -> Generations:
    return Generations(5.0, clock=clock)


def test_pages_are_kept_for_the_same_file_only(generations: Generations) -> None:
    assert [opened(generations, OLD), opened(generations, OLD)] == [False, True]
    for _ in range(2):
        closed(generations, OLD)
    replace(generations)
    shown(generations, NEW)
    assert [opened(generations, NEW), opened(generations, NEW)] == [False, True]


def test_a_file_that_was_replaced_is_opened_once_the_kernel_asked_again(generations: Generations) -> None:
    shown(generations, OLD)
    replace(generations)
    with pytest.raises(AskAgain) as caught:
        opened(generations, NEW)
    assert caught.value.errno == errno.ESTALE
    assert shown(generations, NEW) == attributes(NEW)
    opened(generations, NEW)


def test_an_answer_to_a_question_of_before_does_not_count(generations: Generations) -> None:
    request = generations.begin()
    replace(generations)
    generations.shown(KEY, PATH, NEW, attributes(NEW), request)
    with pytest.raises(AskAgain):
        opened(generations, NEW)


def test_an_open_waits_for_the_kernel_to_be_told(generations: Generations) -> None:
    generations.changing(KEY)
    shown(generations, NEW)
    answers: list[bool] = []

    def open_and_again() -> None:
        try:
            answers.append(opened(generations, NEW))
        except AskAgain:
            shown(generations, NEW)
            answers.append(opened(generations, NEW))

    thread = threading.Thread(target=open_and_again)
    thread.start()
    generations.told(KEY)
    thread.join()
    assert answers == [False]


def test_a_second_change_that_the_kernel_was_not_told_of_counts(
    generations: Generations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusefs.generations._TOLD_SECONDS", 0.0)
    generations.changing(KEY)
    generations.changing(KEY)
    generations.told(KEY)
    shown(generations, NEW)
    with pytest.raises(AskAgain):
        opened(generations, NEW)
    generations.told(KEY)
    shown(generations, NEW)
    opened(generations, NEW)


def test_while_the_older_file_is_open_its_path_is_not_the_new_ones(generations: Generations) -> None:
    opened(generations, OLD)
    replace(generations)
    assert shown(generations, NEW) == attributes(OLD)
    with pytest.raises(OSError, match="is still open") as caught:
        opened(generations, NEW)
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(OSError, match="still open"):
        generations.require_free(PATH)
    closed(generations, OLD, is_there=False)
    generations.require_free(PATH)


def test_what_was_shown_for_an_open_file_does_not_count_when_it_is_closed(
    generations: Generations, clock: Clock
) -> None:
    opened(generations, OLD)
    replace(generations)
    clock.now += 1000  # far longer than the kernel keeps a name
    replace_other = ("one", "b")
    generations.changing(replace_other)
    generations.told(replace_other)
    shown(generations, NEW)
    closed(generations, OLD, is_there=False)
    with pytest.raises(AskAgain):
        opened(generations, NEW)
    shown(generations, NEW)
    opened(generations, NEW)


def test_a_name_that_was_removed_here_is_free_for_another_file(generations: Generations) -> None:
    opened(generations, OLD)
    generations.removed("/one/a")
    generations.require_free(PATH)
    assert shown(generations, NEW) == attributes(NEW)
    opened(generations, NEW)
    closed(generations, OLD)
    closed(generations, NEW)


def test_a_listing_says_nothing_of_files_that_are_open(generations: Generations) -> None:
    assert not generations.is_open_below("/one/a")
    opened(generations, OLD)
    assert generations.is_open_below("/one/a")
    assert not generations.is_open_below("/one/a.vmdk")
    closed(generations, OLD)
    assert not generations.is_open_below("/one/a")


def test_a_change_is_forgotten_when_the_kernel_has_no_name_of_before(generations: Generations, clock: Clock) -> None:
    replace(generations)
    clock.now += 100
    other = ("one", "b")
    generations.changing(other)
    generations.told(other)
    opened(generations, NEW)
