"""A touch is a small call: what it does not wait for, and does not read, and what it promises all the same."""

import contextlib
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.datastores.interface import OpenDirectory
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.catalog import Catalog
from sidecar.images.checking import touch_image
from sidecar.images.deletion import delete_image
from sidecar.images.discovery import Discovery
from sidecar.images.layouts import LAYOUTS as SIDECAR_LAYOUTS
from sidecar.images.store import ImageStore
from tests.crash.support import open_descriptors
from tests.support.places import LAYOUTS, TIMESTAMP, TOMBSTONE, Place
from tests.support.processes import wait_until

LIMIT = 20.0


class Slow(PosixDatastore):
    """Notes which directories are opened; to open that of `held` takes until `go_on`."""

    def __init__(self, root: Path) -> None:
        super().__init__("one", str(root))
        self.opened: list[str] = []
        self.held = ""
        self.reached, self.go_on = threading.Event(), threading.Event()

    def open_directory(self, path: str) -> OpenDirectory:
        self.opened.append(path)
        if path == self.held:
            self.reached.set()
            assert self.go_on.wait(LIMIT)
        return super().open_directory(path)


@pytest.fixture(params=LAYOUTS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    (tmp_path / "root").mkdir()
    place = Place("one", LAYOUTS[request.param], tmp_path / "root")
    for image_id in ("a", "b"):
        place.plant(image_id)
    return place


@pytest.fixture
def datastore(place: Place, stack: ExitStack) -> Slow:
    return stack.enter_context(contextlib.closing(Slow(place.root)))


@pytest.fixture
def store(place: Place, datastore: Slow) -> ImageStore:
    return ImageStore(datastore, SIDECAR_LAYOUTS[place.layout], lock_timeout=LIMIT)


@pytest.fixture
def catalog() -> Catalog:
    return Catalog()


@pytest.fixture
def discovery(store: ImageStore, catalog: Catalog) -> Discovery:
    """Without its thread: it learns what the store tells."""
    discovery = Discovery(store, catalog)
    store.observe(discovery.refresh, discovery.note_use)
    for image_id in ("a", "b"):
        discovery.read(image_id)
    return discovery


def listed(catalog: Catalog, store: ImageStore, image_id: str) -> int | None:
    image = catalog.get(store.key(image_id))
    return image.touched_ns if image else None


@pytest.mark.usefixtures("discovery")
def test_a_touch_is_listed_at_once_and_reads_the_image_once(
    datastore: Slow, store: ImageStore, catalog: Catalog
) -> None:
    datastore.opened.clear()
    used_ns = touch_image(store, "a")
    assert datastore.opened == [store.layout.image_directory("a")]
    assert listed(catalog, store, "a") == used_ns
    assert catalog.get(store.key("a")) == store.read("a")


def test_a_touch_of_what_was_thought_to_be_deleted_lists_the_image(
    place: Place, store: ImageStore, catalog: Catalog, discovery: Discovery
) -> None:
    delete_image(store, "a")
    place.file("a", TOMBSTONE).unlink()  # as another host does, and nobody told of it yet
    touch_image(store, "a")
    assert catalog.get(store.key("a")) == store.read("a")


def test_a_touch_does_not_wait_for_what_is_read_of_another_image(
    datastore: Slow, store: ImageStore, catalog: Catalog, discovery: Discovery, stack: ExitStack
) -> None:
    pool = stack.enter_context(ThreadPoolExecutor())
    stack.callback(datastore.go_on.set)
    datastore.held = store.layout.image_directory("b")
    reading = pool.submit(discovery.refresh, "b")
    assert datastore.reached.wait(LIMIT)
    used_ns = pool.submit(touch_image, store, "a").result(LIMIT)
    assert listed(catalog, store, "a") == used_ns
    assert not reading.done()


def test_a_touch_that_is_not_listed_yet_holds_no_lock(
    datastore: Slow, store: ImageStore, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    """Another image is being read, and that hangs: the two share a lock of the catalogue's."""
    monkeypatch.setattr("sidecar.images.discovery._SHARES", 1)
    discovery = Discovery(store, catalog)
    store.observe(discovery.refresh, discovery.note_use)
    pool = stack.enter_context(ThreadPoolExecutor())
    stack.callback(datastore.go_on.set)
    datastore.held = store.layout.image_directory("b")
    pool.submit(discovery.refresh, "b")
    assert datastore.reached.wait(LIMIT)
    before = store.read("a").touched_ns
    touching = pool.submit(touch_image, store, "a")
    wait_until(lambda: store.read("a").touched_ns != before, "it is touched", LIMIT)
    with store.lock("a", "look", timeout=1.0):
        assert not touching.done()


def test_nobody_waits_for_the_lock_of_an_image_while_its_touch_waits_for_the_disk(
    place: Place, store: ImageStore, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    fsync, reached, go_on = os.fsync, threading.Event(), threading.Event()
    pool = stack.enter_context(ThreadPoolExecutor())
    stack.callback(go_on.set)

    def wait(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(TIMESTAMP):
            reached.set()
            assert go_on.wait(LIMIT)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", wait)
    touching = pool.submit(touch_image, store, "a")
    assert reached.wait(LIMIT)
    with store.lock("a", "look"):
        seen_ns = store.read("a").touched_ns
    assert not touching.done(), "it was answered before it was durable"
    go_on.set()
    assert touching.result(LIMIT) == seen_ns
    assert not place.lock_file("a").exists()


def test_a_touch_that_the_disk_refused_is_not_answered_as_done(
    place: Place, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    touch_image(store, "a")  # the root is open
    before = open_descriptors(os.getpid())
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(errors.DatastoreUnavailable, match="cannot touch"):
        touch_image(store, "a")
    assert not place.lock_file("a").exists()
    assert open_descriptors(os.getpid()) == before
