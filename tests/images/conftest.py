"""The conformance suite: one sidecar for each module, each test with empty datastores, nothing left over after any."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places import LAYOUTS, Place
from tests.support.world import World, running_world

# TOML for the module's sidecar: a module that waits for a lock sets CONFIG.
CONFIG = "CONFIG"


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("world")
    with running_world(directory, config=getattr(request.module, CONFIG, "")) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """Empty datastores; afterwards there may be images, and nothing else."""
    try:
        yield shared_world
        shared_world.assert_tidy()
    finally:
        shared_world.clear()


@pytest.fixture(params=LAYOUTS)
def place(request: pytest.FixtureRequest, world: World) -> Place:
    """The datastore of each layout in turn."""
    return world.places[request.param]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A directory that is no datastore's."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    return directory
