"""Disks that others than this host copy: what they leave, and what of it is published."""

import contextlib
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.datastores.interface import Capacity, Datastore, DiskCopier, Transfer
from sidecar.datastores.posix import PosixDatastore
from sidecar.errors import DatastoreDenied, DatastoreUnavailable, NoSpace, StagingLost, StagingNotFound
from sidecar.images.copying import OpenImage, clone_files, copy_image, require_space_for_copy
from sidecar.images.image import ImageState
from sidecar.images.layouts import LAYOUTS
from sidecar.images.progress import Progress
from sidecar.images.publishing import publish
from sidecar.images.sessions import StagingSessions
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from tests.support.places import Place


class Copying(PosixDatastore):
    """A datastore whose disks `copy_files` copies, from and to these paths of descriptors."""

    copy_files: Callable[[Path, Path], None]
    begun = True
    preallocates = False

    def disk_copier(self, source: Datastore) -> DiskCopier:
        return self

    def may_preallocate(self) -> bool:
        return self.preallocates

    def copy(self, source_path: str, path: str, size: int, adapter_type: str | None, transfer: Transfer) -> None:
        self.copy_files(Path(self.root_path) / source_path, Path(self.root_path) / path)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "root").mkdir()
    return Place("one", "compound", tmp_path / "root")


@pytest.fixture
def datastore(place: Place, stack: ExitStack) -> Copying:
    return stack.enter_context(contextlib.closing(Copying(place.name, str(place.root))))


@pytest.fixture
def store(datastore: Copying) -> ImageStore:
    LAYOUTS["compound"].prepare(datastore)
    return ImageStore(datastore, LAYOUTS["compound"])


def copy_whole(source: Path, target: Path) -> None:
    shutil.copy(source.with_name(f"{source.stem}-flat.vmdk"), target.with_name(f"{target.stem}-flat.vmdk"))
    shutil.copy(source, target)


def test_what_comes_into_sight_late_is_waited_for(datastore: Copying, store: ImageStore, place: Place) -> None:
    place.plant("a")
    late = []

    def appear(source: Path, target: Path) -> None:
        copy_whole(source, target.with_name("copied.vmdk"))
        target.with_name("copied-flat.vmdk").rename(target.with_name(f"{target.stem}-flat.vmdk"))
        target.with_name("copied.vmdk").rename(target)

    def copy_files(source: Path, target: Path) -> None:
        late.append(threading.Timer(0.5, appear, (source, target)))
        late[0].start()

    datastore.copy_files = copy_files
    assert copy_image(store, "a", store, "b", Progress()).state is ImageState.VALID
    late[0].join()


def test_after_a_copy_that_failed_nothing_that_is_staged_there_is_published(
    datastore: Copying, store: ImageStore, place: Place
) -> None:
    """The server may go on with it."""
    place.plant("a")

    def copy_files(source: Path, target: Path) -> None:
        copy_whole(source, target)
        raise DatastoreUnavailable("server away")

    datastore.copy_files = copy_files
    with OpenImage(store, "a") as opened, StagingDirectory(store, "b", "import") as staging:
        with pytest.raises(DatastoreUnavailable, match="server away"):
            clone_files(opened, staging, Progress(), disk_only=True)
        with pytest.raises(StagingLost, match="server away"):
            publish(staging, lambda: None)
    assert not place.directory("b").exists()


def test_a_client_whose_clone_failed_begins_anew(
    datastore: Copying, store: ImageStore, place: Place, stack: ExitStack
) -> None:
    place.plant("a")

    def copy_files(source: Path, target: Path) -> None:
        raise DatastoreUnavailable("server away")

    datastore.copy_files = copy_files
    sessions = stack.enter_context(contextlib.closing(StagingSessions(60)))
    sessions.start([store])
    staging_id = sessions.create(store, "b", 0, "request").id
    with (
        pytest.raises(StagingLost, match=r"server away\. What is staged cannot be relied on"),
        sessions.using(staging_id) as staging,
        OpenImage(store, "a") as opened,
    ):
        clone_files(opened, staging, Progress(), disk_only=True)
    with pytest.raises(StagingNotFound):
        sessions.commit(staging_id)
    assert place.staging_directories() == []


def test_a_clone_that_was_refused_before_it_began_leaves_what_is_staged(
    datastore: Copying, store: ImageStore, place: Place, stack: ExitStack
) -> None:
    place.plant("a")

    def copy_files(source: Path, target: Path) -> None:
        raise DatastoreDenied("no privilege")

    datastore.copy_files, datastore.begun = copy_files, False
    sessions = stack.enter_context(contextlib.closing(StagingSessions(60)))
    staging_id = sessions.create(store, "b", 0, "request").id
    for _ in range(2):
        with (
            pytest.raises(DatastoreDenied, match="no privilege"),
            sessions.using(staging_id) as staging,
            OpenImage(store, "a") as opened,
        ):
            clone_files(opened, staging, Progress(), disk_only=True)
    datastore.copy_files = copy_whole
    with sessions.using(staging_id) as staging, OpenImage(store, "a") as opened:
        clone_files(opened, staging, Progress(), disk_only=True)
    assert sessions.commit(staging_id)[0].state is ImageState.VALID


def test_space_is_asked_for_what_a_copy_without_holes_needs(
    datastore: Copying, store: ImageStore, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.plant("a", size=8 << 20)
    monkeypatch.setattr(datastore, "capacity", lambda: Capacity(16 << 20, 4 << 20))
    with OpenImage(store, "a") as opened:
        assert opened.image.allocated < 4 << 20 < opened.image.size
        require_space_for_copy(opened, store)
        datastore.preallocates = True
        with pytest.raises(NoSpace, match=f"{opened.image.size} bytes are needed"):
            require_space_for_copy(opened, store)
