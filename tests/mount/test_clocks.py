"""What the mount remembers for a while, it forgets in time: by a clock that the test owns."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fusefs.deleting import GHOST_SECONDS, Deletions
from fusefs.doubts import Key
from fusefs.provenance import SourceFile
from fusefs.pulse import Pulse
from fusefs.reading import Reader
from fusefs.rules import Rules
from fusefs.staging import RECENT_SECONDS, StagingArea
from fusefs.tree import Tree
from fusefs.watching import Watcher
from sidecar.client import SidecarClient

KEY: Key = ("one", "a")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def not_asked(source: SourceFile) -> Reader:
    raise AssertionError(f"{source} is no file of an image")


@pytest.fixture
def start_tree(client: SidecarClient, stack: ExitStack) -> Callable[[], Tree]:
    """An index that a real sidecar feeds."""

    def start() -> Tree:
        tree = Tree()
        watcher = Watcher(client, tree)
        watcher.start()
        stack.callback(watcher.stop)
        assert tree.wait_complete(20)
        return tree

    return start


def test_what_is_left_of_a_deleted_image_goes_however_often_it_is_looked_at(
    client: SidecarClient, make_image: Callable[[str], Path], start_tree: Callable[[], Tree]
) -> None:
    make_image("one/a")
    tree, clock = start_tree(), Clock()
    image = tree.image(*KEY)
    assert image is not None
    deletions = Deletions(client, Pulse(client), tree, 2.0, clock=clock)
    deletions.tombstone(KEY, image)
    begun = clock.now
    while (ghost := deletions.ghost(KEY)) is not None and clock.now < begun + 300:
        deletions.keep(ghost)
        clock.now += GHOST_SECONDS - 1
    assert 60 <= clock.now - begun < 60 + GHOST_SECONDS


def test_what_is_left_of_a_deleted_image_goes_when_nobody_goes_on(
    client: SidecarClient, make_image: Callable[[str], Path], start_tree: Callable[[], Tree]
) -> None:
    make_image("one/a")
    tree, clock = start_tree(), Clock()
    image = tree.image(*KEY)
    assert image is not None
    deletions = Deletions(client, Pulse(client), tree, 2.0, clock=clock)
    deletions.tombstone(KEY, image)
    clock.now += GHOST_SECONDS
    assert deletions.ghost(KEY) is not None
    clock.now += 0.1
    assert deletions.ghost(KEY) is None


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "left alone"])
def test_a_published_image_forgets_its_copier(
    kept: bool, client: SidecarClient, disk: Path, start_tree: Callable[[], Tree]
) -> None:
    tree, clock = start_tree(), Clock()
    area = StagingArea(client, Pulse(client), tree, Rules(tree, not_asked), clock=clock)
    datastore = tree.datastore("one")
    assert datastore is not None
    directory = area.make(datastore, "a", 0)
    for path in disk.parent.iterdir():
        file = directory.create(path.name)
        file.content.write(memoryview(path.read_bytes()), 0)
        directory.released(file, writable=True)
    area.publish(directory)
    begun = clock.now
    while (recent := area.recent(KEY)) is not None and clock.now < begun + 300:
        if kept:
            area.keep(recent)
        clock.now += RECENT_SECONDS - 1
    limit = 60 if kept else RECENT_SECONDS
    assert limit <= clock.now - begun < limit + RECENT_SECONDS
