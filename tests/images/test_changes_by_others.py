"""What other processes and hands do to a datastore is listed within 5 s, on every layout."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from protos.images.v1.types_pb2 import IMAGE_STATE_INCOMPLETE, IMAGE_STATE_TOMBSTONED, IMAGE_STATE_VALID
from sidecar import errors
from sidecar.client import SidecarClient
from sidecar.datastores.inotify import InotifyWatcher
from sidecar.datastores.interface import Changes
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import Discovery
from sidecar.images.image import ImageKey
from sidecar.images.layouts import LAYOUTS
from sidecar.images.store import ImageStore
from tests.support.places import MARKER, RENAMED, TIMESTAMP, TOMBSTONE, Place, flat_files
from tests.support.processes import Sidecar, wait_until
from tests.support.world import NOTICED_SECONDS, World, datastore_flags, make_places, text


@pytest.fixture
def other(world: World, tmp_path: Path, stack: ExitStack) -> SidecarClient:
    """The client of a second sidecar on the same datastores."""
    sidecar = stack.enter_context(Sidecar(tmp_path / "other", *datastore_flags(world.places.values())))
    return stack.enter_context(sidecar.client())


def state(world: World, ref: str) -> int:
    image = world.listed().get(ref)
    return image.state if image is not None else 0


def test_changes_by_another_sidecar_are_listed(world: World, place: Place, other: SidecarClient) -> None:
    ref, copy = f"{place.name}/a", f"{place.name}/b"
    place.plant("a")
    world.wait_listed(ref)
    other.copy(ref, copy).wait()
    wait_until(lambda: state(world, copy) == IMAGE_STATE_VALID, "the copy is listed", NOTICED_SECONDS)
    other.delete(copy)
    wait_until(lambda: state(world, copy) == IMAGE_STATE_TOMBSTONED, "the deletion is listed", NOTICED_SECONDS)
    other.restore(copy)
    wait_until(lambda: state(world, copy) == IMAGE_STATE_VALID, "the restored image is listed", NOTICED_SECONDS)
    world.client.image(copy)
    other.update_metadata(copy, files={"b.ecv": b"{}"})
    wait_until(
        lambda: "b.ecv" in [file.name for file in world.listed()[copy].files], "the metadata is listed", NOTICED_SECONDS
    )
    touched = other.touch(copy).replace(tzinfo=None)
    wait_until(lambda: world.listed()[copy].touch_time.ToDatetime() == touched, "the touch is listed", NOTICED_SECONDS)
    other.delete(copy, force=True)
    wait_until(lambda: state(world, copy) == 0, "the purge is listed", NOTICED_SECONDS)
    place.assert_holds({"a": flat_files("a")})


def test_a_tombstone_written_by_hand_is_seen(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    place.file("a", TOMBSTONE).touch()
    wait_until(lambda: state(world, ref) == IMAGE_STATE_TOMBSTONED, "the tombstone is seen", NOTICED_SECONDS)
    with pytest.raises(errors.ImageTombstoned):
        world.client.touch(ref)
    place.file("a", TOMBSTONE).unlink()
    wait_until(lambda: state(world, ref) == IMAGE_STATE_VALID, "its removal is seen", NOTICED_SECONDS)


def test_an_image_directory_that_is_renamed_away_is_gone(world: World, place: Place, scratch: Path) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    place.directory("a").rename(scratch / "away")
    wait_until(lambda: state(world, ref) == 0, "the image is gone", NOTICED_SECONDS)
    (scratch / "away").rename(place.directory("a"))
    wait_until(lambda: state(world, ref) == IMAGE_STATE_VALID, "the image is back", NOTICED_SECONDS)


def test_an_image_directory_that_is_removed_by_hand_is_gone(world: World, place: Place) -> None:
    place.plant("a")
    world.wait_listed(f"{place.name}/a")
    shutil.rmtree(place.directory("a"))
    wait_until(lambda: not world.listed(), "the image is gone", NOTICED_SECONDS)
    place.plant("a")
    world.wait_listed(f"{place.name}/a")


def test_a_timestamp_touched_by_hand_is_seen(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    world.client.image(ref)
    os.utime(place.file("a", TIMESTAMP), ns=(1, 1_500_000_000_000_000_000))
    wait_until(
        lambda: world.listed()[ref].touch_time.ToNanoseconds() == 1_500_000_000_000_000_000,
        "the touch is seen",
        NOTICED_SECONDS,
    )


def test_an_image_that_loses_a_file_is_incomplete(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    place.file("a", TIMESTAMP).rename(place.file("a", RENAMED))
    wait_until(lambda: state(world, ref) == IMAGE_STATE_INCOMPLETE, "it is incomplete", NOTICED_SECONDS)
    place.file("a", RENAMED).rename(place.file("a", TIMESTAMP))
    wait_until(lambda: state(world, ref) == IMAGE_STATE_VALID, "it is valid", NOTICED_SECONDS)
    place.descriptor("a").unlink()
    wait_until(lambda: state(world, ref) == IMAGE_STATE_INCOMPLETE, "it is incomplete", NOTICED_SECONDS)


def test_a_scan_marker_written_by_the_origin_is_seen(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    world.client.image(ref)
    place.file("a", MARKER).write_text("1450000000")
    wait_until(
        lambda: world.listed()[ref].marked_unused_time.seconds == 1_450_000_000, "the marker is seen", NOTICED_SECONDS
    )


def test_a_first_image_of_a_new_shard_is_seen(world: World) -> None:
    place = world.places["two"]
    for image_id in ("qq1", "qr1", "q"):
        place.plant(image_id)
        world.wait_listed(f"two/{image_id}")


def test_a_shard_that_is_removed_takes_its_images_with_it(world: World) -> None:
    place = world.places["two"]
    place.plant("qq1")
    place.plant("qr1")
    world.wait_listed("two/qq1", "two/qr1")
    shutil.rmtree(place.root / "images" / "qq")
    wait_until(lambda: set(world.listed()) == {"two/qr1"}, "the shard's image is gone", NOTICED_SECONDS)
    world.client.copy("two/qr1", "two/qq2").wait()
    assert set(world.listed()) == {"two/qr1", "two/qq2"}


def test_looking_at_an_image_never_undoes_what_is_known_of_it(world: World, place: Place) -> None:
    # The harm: GetImage reads, a deletion is listed, GetImage lists what it had read before.
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            world.client.image(ref)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(30):
            world.client.delete(ref)
            assert list(world.client.images()) == []
            world.client.restore(ref)
            assert [text(image.ref) for image in world.client.images()] == [ref]
    finally:
        ended.set()
        for looker in lookers:
            looker.join()


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_where_the_kernel_tells_of_nothing_a_rescan_finds_the_changes(
    tmp_path: Path, stack: ExitStack, name: str
) -> None:
    place = make_places(tmp_path)[name]
    config = (
        f'[datastore.{name}]\npath = "{place.root}"\ntype = "nfs"\nlayout = "{place.layout}"\nrescan_seconds = 0.2\n'
    )
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", config=config))
    client = stack.enter_context(sidecar.client())
    assert client.datastore(name).shared

    def states() -> dict[str, int]:
        images = client.images(states=[IMAGE_STATE_VALID, IMAGE_STATE_INCOMPLETE, IMAGE_STATE_TOMBSTONED])
        return {image.ref.image_id: image.state for image in images}

    place.plant("a")
    place.plant("b")
    wait_until(lambda: states() == {"a": IMAGE_STATE_VALID, "b": IMAGE_STATE_VALID}, "they are listed")
    place.file("a", TOMBSTONE).touch()
    wait_until(lambda: states()["a"] == IMAGE_STATE_TOMBSTONED, "the tombstone is seen")
    place.file("a", TOMBSTONE).unlink()
    place.file("b", TIMESTAMP).unlink()
    wait_until(lambda: states() == {"a": IMAGE_STATE_VALID, "b": IMAGE_STATE_INCOMPLETE}, "the states are seen")
    if place.layout != "vsan":  # names only there
        os.utime(place.file("a", TIMESTAMP), ns=(1, 1_500_000_000_000_000_000))
        wait_until(
            lambda: [i.touch_time.seconds for i in client.images(image_id="a")] == [1_500_000_000], "the touch is seen"
        )
    shutil.rmtree(place.directory("a"))
    wait_until(lambda: set(states()) == {"b"}, "the removal is seen")


def test_a_stray_file_or_link_among_the_shards_hides_no_image(world: World, scratch: Path) -> None:
    place = world.places["two"]
    stray, link = place.root / "images" / "x", place.root / "images" / "y"
    stray.touch()
    link.symlink_to(scratch)
    place.plant("qq1")
    world.wait_listed("two/qq1")
    stray.unlink()
    link.unlink()


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_a_file_in_place_of_an_image_is_no_image_and_hides_no_other(
    tmp_path: Path, stack: ExitStack, name: str
) -> None:
    place, client = rescanned(tmp_path, stack, name)
    place.plant("aa1")
    wait_until(lambda: [image.ref.image_id for image in client.images()] == ["aa1"], "it is listed")
    place.directory("aa1").rename(tmp_path / "away")
    place.directory("aa1").touch()
    wait_until(lambda: not list(client.images()), "it is gone")
    place.plant("zz1")
    wait_until(lambda: [image.ref.image_id for image in client.images()] == ["zz1"], "the next one is listed")


def test_an_image_that_another_host_published_anew_does_not_keep_the_files_of_the_old_one(
    tmp_path: Path, stack: ExitStack
) -> None:
    place, client = rescanned(tmp_path, stack, "three")
    place.plant("a")
    wait_until(lambda: bool(list(client.images())), "it is listed")
    old = client.image("three/a").files[0].inode
    assert next(file.inode for image in client.images() for file in image.files) == old
    place.directory("a").rename(tmp_path / "away")
    place.plant("a")
    wait_until(
        lambda: old not in [file.inode for image in client.images() for file in image.files], "the old files are gone"
    )


def rescanned(tmp_path: Path, stack: ExitStack, name: str) -> tuple[Place, SidecarClient]:
    """A datastore of which the kernel tells nothing, and a client of its sidecar."""
    place = make_places(tmp_path)[name]
    config = (
        f'[datastore.{name}]\npath = "{place.root}"\ntype = "nfs"\nlayout = "{place.layout}"\nrescan_seconds = 0.2\n'
    )
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", config=config))
    return place, stack.enter_context(sidecar.client())


class Limited(InotifyWatcher):
    """Its watches are used up at image_a, just when another image appears."""

    def __init__(self, root_fd: int, place: Place) -> None:
        super().__init__(root_fd)
        self.place = place

    def watch(self, path: str) -> bool:
        if path == "image_a":
            self.place.plant("b")
            return False
        return super().watch(path)


class Forgetful(InotifyWatcher):
    """The kernel's queue is always full."""

    def wait(self, timeout: float) -> Changes:
        return Changes({}, bool(super().wait(timeout).names))


@dataclass
class Discovered:
    """A datastore's catalogue, with a given watcher and no look at everything for a minute."""

    place: Place
    watcher: Callable[[int], InotifyWatcher]

    def __enter__(self) -> Catalog:
        class Watched(PosixDatastore):
            def watcher(self) -> InotifyWatcher:
                return make(self._root_fd)

        make, catalog = self.watcher, Catalog()
        self._datastore = Watched("one", str(self.place.root))
        self._discovery = Discovery(ImageStore(self._datastore, LAYOUTS["compound"]), catalog, rescan_seconds=60)
        self._discovery.start()
        assert self._discovery.wait_first_scan(10)
        return catalog

    def __exit__(self, *error: object) -> None:
        self._discovery.close()
        self._datastore.close()


def test_what_appears_while_the_watches_are_used_up_is_found_at_once(tmp_path: Path) -> None:
    place = make_places(tmp_path)["one"]
    with Discovered(place, lambda fd: Limited(fd, place)) as catalog:
        place.plant("a")
        wait_until(lambda: catalog.ids("one") == ["a", "b"], "both are found")


def test_after_lost_events_images_that_look_unchanged_are_read_again(tmp_path: Path) -> None:
    place = make_places(tmp_path)["one"]
    place.plant("a", companions={"a.ecv": b"{}"})
    key = ImageKey("one", "a")

    def size() -> int:
        image = catalog.get(key)
        return image.files[0].size if image else -1

    with Discovered(place, Forgetful) as catalog:
        assert size() == 2
        place.file("a", "a.ecv").write_bytes(b'{"a": 1}')
        wait_until(lambda: size() == 8, "the new size is known", NOTICED_SECONDS)


_WATCH_AS_NOBODY = """
import os, sys
from sidecar.datastores.inotify import InotifyWatcher
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
watcher = InotifyWatcher(int(sys.argv[1]))
assert watcher.watch("closed")
assert watcher.watch("open")
print(sorted(watcher._paths.values()))
"""


def test_a_directory_that_may_not_be_watched_ends_no_scan(tmp_path: Path, stack: ExitStack) -> None:
    for name, mode in (("closed", 0o700), ("open", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    tmp_path.chmod(0o755)
    root_fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, root_fd)
    command = [sys.executable, "-c", _WATCH_AS_NOBODY, str(root_fd)]
    project = Path(__file__).parents[2]
    answer = subprocess.run(command, pass_fds=[root_fd], cwd=project, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "['open']\n"), answer.stderr
