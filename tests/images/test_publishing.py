"""The last step of a publish, without the lock's protection: it never replaces what is there."""

import contextlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.datastores.interface import OpenDirectory
from sidecar.datastores.posix import PosixDatastore
from sidecar.errors import DatastoreUnavailable
from sidecar.images.copying import copy_image
from sidecar.images.deletion import delete_image, restore_image
from sidecar.images.image import ImageState
from sidecar.images.layouts import LAYOUTS as SIDECAR_LAYOUTS
from sidecar.images.metadata import update_companions
from sidecar.images.progress import Progress
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from tests.support.places import LAYOUTS, TIMESTAMP, TOMBSTONE, Place, flat_files, write_flat_disk


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


class Unreadable(PosixDatastore):
    """A datastore on which an image cannot be read any more once its files are such ones."""

    unreadable: Callable[[set[str]], bool] = staticmethod(lambda names: False)

    def open_directory(self, path: str) -> OpenDirectory:
        if self.unreadable(set(self._names(path))):
            raise DatastoreUnavailable(f"{path}: Input/output error")
        return super().open_directory(path)

    def _names(self, path: str) -> list[str]:
        with contextlib.closing(super().open_directory(path)) as directory:
            return directory.names()


@pytest.fixture
def failing(place: Place, stack: ExitStack) -> ImageStore:
    """A store whose changes can neither be read again nor told."""
    datastore = stack.enter_context(contextlib.closing(Unreadable(place.name, str(place.root))))
    SIDECAR_LAYOUTS[place.layout].prepare(datastore)
    store = ImageStore(datastore, SIDECAR_LAYOUTS[place.layout])

    def refuse(image_id: str) -> None:
        raise RuntimeError("a defect of who is told")

    store.observe(refuse)
    return store


def break_when(store: ImageStore, unreadable: Callable[[set[str]], bool]) -> None:
    assert isinstance(store.datastore, Unreadable)
    store.datastore.unreadable = unreadable


def test_an_image_that_was_published_is_never_told_to_have_failed(failing: ImageStore, place: Place) -> None:
    place.plant("source")
    break_when(failing, lambda names: place.descriptor("a").exists() and "a.vmdk" in names)
    image = copy_image(failing, "source", failing, "a", Progress())
    assert (image.key.image_id, image.state) == ("a", ImageState.VALID)
    assert image.touched_ns == place.file("a", TIMESTAMP).stat().st_mtime_ns
    place.assert_holds({"source": flat_files("source"), "a": flat_files("a")})


def test_a_restore_that_was_made_is_never_told_to_have_failed(failing: ImageStore, place: Place) -> None:
    place.plant("a")
    delete_image(failing, "a")
    break_when(failing, lambda names: TOMBSTONE not in names)
    image = restore_image(failing, "a")
    assert (image.state, image.tombstoned_ns) == (ImageState.VALID, None)
    place.assert_holds({"a": flat_files("a")})


def test_a_companion_that_was_written_is_never_told_to_have_failed(failing: ImageStore, place: Place) -> None:
    place.plant("a")
    break_when(failing, lambda names: "a.ecv" in names)
    assert update_companions(failing, "a", {"a.ecv": b"{}"}, ()).state is ImageState.VALID
    place.assert_holds({"a": flat_files("a", "a.ecv")})


def test_an_image_was_used_when_it_was_published_however_long_that_took(
    place: Place, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan that began while its files were made durable would have it marked, and swept."""
    now = [1_700_000_000 * 10**9]
    datastore = stack.enter_context(contextlib.closing(PosixDatastore(place.name, str(place.root))))
    SIDECAR_LAYOUTS[place.layout].prepare(datastore)
    store = ImageStore(datastore, SIDECAR_LAYOUTS[place.layout], clock=lambda: now[0])
    place.plant("source")
    sync_file = datastore.sync_file

    def slowly(path: str) -> None:
        now[0] += 60 * 10**9
        sync_file(path)

    monkeypatch.setattr(datastore, "sync_file", slowly)
    image = copy_image(store, "source", store, "a", Progress())
    assert image.touched_ns == now[0] > 1_700_000_000 * 10**9
    assert place.file("a", TIMESTAMP).stat().st_mtime_ns == now[0]


@pytest.mark.parametrize("there", ["an image", "one file"])
def test_a_publish_onto_what_came_in_between_is_refused_and_leaves_both(
    store: ImageStore, place: Place, there: str
) -> None:
    with StagingDirectory(store, "a", "test") as staging:
        write_flat_disk(place.root / staging.directory, "a", seed=1)
        (place.root / staging.directory / TIMESTAMP).touch()
        staged = {path.name: path.read_bytes() for path in (place.root / staging.directory).glob("*[!k]")}
        place.directory("a").mkdir(parents=True, exist_ok=True)
        if there == "an image":
            write_flat_disk(place.directory("a"), "a", seed=2)
            (place.directory("a") / TIMESTAMP).touch()
        else:
            (place.directory("a") / "a.ecv").touch()
        before = {path.name: path.read_bytes() for path in place.directory("a").glob("[!l]*") if path.is_file()}
        with pytest.raises(FileExistsError):
            store.layout.publish(store.datastore, staging.place, "a")
        assert before == {path.name: path.read_bytes() for path in place.directory("a").glob("[!l]*") if path.is_file()}
        left = {path.name: path.read_bytes() for path in (place.root / staging.directory).glob("*[!k]")}
        assert left == staged
    place.assert_holds({"a": flat_files("a") if there == "an image" else {"a.ecv"}})


def test_what_an_undo_meets_does_not_hide_why_the_publish_failed(
    store: ImageStore, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.plant("source")
    rename, undone = store.datastore.rename, list[str]()

    def fail_to_sync(path: str) -> None:
        if place.file("a", TIMESTAMP).exists():
            raise DatastoreUnavailable("why it failed")

    def fail_to_undo(source: str, destination: str) -> None:
        if (place.root / source).is_relative_to(place.directory("a")) and "tmp_image" in destination:
            undone.append(source)
            if len(undone) == 1:
                raise DatastoreUnavailable("what the undo met")
        rename(source, destination)

    monkeypatch.setattr(store.datastore, "sync_directory", fail_to_sync)
    monkeypatch.setattr(store.datastore, "rename", fail_to_undo)
    with pytest.raises(DatastoreUnavailable, match="why it failed"):
        copy_image(store, "source", store, "a", Progress())
    if place.layout == "vsan":
        place.assert_holds({"source": flat_files("source"), "a": {TIMESTAMP}})  # the rest is undone all the same


@pytest.mark.parametrize("place", ["three"], indirect=True)
def test_a_disk_that_a_server_moves_late_finds_its_companions_there(
    store: ImageStore, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone it would be taken for a whole image that lost its timestamp only."""
    place.plant("source", companions={"source.ecv": b"{}"})
    moves: list[tuple[str, str]] = []

    def give_no_answer(source: str, destination: str) -> None:
        moves.append((source, destination))
        raise DatastoreUnavailable("no answer")

    monkeypatch.setattr(store.datastore, "move_disk", give_no_answer)
    monkeypatch.setattr(StagingDirectory, "_remove", lambda staging: None)  # its server still has the disk
    with pytest.raises(DatastoreUnavailable, match="no answer"):
        copy_image(store, "source", store, "a", Progress())
    assert len(moves) == 1
    store.datastore.rename(*moves[0])
    assert {"a.ecv", "a.vmdk"} <= {path.name for path in place.directory("a").iterdir()}
