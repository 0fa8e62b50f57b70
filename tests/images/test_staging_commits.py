"""A commit that runs: what others ask of its staging directory meanwhile, and what becomes of it when nobody waits."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from protos.images.v1 import staging_service_pb2 as wire
from sidecar import errors
from sidecar.client import Staging
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.layouts import LAYOUTS as SIDECAR_LAYOUTS
from sidecar.images.publishing import publish
from sidecar.images.sessions import UNTOLD_SECONDS, StagingSessions
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from tests.support.places import LAYOUTS, Place, flat_files, write_flat_disk
from tests.support.processes import wait_until
from tests.support.world import World

# Long enough for the calls of a test, and whatever it takes, what they answer is the same.
CONFIG = "[limits]\nlock_timeout_seconds = 2\n"
LEASE = 600.0
LIMIT = 20.0  # seconds


@pytest.fixture
def staging(world: World, place: Place) -> Iterator[Staging]:
    """A whole disk, staged as image `a`."""
    with world.client.create_staging(f"{place.name}/a") as staging:
        write_flat_disk(place.root / staging.directory, "disk")
        yield staging


def wait_committing(directory: Path) -> None:
    wait_until((directory / "a.vmdk").exists, "the commit runs")


def begin_commit(world: World, place: Place, staging: Staging) -> "Future[wire.CommitStagingResponse]":
    call = world.staging.CommitStaging.future(wire.CommitStagingRequest(staging_id=staging.id, request_id=staging.id))
    wait_committing(place.root / staging.directory)
    return call  # type: ignore[return-value]  # the part of it that is used here


def test_a_commit_that_lost_its_caller_is_answered_to_the_next_one(
    world: World, place: Place, staging: Staging
) -> None:
    with place.locked("a"):
        begin_commit(world, place, staging).cancel()
        staging.renew()
        with pytest.raises(errors.LockTimeout):
            staging.commit()
        staging.renew()
    staging.commit()
    place.assert_holds({"a": flat_files("a")})


def test_a_commit_is_dropped_by_an_abort_before_that_is_answered(world: World, place: Place, staging: Staging) -> None:
    with place.locked("a"):
        call = begin_commit(world, place, staging)
        staging.abort()
        assert place.staging_directories() == []
        with pytest.raises(Exception, match="it was published, dropped"):
            call.result(LIMIT)
    with contextlib.suppress(FileNotFoundError):
        place.directory("a").rmdir()  # layout vsan: the lock of the test was still in it
    place.assert_holds({})


def test_who_aborts_what_was_published_is_told_so(world: World, place: Place, staging: Staging) -> None:
    world.staging.CommitStaging(wire.CommitStagingRequest(staging_id=staging.id))  # whose answer is lost
    with pytest.raises(errors.StagingPublished, match=f"published, as {place.name}/a"):
        staging.abort()
    place.assert_holds({"a": flat_files("a")})


class Gated(PosixDatastore):
    """A datastore with hooks: before a file is made durable, before a rename, and in the middle of a removal."""

    before_sync: Callable[[], object] = staticmethod(lambda: None)
    before_rename: Callable[[], object] = staticmethod(lambda: None)
    while_removing: Callable[[], object] = staticmethod(lambda: None)

    def sync_file(self, path: str) -> None:
        self.before_sync()
        super().sync_file(path)

    def rename(self, source: str, destination: str) -> None:
        self.before_rename()
        super().rename(source, destination)

    def remove_tree(self, path: str) -> int:
        for name in self.names(path):
            if name.endswith("-flat.vmdk"):
                self.remove_file(f"{path}/{name}")
        self.while_removing()
        return super().remove_tree(path)


class Gate:
    """Where a thread stops until the test opens it; open after the test in any case."""

    def __init__(self, stack: ExitStack) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()
        stack.callback(self.open)

    def __call__(self, *_: object) -> None:
        self._reached.set()
        assert self._opened.wait(LIMIT)

    def open(self) -> None:
        self._opened.set()

    def wait(self) -> None:
        assert self._reached.wait(LIMIT)


@pytest.fixture(params=LAYOUTS)
def own_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    (tmp_path / "root").mkdir()
    return Place(request.param, LAYOUTS[request.param], tmp_path / "root")


@pytest.fixture
def gated(own_place: Place, stack: ExitStack) -> Gated:
    datastore = stack.enter_context(contextlib.closing(Gated(own_place.name, str(own_place.root))))
    SIDECAR_LAYOUTS[own_place.layout].prepare(datastore)
    return datastore


@pytest.fixture
def store(own_place: Place, gated: Gated) -> ImageStore:
    return ImageStore(gated, SIDECAR_LAYOUTS[own_place.layout], lock_timeout=0.5)


@pytest.fixture
def pool(stack: ExitStack) -> ThreadPoolExecutor:
    return stack.enter_context(ThreadPoolExecutor(4))


@pytest.fixture
def gate(stack: ExitStack, pool: ThreadPoolExecutor) -> Gate:
    return Gate(stack)


@pytest.fixture
def sessions(store: ImageStore, pool: ThreadPoolExecutor) -> Iterator[StagingSessions]:
    with contextlib.closing(StagingSessions(LEASE)) as sessions:
        yield sessions


def stage(sessions: StagingSessions, store: ImageStore, place: Place) -> str:
    session = sessions.create(store, "a", 0, "request")
    write_flat_disk(place.root / session.staging.directory, "disk")
    return session.id


def waits_for_outcome() -> bool:
    """Whether some thread waits for a commit that another runs."""
    for frame in sys._current_frames().values():
        at = frame
        while at.f_back is not None:
            if at.f_code.co_name == "_outcome":
                return True
            at = at.f_back
    return False


def test_a_renewal_while_a_commit_runs_that_then_fails_loses_nothing(
    sessions: StagingSessions, store: ImageStore, own_place: Place, pool: ThreadPoolExecutor
) -> None:
    staging_id = stage(sessions, store, own_place)
    (directory,) = own_place.staging_directories()
    with own_place.locked("a"):
        commit = pool.submit(sessions.commit, staging_id)
        wait_committing(directory)
        assert sessions.create(store, "a", 0, "request").id == staging_id
        with pytest.raises(errors.LockTimeout):
            commit.result(LIMIT)
    assert sessions.create(store, "a", 0, "request").id == staging_id
    sessions.commit(staging_id)
    own_place.assert_holds({"a": flat_files("a")})


def test_two_commits_at_once_are_one(
    sessions: StagingSessions, store: ImageStore, gated: Gated, own_place: Place, pool: ThreadPoolExecutor, gate: Gate
) -> None:
    staging_id = stage(sessions, store, own_place)
    gated.before_sync = gate
    first = pool.submit(sessions.commit, staging_id)
    gate.wait()
    with pytest.raises(errors.DeadlineExceeded, match="not ended"):
        sessions.commit(staging_id, timeout=0.01)
    second = pool.submit(sessions.commit, staging_id)
    wait_until(waits_for_outcome, "the second waits for the first")
    gate.open()
    assert second.result(LIMIT) is first.result(LIMIT)
    own_place.assert_holds({"a": flat_files("a")})


def test_an_abort_says_nothing_before_it_knows_and_then_that_it_came_too_late(
    sessions: StagingSessions, store: ImageStore, own_place: Place, pool: ThreadPoolExecutor, gate: Gate
) -> None:
    staging_id = stage(sessions, store, own_place)
    store.observe(gate)  # told when it is published, in the middle of the commit
    commit = pool.submit(sessions.commit, staging_id)
    gate.wait()
    with pytest.raises(errors.DeadlineExceeded, match="not ended"):
        sessions.abort(staging_id, timeout=0.01)
    abort = pool.submit(sessions.abort, staging_id)
    wait_until(waits_for_outcome, "the abort waits for the commit")
    gate.open()
    commit.result(LIMIT)
    with pytest.raises(errors.StagingPublished):
        abort.result(LIMIT)
    own_place.assert_holds({"a": flat_files("a")})


def test_an_abort_that_ran_out_of_time_still_keeps_it_from_being_published(
    sessions: StagingSessions, store: ImageStore, gated: Gated, own_place: Place, pool: ThreadPoolExecutor, gate: Gate
) -> None:
    staging_id = stage(sessions, store, own_place)
    gated.before_sync = gate
    commit = pool.submit(sessions.commit, staging_id)
    gate.wait()
    with pytest.raises(errors.DeadlineExceeded):
        sessions.abort(staging_id, timeout=0.01)
    gate.open()
    with pytest.raises(errors.StagingNotFound):
        commit.result(LIMIT)
    own_place.assert_holds({})


def test_an_abort_that_comes_while_another_one_fails_is_not_answered_before_it_is_gone(
    sessions: StagingSessions, store: ImageStore, gated: Gated, own_place: Place, pool: ThreadPoolExecutor, gate: Gate
) -> None:
    def fail() -> None:
        gated.while_removing = lambda: None
        gate()
        raise errors.DatastoreUnavailable("away")

    staging_id = stage(sessions, store, own_place)
    gated.while_removing = fail
    first = pool.submit(sessions.abort, staging_id)
    gate.wait()
    with pytest.raises(errors.DeadlineExceeded, match="not ended"):
        sessions.abort(staging_id, timeout=0.01)
    second = pool.submit(sessions.abort, staging_id)
    gate.open()
    with pytest.raises(errors.DatastoreUnavailable):
        first.result(LIMIT)
    second.result(LIMIT)
    own_place.assert_holds({})


def test_an_abort_waits_for_a_writer_that_a_commit_waits_for(
    sessions: StagingSessions, store: ImageStore, own_place: Place, pool: ThreadPoolExecutor
) -> None:
    staging_id = stage(sessions, store, own_place)
    with sessions.using(staging_id):
        commit = pool.submit(sessions.commit, staging_id)
        wait_until(lambda: refuses_calls(sessions, staging_id), "the commit has begun")
        with pytest.raises(errors.DeadlineExceeded):
            sessions.abort(staging_id, timeout=0.01)
        abort = pool.submit(sessions.abort, staging_id)
    abort.result(LIMIT)
    with pytest.raises(errors.StagingNotFound):
        commit.result(LIMIT)
    own_place.assert_holds({})


def refuses_calls(sessions: StagingSessions, staging_id: str) -> bool:
    try:
        with sessions.using(staging_id):
            return False
    except errors.InvalidRequest:
        return True


def test_the_end_of_the_sidecar_leaves_no_half_of_an_image_whose_commit_runs(
    sessions: StagingSessions, store: ImageStore, gated: Gated, own_place: Place, pool: ThreadPoolExecutor, gate: Gate
) -> None:
    staging_id = stage(sessions, store, own_place)
    session = sessions.create(store, "a", 0, "request")
    other = sessions.create(store, "b", 0, "")
    gated.before_sync = gate
    commit = pool.submit(sessions.commit, staging_id)
    gate.wait()
    close = pool.submit(sessions.close)
    wait_until(lambda: not (own_place.root / other.staging.directory).exists(), "the others are dropped")
    assert session.staging.held, "its own commit ends it"
    assert (own_place.root / session.staging.directory / "a-flat.vmdk").exists()
    gate.open()
    with pytest.raises(errors.StagingNotFound):
        commit.result(LIMIT)
    close.result(LIMIT)
    own_place.assert_holds({})


def test_what_is_being_removed_is_not_published(
    store: ImageStore, gated: Gated, own_place: Place, pool: ThreadPoolExecutor, gate: Gate
) -> None:
    staging = StagingDirectory(store, "a", "test")
    write_flat_disk(own_place.root / staging.directory, "a")
    gated.while_removing = gate
    abort = pool.submit(staging.abort)
    gate.wait()
    with pytest.raises(errors.StagingNotFound):
        publish(staging)
    gate.open()
    abort.result(LIMIT)
    own_place.assert_holds({})


def test_what_is_being_published_is_not_removed(store: ImageStore, gated: Gated, own_place: Place) -> None:
    staging = StagingDirectory(store, "a", "test")
    write_flat_disk(own_place.root / staging.directory, "a")
    gated.before_rename = staging.abort
    publish(staging)
    own_place.assert_holds({"a": flat_files("a")})


def test_a_directory_that_nobody_was_told_of_is_kept_for_half_a_minute_or_until_the_call_is_repeated(
    store: ImageStore,
) -> None:
    now = 1000.0
    with contextlib.closing(StagingSessions(LEASE, lambda: now)) as sessions:
        session = sessions.create(store, "a", 0, "request", lambda: False)
        assert session.expires == now + UNTOLD_SECONDS
        assert sessions.create(store, "a", 0, "request", lambda: True) is session
        assert session.expires == now + LEASE


def test_a_datastore_that_hangs_keeps_no_other_ones_abandoned_directory(
    store: ImageStore, gated: Gated, own_place: Place, tmp_path: Path, stack: ExitStack, gate: Gate
) -> None:
    fine = stack.enter_context(contextlib.closing(PosixDatastore("fine", str(tmp_path))))
    SIDECAR_LAYOUTS["compound"].prepare(fine)
    fine_store = ImageStore(fine, SIDECAR_LAYOUTS["compound"])
    now = 1000.0
    sessions = stack.enter_context(contextlib.closing(StagingSessions(0.04, lambda: now)))
    stack.callback(gate.open)
    sessions.create(store, "a", 0, "")
    gated.while_removing = gate
    sessions.start([store, fine_store])
    now += 1
    gate.wait()
    sessions.create(fine_store, "b", 0, "")
    now += 1
    wait_until(lambda: not list(tmp_path.glob("tmp_image_*")), "that of the other is dropped")
