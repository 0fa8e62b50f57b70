"""Copies that stand still hold their own places and no others: what is small is answered beside all of them."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import CopyCall, SidecarClient
from sidecar.datastores.interface import WritableFile
from sidecar.datastores.posix import PosixDatastore
from tests.crash.support import answers
from tests.support.inside import serving
from tests.support.places import Place, flat_files

QUICK = 4.0  # seconds: less than after which small calls that wait in line are refused
LIMIT = 30.0
COPIES = 16  # places for copies inside each datastore, and as many between the two: the defaults of the configuration


class StandingStill(PosixDatastore):
    """No file that is staged here is opened before `go_on`."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name, path)
        self.go_on = threading.Event()
        self.standing = threading.Semaphore(0)

    def open_writable(self, path: str) -> WritableFile:
        if not self.go_on.is_set():
            self.standing.release()
            assert self.go_on.wait(LIMIT)
        return super().open_writable(path)


@pytest.fixture
def datastores() -> dict[str, StandingStill]:
    return {}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Place]:
    layouts = {"one": "compound", "two": "sharded"}
    places = {name: Place(name, layout, tmp_path / name) for name, layout in layouts.items()}
    for place in places.values():
        place.root.mkdir()
        place.plant("a")
    return places


@pytest.fixture
def address(
    tmp_path: Path, stack: ExitStack, places: dict[str, Place], datastores: dict[str, StandingStill]
) -> Iterator[str]:
    def make(name: str, path: str) -> StandingStill:
        return datastores.setdefault(name, StandingStill(name, path))

    with serving(tmp_path, places.values(), make) as address:
        try:
            yield address
        finally:
            for datastore in datastores.values():
                datastore.go_on.set()


def test_small_calls_are_answered_while_all_places_for_copies_are_taken(
    address: str, stack: ExitStack, places: dict[str, Place], datastores: dict[str, StandingStill]
) -> None:
    client = stack.enter_context(SidecarClient(address, timeout=LIMIT))
    quick = stack.enter_context(SidecarClient(address, timeout=QUICK))
    copies: list[CopyCall] = []
    for source, destination in (("one", "one"), ("one", "two"), ("two", "two")):
        copies += [client.copy(f"{source}/a", f"{destination}/{source}-{number}") for number in range(COPIES)]
    for name, count in (("one", COPIES), ("two", 2 * COPIES)):
        for _ in range(count):
            assert datastores[name].standing.acquire(timeout=LIMIT), f"fewer copies than places on {name}"
    for way in (("one", "one"), ("one", "two"), ("two", "one"), ("two", "two")):
        assert answers(client.copy(f"{way[0]}/a", f"{way[1]}/more").wait) == "TOO_MANY_CALLS"

    for name in places:
        # More than there are places for small calls: none is kept.
        for _ in range(20):
            quick.touch(f"{name}/a")
            assert quick.image(f"{name}/a").ref.image_id == "a"
            assert [image.ref.image_id for image in quick.images(name)] == ["a"]
        quick.delete(f"{name}/a")
        quick.restore(f"{name}/a")
        assert quick.datastore(name).image_count == 1
    assert not any(datastore.go_on.is_set() for datastore in datastores.values())

    for datastore in datastores.values():
        datastore.go_on.set()
    for copy in copies:
        copy.wait()
    names = {name: ["a"] for name in places}
    for source, destination in (("one", "one"), ("one", "two"), ("two", "two")):
        names[destination] += [f"{source}-{number}" for number in range(COPIES)]
    for name, place in places.items():
        place.assert_holds({image_id: flat_files(image_id) for image_id in names[name]})
