"""A staging directory that nobody names any more is dropped, and never one that somebody does."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from protos.images.v1 import staging_service_pb2 as wire
from protos.images.v1.types_pb2 import ImageRef
from sidecar import errors
from sidecar.datastores.interface import WritableFile
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import Discovery
from sidecar.images.layouts import LAYOUTS as SIDECAR_LAYOUTS
from sidecar.images.library import Library
from sidecar.images.sessions import StagingSessions
from sidecar.images.store import ImageStore
from sidecar.locks.interface import HeldLock
from sidecar.services.requests import Requests
from sidecar.services.staging_service import StagingServicer
from tests.support.places import LAYOUTS, Place, flat_files, write_flat_disk
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
def sessions(store: ImageStore, clock: Clock) -> Iterator[StagingSessions]:
    with contextlib.closing(StagingSessions(LEASE, clock)) as sessions:
        sessions.start([store])
        yield sessions


class Failing(PosixDatastore):
    """A datastore that goes away when a lock is asked for, until `away` is cleared; or that removes nothing."""

    fails = away = stuck = False
    before_removal: Callable[[], object] = staticmethod(lambda: None)

    def lock(self, path: str, operation: str, timeout: float, check: Callable[[], None] = lambda: None) -> HeldLock:
        self.away = self.away or self.fails
        self._check()
        return super().lock(path, operation, timeout, check)

    def open_writable(self, path: str) -> WritableFile:
        self._check()
        return super().open_writable(path)

    def rename(self, source: str, destination: str) -> None:
        self._check()
        super().rename(source, destination)

    def remove_tree(self, path: str) -> int:
        if self.stuck:
            raise errors.DatastoreUnavailable("stuck")
        self.before_removal()
        return super().remove_tree(path)

    def _check(self) -> None:
        if self.away:
            raise errors.DatastoreUnavailable("away")


@pytest.fixture
def failing(place: Place, stack: ExitStack) -> Failing:
    return stack.enter_context(contextlib.closing(Failing(place.name, str(place.root))))


def test_a_request_id_that_came_twice_at_once_leaves_no_directory_that_nobody_has(
    store: ImageStore, sessions: StagingSessions, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock would be held for as long as the process lives, so that no reap frees it."""
    require_space = store.require_space

    def meanwhile(needed: int) -> None:
        monkeypatch.setattr(store, "require_space", require_space)
        sessions.create(store, "other", 0, "same")

    monkeypatch.setattr(store, "require_space", meanwhile)
    with pytest.raises(errors.InvalidRequest, match="same"):
        sessions.create(store, "mine", 0, "same")
    assert len(place.staging_directories()) == 1


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


def test_no_lease_runs_while_the_datastore_is_silent(
    sessions: StagingSessions, store: ImageStore, place: Place, clock: Clock
) -> None:
    sessions.create(store, "a", 0, "")
    silence = ["it has not answered since noon"]
    store.admission.ask(lambda: silence[0])
    for _ in range(3):
        clock.now += 100 * LEASE
        clock.wait_looks(3)
    clock.now += 100 * LEASE
    silence[0] = ""
    clock.wait_looks(3)
    assert len(place.staging_directories()) == 1, "the end of the silence came after the last look at it"
    clock.now += 2 * LEASE
    wait_until(lambda: place.holds({}), "it is dropped")


def test_one_defect_does_not_end_all_leases(
    sessions: StagingSessions, store: ImageStore, place: Place, clock: Clock
) -> None:
    met = threading.Event()

    def defect() -> str:
        if met.is_set():
            return ""
        met.set()
        raise ZeroDivisionError

    store.admission.ask(defect)
    assert met.wait(10)
    sessions.create(store, "a", 0, "")
    clock.now += 2 * LEASE
    wait_until(lambda: place.holds({}), "it is dropped")


def test_no_lease_runs_while_the_removal_of_another_one_hangs(
    failing: Failing, place: Place, clock: Clock, stack: ExitStack
) -> None:
    layout = SIDECAR_LAYOUTS[place.layout]
    layout.prepare(failing)
    store = ImageStore(failing, layout)
    sessions = stack.enter_context(contextlib.closing(StagingSessions(LEASE, clock)))
    expired = sessions.create(store, "a", 0, "")
    clock.now += LEASE * 0.6
    sessions.create(store, "b", 0, "")
    failing.before_removal = lambda: setattr(clock, "now", clock.now + 1000)
    clock.now += LEASE * 0.6
    sessions.start([store])
    wait_until(lambda: not (place.root / expired.staging.directory).exists(), "it is dropped")
    clock.wait_looks(3)
    assert len(place.staging_directories()) == 1
    clock.now += 2 * LEASE
    wait_until(lambda: place.holds({}), "the other one, too")


@pytest.fixture
def served(store: ImageStore, clock: Clock, stack: ExitStack) -> tuple[StagingServicer, StagingSessions]:
    catalog = Catalog()
    library = Library([Discovery(store, catalog)], catalog, max_copies=1, lease_seconds=LEASE)
    stack.callback(library.copies.close)
    library.sessions = stack.enter_context(contextlib.closing(StagingSessions(LEASE, clock)))
    return StagingServicer(library, Requests()), library.sessions


def test_a_maker_keeps_what_is_staged_while_the_datastore_does_not_answer(
    served: tuple[StagingServicer, StagingSessions], store: ImageStore, place: Place, clock: Clock
) -> None:
    servicer, sessions = served
    context = mock.Mock(is_active=lambda: True, time_remaining=lambda: 10.0)
    request = wire.CreateStagingRequest(ref=ImageRef(datastore=place.name, image_id="a"), request_id="request")
    staging_id = servicer.CreateStaging(request, context).staging_id
    session = sessions.create(store, "a", 0, "request")
    store.admission.ask(lambda: "it has not answered since noon")
    calls: list[Callable[[], object]] = [
        lambda: servicer.WriteFile(iter([wire.WriteFileRequest(staging_id=staging_id, name="a.vmdk")]), context),
        lambda: servicer.CommitStaging(wire.CommitStagingRequest(staging_id=staging_id), context),
    ]
    for call in calls:
        clock.now += LEASE * 0.9
        with pytest.raises(errors.DatastoreUnavailable):
            call()
        assert session.expires == clock.now + LEASE, "that it is refused is no reason to drop it"
    clock.now += LEASE * 0.9
    assert servicer.CreateStaging(request, context).staging_id == staging_id
    assert session.expires == clock.now + LEASE


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


def staged_disk(sessions: StagingSessions, store: ImageStore, place: Place) -> tuple[str, Path]:
    session = sessions.create(store, "a", 0, "")
    directory = place.root / session.staging.directory
    write_flat_disk(directory, "disk")
    (directory / "disk.ecv").write_bytes(b"{}")
    return session.id, directory


def test_a_commit_that_could_not_get_the_images_lock_loses_nothing_and_can_be_repeated(
    sessions: StagingSessions, failing: Failing, place: Place
) -> None:
    layout = SIDECAR_LAYOUTS[place.layout]
    layout.prepare(failing)
    store = ImageStore(failing, layout, lock_timeout=0.05)
    staging_id, directory = staged_disk(sessions, store, place)
    before = {path.name: path.read_bytes() for path in directory.glob("*disk*")}
    with place.locked("a"):
        for _ in range(2):
            with pytest.raises(errors.LockTimeout):
                sessions.commit(staging_id)
            # By the names that its maker knows.
            assert {path.name: path.read_bytes() for path in directory.glob("*disk*")} == before
    _, renames = sessions.commit(staging_id)
    assert renames["disk-flat.vmdk"] == "a-flat.vmdk"
    place.assert_holds({"a": flat_files("a", "a.ecv")})


def test_a_commit_during_an_outage_loses_nothing_and_can_be_repeated_after_it(
    sessions: StagingSessions, failing: Failing, place: Place
) -> None:
    layout = SIDECAR_LAYOUTS[place.layout]
    layout.prepare(failing)
    staging_id, _ = staged_disk(sessions, ImageStore(failing, layout), place)
    failing.fails = True
    with pytest.raises(errors.DatastoreUnavailable):
        sessions.commit(staging_id)
    failing.fails = failing.away = False
    sessions.commit(staging_id)
    place.assert_holds({"a": flat_files("a", "a.ecv")})


@pytest.fixture
def in_trouble(failing: Failing, place: Place) -> ImageStore:
    layout = SIDECAR_LAYOUTS[place.layout]
    layout.prepare(failing)
    return ImageStore(failing, layout)


def test_an_abort_that_failed_is_not_answered_with_ok_when_it_is_repeated(
    in_trouble: ImageStore, failing: Failing, place: Place, stack: ExitStack
) -> None:
    sessions = stack.enter_context(contextlib.closing(StagingSessions(600)))
    staging = sessions.create(in_trouble, "a", 0, "").staging
    failing.stuck = True
    for _ in range(2):
        with pytest.raises(errors.DatastoreUnavailable):
            sessions.abort(staging.token)
    with pytest.raises(errors.StagingNotFound):
        sessions.commit(staging.token)
    with pytest.raises(errors.LockTimeout):
        failing.lock(staging.place.lock, "reap", timeout=0)
    failing.stuck = False
    sessions.abort(staging.token)
    place.assert_holds({})


def test_what_an_abort_could_not_remove_goes_with_its_lease(
    in_trouble: ImageStore, failing: Failing, place: Place, clock: Clock, stack: ExitStack
) -> None:
    sessions = stack.enter_context(contextlib.closing(StagingSessions(LEASE, clock)))
    sessions.start([in_trouble])
    staging_id = sessions.create(in_trouble, "a", 0, "request").id
    failing.stuck = True
    with pytest.raises(errors.DatastoreUnavailable):
        sessions.abort(staging_id)
    assert sessions.create(in_trouble, "a", 0, "request").id != staging_id, "nobody is given what is to be removed"
    clock.now += 2 * LEASE
    clock.wait_looks(3)
    assert len(place.staging_directories()) == 2
    failing.stuck = False
    clock.now += 2 * LEASE
    wait_until(lambda: place.holds({}), "the lease tries again")


def test_a_datastore_in_trouble_keeps_no_other_ones_staging_directory(
    store: ImageStore, failing: Failing, place: Place, clock: Clock
) -> None:
    sessions = StagingSessions(LEASE, clock)
    sessions.create(ImageStore(failing, store.layout), "a", 0, "")
    sessions.create(store, "b", 0, "")
    failing.stuck = True
    sessions.close()
    assert len(place.staging_directories()) == 1


def test_the_end_of_the_sidecar_drops_them_all(store: ImageStore, place: Place, clock: Clock) -> None:
    sessions = StagingSessions(LEASE, clock)
    sessions.start([store])
    for image_id in ("a", "b", "b"):
        sessions.create(store, image_id, 0, "")
    assert len(place.staging_directories()) == 3
    sessions.close()
    place.assert_holds({})
