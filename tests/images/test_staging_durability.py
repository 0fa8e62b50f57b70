"""An fsync that failed once: the kernel forgets it, and the sidecar must not."""

import contextlib
import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.client import SidecarClient
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.copying import OpenImage, clone_files
from sidecar.images.layouts import LAYOUTS as SIDECAR_LAYOUTS
from sidecar.images.progress import Progress
from sidecar.images.sessions import StagingSessions
from sidecar.images.store import ImageStore
from tests.support.inside import serving
from tests.support.places import LAYOUTS, Place, flat_files, write_flat_disk

FAULTS = {
    errno.EIO: errors.StagingLost,
    errno.EROFS: errors.StagingLost,
    errno.ENOSPC: errors.NoSpace,
}


class FailingOnce:
    """os.fsync, which fails once and is fine afterwards, as after a write-back that failed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = os.fsync
        self._left = 0
        self._error = 0
        self._only = ""
        monkeypatch.setattr(os, "fsync", self)

    def plant(self, number: int, error: int = errno.EIO, only: str = "") -> None:
        """The `number`th from now on fails, of those of a path that ends with `only`."""
        self._left, self._error, self._only = number, error, only

    @property
    def met(self) -> bool:
        return self._left <= 0

    def __call__(self, fd: int) -> None:
        if self._left > 0 and os.readlink(f"/proc/self/fd/{fd}").endswith(self._only):
            self._left -= 1
            if not self._left:
                raise OSError(self._error, os.strerror(self._error))
        self._real(fd)


@pytest.fixture
def fsync(monkeypatch: pytest.MonkeyPatch) -> FailingOnce:
    return FailingOnce(monkeypatch)


@pytest.fixture(params=LAYOUTS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    (tmp_path / "root").mkdir()
    return Place(request.param, LAYOUTS[request.param], tmp_path / "root")


@pytest.fixture
def store(place: Place, stack: ExitStack) -> ImageStore:
    datastore = stack.enter_context(contextlib.closing(PosixDatastore(place.name, str(place.root))))
    layout = SIDECAR_LAYOUTS[place.layout]
    layout.prepare(datastore)
    return ImageStore(datastore, layout, lock_timeout=0.05)


@pytest.fixture
def sessions(store: ImageStore, stack: ExitStack) -> StagingSessions:
    return stack.enter_context(contextlib.closing(StagingSessions(600)))


def stage(sessions: StagingSessions, store: ImageStore, place: Place) -> str:
    session = sessions.create(store, "a", 0, "request")
    write_flat_disk(place.root / session.staging.directory, "disk")
    (place.root / session.staging.directory / "disk.ecv").write_bytes(b"{}")
    return session.id


@pytest.mark.parametrize("error", FAULTS)
def test_no_commit_publishes_what_an_fsync_before_it_could_not_write(
    sessions: StagingSessions, store: ImageStore, place: Place, fsync: FailingOnce, error: int
) -> None:
    """Of every fsync of a commit, one after the other."""
    place.directory("a").parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 100):
        staging_id = stage(sessions, store, place)
        fsync.plant(number, error)
        try:
            sessions.commit(staging_id)
        except errors.ImagesError as failure:
            assert type(failure) is FAULTS[error], "with UNAVAILABLE a client would commit again by itself"
            assert "start the import again" in failure.message
            with pytest.raises(errors.StagingNotFound):
                sessions.commit(staging_id)
            place.assert_holds({})
            continue
        break
    assert number > 6, "each file, the directory, and the descriptor, which is rewritten"
    place.assert_holds({"a": flat_files("a", "a.ecv")})


def test_a_directory_whose_entry_could_not_be_written_is_not_taken_for_durable(
    tmp_path: Path, stack: ExitStack, fsync: FailingOnce
) -> None:
    datastore = stack.enter_context(contextlib.closing(PosixDatastore("one", str(tmp_path))))
    fsync.plant(1)
    with pytest.raises(errors.DatastoreUnavailable):
        datastore.make_directory("images/ab", parents=True)
    assert not list(tmp_path.iterdir())


def test_a_client_does_not_publish_by_its_own_retry_what_the_disk_refused(tmp_path: Path, fsync: FailingOnce) -> None:
    place = Place("one", "compound", tmp_path / "one")
    with serving(tmp_path, [place], PosixDatastore) as address, SidecarClient(address) as client:
        staging = client.create_staging("one/a")
        write_flat_disk(place.root / staging.directory, "disk")
        fsync.plant(1, only="-flat.vmdk")
        for _ in range(2):
            with pytest.raises(errors.StagingLost, match="start the import again"):
                staging.commit(request_id="the same")
        with pytest.raises(errors.StagingNotFound):
            staging.commit()
        place.assert_holds({})
        with client.create_staging("one/a") as again:
            write_flat_disk(place.root / again.directory, "disk")
            again.commit()
    place.assert_holds({"a": flat_files("a")})


def test_a_cloned_disk_that_the_disk_refused_is_not_committed(
    sessions: StagingSessions, store: ImageStore, place: Place, fsync: FailingOnce
) -> None:
    place.plant("source")
    staging_id = sessions.create(store, "a", 0, "request").id
    fsync.plant(1, only="-flat.vmdk")
    with pytest.raises(errors.StagingLost), sessions.using(staging_id) as staging, OpenImage(store, "source") as opened:
        clone_files(opened, staging, Progress(), disk_only=True)
    with pytest.raises(errors.StagingNotFound):
        sessions.commit(staging_id)
    assert place.staging_directories() == []
    assert sessions.create(store, "a", 0, "request").id != staging_id, "the request makes a new one"


def test_a_call_that_still_runs_keeps_no_refused_disk_for_a_commit(
    sessions: StagingSessions, store: ImageStore, place: Place, fsync: FailingOnce
) -> None:
    place.plant("source")
    staging_id = sessions.create(store, "a", 0, "request").id
    fsync.plant(1, only="-flat.vmdk")
    with sessions.using(staging_id):
        with (
            pytest.raises(errors.StagingLost),
            sessions.using(staging_id) as staging,
            OpenImage(store, "source") as opened,
        ):
            clone_files(opened, staging, Progress(), disk_only=True)
        with pytest.raises(errors.StagingLost):
            sessions.commit(staging_id)
    assert place.staging_directories() == []


def test_a_failed_fsync_while_a_commit_is_taken_back_is_not_forgotten(
    sessions: StagingSessions, store: ImageStore, place: Place, monkeypatch: pytest.MonkeyPatch, fsync: FailingOnce
) -> None:
    """The commit waits for the image's lock in vain; the descriptor gets its old text, and that fails."""
    staging_id = stage(sessions, store, place)
    lock = store.datastore.lock

    def refuse(path: str, operation: str, timeout: float, check: Callable[[], None] = lambda: None) -> object:
        if operation.startswith("publish"):
            fsync.plant(1, only="a.vmdk")
        return lock(path, operation, timeout, check)

    monkeypatch.setattr(store.datastore, "lock", refuse)
    with place.locked("a"), pytest.raises(errors.StagingLost):
        sessions.commit(staging_id)
    assert fsync.met
    with pytest.raises(errors.StagingNotFound):
        sessions.commit(staging_id)
    assert place.staging_directories() == []
