"""How a datastore is read into the catalogue: what it costs, what must not disturb it, and what the log says."""

import contextlib
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.datastores.interface import OpenDirectory
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import Discovery
from sidecar.images.layouts import LAYOUTS as IMAGE_LAYOUTS
from sidecar.images.looking_ahead import LookAhead
from sidecar.images.store import ImageStore
from tests.support.places import Place
from tests.support.processes import Sidecar, wait_until
from tests.support.world import datastore_flags, make_places


class Counting(PosixDatastore):
    """Counts what is asked of each image's directory."""

    def __init__(self, root: Path) -> None:
        super().__init__("one", str(root), "nfs")  # of which nobody tells changes: it is looked at again and again
        self.opened: list[str] = []
        self.looked_ahead: list[str] = []

    def open_directory(self, path: str) -> OpenDirectory:
        self.opened.append(path)
        return super().open_directory(path)

    def look_ahead(self, path: str) -> None:
        self.looked_ahead.append(path)
        super().look_ahead(path)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_places(tmp_path)["one"]


def test_each_image_is_opened_once_and_looked_ahead_at_once_in_the_life_of_a_sidecar(
    place: Place, stack: ExitStack
) -> None:
    ids = [f"a{number:02}" for number in range(40)]
    for image_id in ids:
        place.plant(image_id)
    datastore = stack.enter_context(contextlib.closing(Counting(place.root)))
    catalog = Catalog()
    discovery = Discovery(ImageStore(datastore, IMAGE_LAYOUTS["compound"]), catalog, rescan_seconds=0.05)
    stack.callback(discovery.close)
    discovery.start()
    assert discovery.wait_first_scan(10)
    scans = datastore.opened.count("")
    wait_until(lambda: datastore.opened.count("") > scans + 2, "it looked again")
    assert catalog.ids("one") == ids
    assert sorted(path for path in datastore.opened if path) == [f"image_{image_id}" for image_id in ids]
    assert sorted(set(datastore.looked_ahead)) == sorted(datastore.looked_ahead), "none of them twice"
    assert set(datastore.looked_ahead) <= {f"image_{image_id}/{image_id}.vmdk" for image_id in ids}
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("look-ahead")]


def test_looking_ahead_at_what_cannot_be_read_disturbs_nothing(place: Place, tmp_path: Path, stack: ExitStack) -> None:
    for image_id in ("fifo", "link", "directory", "gone", "good"):
        place.plant(image_id)
        if image_id != "good":
            place.descriptor(image_id).unlink()
    os.mkfifo(place.descriptor("fifo"))
    place.descriptor("link").symlink_to(tmp_path)
    place.descriptor("directory").mkdir()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", *datastore_flags([place])))
    client = stack.enter_context(sidecar.client(timeout=10))
    images = {image.ref.image_id: image for image in client.images("one")}
    assert set(images) == {"fifo", "link", "directory", "gone", "good"}
    assert [image_id for image_id, image in sorted(images.items()) if not image.problems] == ["good"]
    assert "Traceback" not in sidecar.log.read_text()


def test_looking_ahead_ends_with_its_block_however_much_is_left(place: Place, stack: ExitStack) -> None:
    datastore = stack.enter_context(contextlib.closing(Counting(place.root)))
    paths = [f"image_a{number}/a{number}.vmdk" for number in range(200_000)]
    with LookAhead(datastore, paths):
        wait_until(lambda: bool(datastore.looked_ahead), "it began")
    assert 0 < len(datastore.looked_ahead) < len(paths)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("look-ahead")]


def test_an_open_directory_answers_of_itself_when_another_takes_its_place(
    place: Place, tmp_path: Path, stack: ExitStack
) -> None:
    place.plant("a", companions={"note": b"old"})
    datastore = stack.enter_context(contextlib.closing(PosixDatastore("one", str(place.root))))
    opened = stack.enter_context(contextlib.closing(datastore.open_directory("image_a")))
    place.directory("a").rename(tmp_path / "away")
    place.plant("a", companions={"note": b"new", "more": b""})
    assert opened.entry().inode == (tmp_path / "away").stat().st_ino
    assert "more" not in opened.names()
    assert {entry.name: entry.size for entry in opened.entries()}["note"] == 3
    assert opened.read_range("note", 0, 10) == b"old"


@pytest.mark.parametrize(
    ("configured", "real", "warned"),
    [
        ("compound", "sharded", "layout_of_that=sharded"),
        ("sharded", "compound", "layout_of_that=compound"),
        ("vsan", "sharded", "layout_of_that=sharded"),
        ("compound", "compound", ""),
    ],
)
def test_a_datastore_that_looks_empty_because_of_its_configured_layout_is_warned_of(
    tmp_path: Path, stack: ExitStack, configured: str, real: str, warned: str
) -> None:
    place = Place("one", real, tmp_path / "one")
    place.root.mkdir()
    place.plant("a")
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={place.root},layout={configured}"))
    client = stack.enter_context(sidecar.client())
    assert [image.ref.image_id for image in client.images()] == (["a"] if configured == real else [])

    def lines() -> list[str]:
        return [line for line in sidecar.log.read_text().splitlines() if "looks empty" in line]

    if not warned:
        assert not lines()
        return
    (line,) = lines()
    assert " WARNING " in line
    assert f"layout={configured} " in line and warned in line and "see=datastore.one.layout" in line


def test_who_has_the_details_of_an_image_that_another_host_replaces_gets_those_of_the_other(
    tmp_path: Path, stack: ExitStack
) -> None:
    """Layout vsan, whose listing has names only: of the same names, or with another one."""
    place = make_places(tmp_path)["three"]
    place.plant("a", companions={"a.ecv": b"{}"})
    datastore = stack.enter_context(contextlib.closing(PosixDatastore("three", str(place.root), "nfs")))
    catalog = Catalog()
    store = ImageStore(datastore, IMAGE_LAYOUTS["vsan"])
    discovery = Discovery(store, catalog)
    discovery.read("a")
    for size, companion in ((4 << 20, "a.ecv"), (2 << 20, "a.other")):
        place.directory("a").rename(tmp_path / f"before-{size}")  # so that its inode is not used again
        place.plant("a", size=size, companions={companion: b"{}"})
        discovery.refresh("a", changed=False)
        image = catalog.get(store.key("a"))
        assert image is not None and image.details_known
        assert image.capacity == size
        assert [file.name for file in image.files] == [companion, "a-flat.vmdk", "a.vmdk"]
