"""A sidecar for each module, whose datastores are emptied after each test, and what must never be touched by it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.support import Outside
from tests.support.places import LAYOUTS, Place
from tests.support.processes import wait_until
from tests.support.world import World, running_world


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("world"), config="[limits]\nlock_timeout_seconds = 5\n") as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """Empty datastores; afterwards the sidecar has no file of them open, whatever is left in them."""
    try:
        yield shared_world
        wait_until(lambda: not shared_world.open_datastore_files(), f"{shared_world.open_datastore_files()} closed", 5)
    finally:
        shared_world.clear()


@pytest.fixture(params=LAYOUTS)
def place(request: pytest.FixtureRequest, world: World) -> Place:
    return world.places[request.param]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    """A directory beside the datastores: afterwards nothing in it was written, and no secret read."""
    outside = Outside(tmp_path / "outside")
    yield outside
    outside.assert_untouched()
