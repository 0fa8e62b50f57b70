"""The last step of a publish, without the lock's protection: it never replaces what is there."""

import contextlib
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.datastores.posix import PosixDatastore
from sidecar.images.layouts import LAYOUTS as SIDECAR_LAYOUTS
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from tests.support.places import LAYOUTS, TIMESTAMP, Place, flat_files, write_flat_disk


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
