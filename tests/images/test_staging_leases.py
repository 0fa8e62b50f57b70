"""A staging directory that nobody names any more is dropped, and never one that somebody does."""

import contextlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.layouts import LAYOUTS as SIDECAR_LAYOUTS
from sidecar.images.sessions import StagingSessions
from sidecar.images.store import ImageStore
from tests.support.places import LAYOUTS, Place
from tests.support.processes import wait_until

LEASE = 0.04  # the thread looks four times in a lease of real time; the lease itself ends by the clock below


class Clock:
    """Seconds that pass when the test says so. Counts how often it was looked at."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.looks = itertools.count()

    def __call__(self) -> float:
        next(self.looks)
        return self.now

    def wait_looks(self, number: int) -> None:
        """Until the thread has looked that often again."""
        start = next(self.looks)
        wait_until(lambda: next(self.looks) > start + 2 * number, "the thread looks at the clock")


@pytest.fixture(params=LAYOUTS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    (tmp_path / "root").mkdir()
    return Place(request.param, LAYOUTS[request.param], tmp_path / "root")


@pytest.fixture
def store(place: Place, stack: ExitStack) -> ImageStore:
    datastore = stack.enter_context(contextlib.closing(PosixDatastore(place.name, str(place.root))))
    layout = SIDECAR_LAYOUTS[place.layout]
    layout.prepare(datastore)
    return ImageStore(datastore, layout)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Iterator[StagingSessions]:
    with contextlib.closing(StagingSessions(LEASE, clock)) as sessions:
        sessions.start()
        yield sessions


def test_a_staging_directory_lives_as_long_as_its_lease(
    sessions: StagingSessions, store: ImageStore, place: Place, clock: Clock
) -> None:
    session = sessions.create(store, "a", 0, "")
    clock.now += LEASE * 0.9
    clock.wait_looks(3)
    assert len(place.staging_directories()) == 1
    clock.now += LEASE
    wait_until(lambda: place.holds({}), "it is dropped")
    with pytest.raises(errors.StagingNotFound), sessions.using(session.id):
        pass
    with pytest.raises(errors.StagingNotFound):
        sessions.commit(session.id)
    sessions.abort(session.id)


def test_every_call_that_names_it_renews_the_lease(
    sessions: StagingSessions, store: ImageStore, place: Place, clock: Clock
) -> None:
    session = sessions.create(store, "a", 0, "request")
    for _ in range(5):
        clock.now += LEASE * 0.9
        clock.wait_looks(2)
        with sessions.using(session.id):
            pass
        clock.now += LEASE * 0.9
        clock.wait_looks(2)
        assert sessions.create(store, "a", 0, "request") is session
    clock.now += LEASE * 0.9
    with pytest.raises(errors.InvalidDisk):
        sessions.commit(session.id)
    clock.now += LEASE * 0.9
    clock.wait_looks(2)
    assert len(place.staging_directories()) == 1


def test_a_call_that_takes_longer_than_the_lease_keeps_it(
    sessions: StagingSessions, store: ImageStore, place: Place, clock: Clock
) -> None:
    session = sessions.create(store, "a", 0, "")
    with sessions.using(session.id):
        clock.now += 100 * LEASE
        clock.wait_looks(3)
        assert len(place.staging_directories()) == 1
    clock.wait_looks(3)
    assert len(place.staging_directories()) == 1  # a whole lease from the end of the call on
    clock.now += 2 * LEASE
    wait_until(lambda: place.holds({}), "it is dropped")


def test_only_the_abandoned_one_is_dropped(
    sessions: StagingSessions, store: ImageStore, place: Place, clock: Clock
) -> None:
    sessions.create(store, "a", 0, "first")
    clock.now += LEASE * 0.7
    kept = sessions.create(store, "a", 0, "second")
    clock.now += LEASE * 0.7
    wait_until(lambda: len(place.staging_directories()) == 1, "one is dropped")
    assert place.staging_directories() == [place.root / kept.staging.directory]
    # The request of the dropped one is free: it makes another.
    assert sessions.create(store, "a", 0, "first").id not in (kept.id, "")


def test_the_end_of_the_sidecar_drops_them_all(store: ImageStore, place: Place, clock: Clock) -> None:
    sessions = StagingSessions(LEASE, clock)
    sessions.start()
    for image_id in ("a", "b", "b"):
        sessions.create(store, image_id, 0, "")
    assert len(place.staging_directories()) == 3
    sessions.close()
    place.assert_holds({})
