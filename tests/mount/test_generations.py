"""Which file the kernel takes a path for, while images are replaced: nobody reads one file with the size of another."""

import errno
import os
import re
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from fusefs.attributes import Attributes, Owner
from fusefs.doubts import Key
from fusefs.errors import AskAgain
from fusefs.generations import Generations, OpenFile
from fusefs.provenance import Generation
from tests.mount.harness import process_name

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


def opened(generations: Generations, generation: Generation, path: str = PATH, process: int = 0) -> OpenFile:
    return generations.opened(KEY, path, generation, attributes(generation), process)


def closed(generations: Generations, file: OpenFile, *, is_there: bool = True) -> None:
    generations.closed(file, lambda: is_there)


def replace(generations: Generations, key: Key = KEY) -> None:
    with generations.change(key):
        pass


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def generations(clock: Clock) -> Generations:
    return Generations(5.0, clock=clock)


def test_pages_are_kept_for_the_same_file_only(generations: Generations) -> None:
    files = [opened(generations, OLD), opened(generations, OLD)]
    for file in files:
        closed(generations, file)
    replace(generations)
    shown(generations, NEW)
    files += [opened(generations, NEW), opened(generations, NEW)]
    assert [file.keep_pages for file in files] == [False, True, False, True]


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
    answers: list[OpenFile] = []

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
    assert [file.generation for file in answers] == [NEW]


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
    file = opened(generations, OLD)
    replace(generations)
    assert shown(generations, NEW) == attributes(OLD)
    with pytest.raises(OSError, match="is still open") as caught:
        opened(generations, NEW)
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(OSError, match="still open"):
        generations.require_free(PATH)
    closed(generations, file, is_there=False)
    generations.require_free(PATH)


def test_who_opens_waits_for_the_older_file_to_be_closed(
    generations: Generations, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    """Its closer has gone on already: the kernel tells of a close, and does not wait."""
    monkeypatch.setattr("fusefs.generations._CLOSED_SECONDS", 60.0)
    file = opened(generations, OLD)
    replace(generations)
    pool = stack.enter_context(ThreadPoolExecutor())
    opening = pool.submit(opened, generations, NEW)
    while not opening.running():
        pass
    closed(generations, file, is_there=False)
    with pytest.raises(AskAgain):
        opening.result(60)


def test_who_is_refused_is_told_who_has_the_older_file_open(generations: Generations) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    for process in (os.getpid(), os.getpid(), ended.pid, 0):
        opened(generations, OLD, process=process)
    replace(generations)
    users = (
        f"open in {process_name()} (pid {os.getpid()}), a process that has ended (pid {ended.pid}), "
        "a process that cannot be seen from here"
    )
    with pytest.raises(OSError, match=re.escape(users)):
        opened(generations, NEW)
    with pytest.raises(OSError, match=re.escape(users)):
        generations.require_free(PATH)


def test_when_the_older_file_is_closed_the_kernel_is_told_once_more(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was answered with that file's size until now, and such an answer may come after the next one."""
    monkeypatch.setattr("fusefs.generations._TOLD_SECONDS", 0.0)
    orders: list[tuple[str, list[str], Callable[[], None]]] = []
    generations = Generations(
        5.0, tell=lambda directory, paths, told: orders.append((directory, list(paths), told)), clock=clock
    )
    first, last = opened(generations, OLD), opened(generations, OLD)
    replace(generations)
    clock.now += 1000  # far longer than the kernel keeps a name
    closed(generations, first, is_there=False)
    assert not orders
    closed(generations, last, is_there=False)
    [(directory, paths, told)] = orders
    assert (directory, paths) == ("/one/a", [PATH])
    shown(generations, NEW)
    with pytest.raises(AskAgain):
        opened(generations, NEW)
    told()
    with pytest.raises(AskAgain):
        opened(generations, NEW)
    shown(generations, NEW)
    file = opened(generations, NEW)
    closed(generations, file)
    assert len(orders) == 1


def test_whether_the_file_is_still_there_is_asked_when_its_size_is_shown_no_more(generations: Generations) -> None:
    file = opened(generations, OLD)
    shown_meanwhile: list[Attributes] = []

    def is_there() -> bool:
        shown_meanwhile.append(shown(generations, NEW))
        return True

    generations.closed(file, is_there)
    assert shown_meanwhile == [attributes(NEW)]


def test_a_name_that_was_removed_here_is_free_for_another_file(generations: Generations) -> None:
    old = opened(generations, OLD)
    generations.removed("/one/a")
    generations.require_free(PATH)
    assert shown(generations, NEW) == attributes(NEW)
    new = opened(generations, NEW)
    closed(generations, old)
    closed(generations, new)


def test_the_close_of_a_file_that_was_removed_is_not_the_one_of_the_same_file_that_is_there_again(
    generations: Generations,
) -> None:
    removed = opened(generations, OLD)
    generations.removed(PATH)
    restored = opened(generations, OLD)
    closed(generations, removed, is_there=False)
    with pytest.raises(OSError, match="still open"):
        generations.require_free(PATH)
    closed(generations, restored)
    generations.require_free(PATH)


def test_a_file_that_is_open_goes_with_the_directory_that_is_renamed(generations: Generations) -> None:
    deleted = "/one/.deleted/a"
    moved, removed = opened(generations, OLD, f"{deleted}/a.vmdk"), opened(generations, NEW)
    opened(generations, OLD, f"{deleted}b/a.vmdk")
    generations.renamed(deleted, "/one/a")
    closed(generations, removed)
    assert not generations.is_open_below(deleted)
    assert generations.is_open_below(f"{deleted}b")
    replace(generations)
    assert shown(generations, NEW) == attributes(OLD)
    closed(generations, moved, is_there=False)
    generations.require_free(PATH)


def test_a_listing_says_nothing_of_files_that_are_open(generations: Generations) -> None:
    assert not generations.is_open_below("/one/a")
    file = opened(generations, OLD)
    assert generations.is_open_below("/one/a")
    assert not generations.is_open_below("/one/a.vmdk")
    closed(generations, file)
    assert not generations.is_open_below("/one/a")


def test_a_change_is_forgotten_when_the_kernel_has_no_name_of_before(generations: Generations, clock: Clock) -> None:
    replace(generations)
    clock.now += 100
    replace(generations, ("one", "b"))
    opened(generations, NEW)


def test_changes_are_forgotten_however_many_there_were(
    generations: Generations, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those that the kernel was not told of, however long that takes."""
    monkeypatch.setattr("fusefs.generations._TOLD_SECONDS", 0.0)
    keys = [("one", str(number)) for number in range(100)]
    for key in [*keys, KEY]:
        generations.changing(key)
    clock.now += 100
    for key in keys:
        generations.told(key)
    clock.now += 100
    with pytest.raises(AskAgain):
        opened(generations, NEW)
    generations.told(KEY)
    assert [key for key in keys if is_in_doubt(generations, key)] == []
    assert is_in_doubt(generations, KEY)


def is_in_doubt(generations: Generations, key: Key) -> bool:
    try:
        generations.closed(generations.opened(key, f"/{key}", OLD, attributes(OLD), 0), lambda: True)
    except AskAgain:
        return True
    return False
