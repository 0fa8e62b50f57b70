"""WatchImages: everything there is, then every change, resumable without a gap."""

import time
from pathlib import Path

import pytest

from protos.images.v1.types_pb2 import IMAGE_STATE_TOMBSTONED, IMAGE_STATE_VALID
from sidecar import errors
from sidecar.datastores.interface import Capacity
from sidecar.datastores.posix import PosixDatastore
from sidecar.images import watching
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import DatastoreStatus, Discovery
from sidecar.images.image import Image, ImageKey, ImageState
from sidecar.images.layouts import LAYOUTS
from sidecar.images.store import ImageStore
from sidecar.images.watching import Watches
from tests.support.places import TOMBSTONE, Place
from tests.support.processes import wait_until
from tests.support.world import NOTICED_SECONDS, Watcher, World, text


def test_a_watcher_is_told_what_there_is_and_then_what_changes(world: World, place: Place) -> None:
    ref, copy = f"{place.name}/a", f"{place.name}/b"
    place.plant("a")
    place.plant("dead")
    world.wait_listed(ref, f"{place.name}/dead")
    world.client.delete(f"{place.name}/dead")
    with Watcher(world.client) as watcher:
        wait_until(lambda: watcher.snapshots == 1, "the snapshot is complete")
        assert {name: image.state for name, image in watcher.images.items()} == {
            ref: IMAGE_STATE_VALID,
            f"{place.name}/dead": IMAGE_STATE_TOMBSTONED,
        }
        assert watcher.datastores == {"one", "two", "three"}
        world.client.copy(ref, copy).wait()
        wait_until(lambda: watcher.state(copy) == IMAGE_STATE_VALID, "the copy is told")
        world.client.delete(copy)
        wait_until(lambda: watcher.state(copy) == IMAGE_STATE_TOMBSTONED, "the deletion is told")
        world.client.restore(copy)
        wait_until(lambda: watcher.state(copy) == IMAGE_STATE_VALID, "the restored image is told")
        world.client.delete(copy, force=True)
        wait_until(lambda: copy in watcher.removed, "the purge is told")
        assert set(watcher.images) == {ref, f"{place.name}/dead"}
        assert watcher.snapshots == 1
        # Nothing was told that did not change.
        assert watcher.seen.count(ref) == 1


def test_an_empty_library_has_a_snapshot_too(world: World) -> None:
    with Watcher(world.client) as watcher:
        wait_until(lambda: watcher.snapshots == 1, "the snapshot is complete")
        assert watcher.images == {}
        assert watcher.token
        world.places["one"].plant("a")
        wait_until(lambda: watcher.state("one/a") == IMAGE_STATE_VALID, "the first image is told", NOTICED_SECONDS)
        assert watcher.snapshots == 1


def test_a_change_by_hand_reaches_a_watcher(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    with Watcher(world.client) as watcher:
        wait_until(lambda: watcher.snapshots == 1, "the snapshot is complete")
        place.file("a", TOMBSTONE).touch()
        wait_until(lambda: watcher.state(ref) == IMAGE_STATE_TOMBSTONED, "the tombstone is told", NOTICED_SECONDS)
        place.directory("a").rename(place.root.parent / "away")
        wait_until(lambda: ref in watcher.removed, "the removal is told", NOTICED_SECONDS)
        (place.root.parent / "away").rename(place.directory("a"))
        wait_until(lambda: ref in watcher.images, "the return is told", NOTICED_SECONDS)


def test_two_watchers_are_told_the_same(world: World) -> None:
    place = world.places["one"]
    place.plant("a")
    world.wait_listed("one/a")
    with Watcher(world.client) as first, Watcher(world.client) as second:
        for watcher in (first, second):
            wait_until(lambda: watcher.snapshots == 1, "the snapshot is complete")  # noqa: B023 - waited for at once
        world.client.copy("one/a", "two/b").wait()
        world.client.delete("one/a", force=True)
        for watcher in (first, second):
            wait_until(lambda: set(watcher.images) == {"two/b"}, "both changes are told")  # noqa: B023
            assert watcher.removed == ["one/a"]


def test_a_watcher_of_one_datastore_hears_of_no_other(world: World) -> None:
    for name in ("one", "two"):
        world.places[name].plant("a")
    world.wait_listed("one/a", "two/a")
    with Watcher(world.client, "two") as watcher:
        wait_until(lambda: watcher.snapshots == 1, "the snapshot is complete")
        assert set(watcher.images) == {"two/a"}
        assert watcher.datastores == {"two"}
        world.client.delete("one/a", force=True)
        world.client.delete("two/a", force=True)
        wait_until(lambda: watcher.removed == ["two/a"], "its own removal is told")
    assert "one/a" not in watcher.seen


def test_an_unknown_datastore_cannot_be_watched(world: World) -> None:
    with pytest.raises(errors.DatastoreNotFound):
        next(world.client.watch("four"))


def test_a_watcher_that_was_away_hears_what_it_missed_and_no_more(world: World, place: Place) -> None:
    for image_id in ("kept", "changed", "removed"):
        place.plant(image_id)
    world.wait_listed(*(f"{place.name}/{image_id}" for image_id in ("kept", "changed", "removed")))
    with Watcher(world.client) as watcher:
        wait_until(lambda: watcher.snapshots == 1, "the snapshot is complete")
    world.client.delete(f"{place.name}/changed")
    world.client.delete(f"{place.name}/removed", force=True)
    world.client.copy(f"{place.name}/kept", f"{place.name}/new").wait()
    with Watcher(world.client, resume_token=watcher.token) as resumed:
        wait_until(
            lambda: resumed.state(f"{place.name}/new") == IMAGE_STATE_VALID and bool(resumed.removed), "it is told"
        )
        assert resumed.snapshots == 0
        assert resumed.removed == [f"{place.name}/removed"]
        assert set(resumed.images) == {f"{place.name}/changed", f"{place.name}/new"}
        assert resumed.state(f"{place.name}/changed") == IMAGE_STATE_TOMBSTONED
        assert resumed.datastores == {"one", "two", "three"}
        # And goes on from there.
        world.client.restore(f"{place.name}/changed")
        wait_until(lambda: resumed.state(f"{place.name}/changed") == IMAGE_STATE_VALID, "the next change is told")


@pytest.mark.parametrize("token", ["nonsense", ":", "1", ":5", "0" * 32 + ":1", "x" * 1000, "\0", "٣:٣"])
def test_a_token_of_another_life_gets_everything_again(world: World, token: str) -> None:
    world.places["one"].plant("a")
    world.wait_listed("one/a")
    with Watcher(world.client, resume_token=token) as watcher:
        wait_until(lambda: watcher.snapshots == 1, "the snapshot is complete")
        assert set(watcher.images) == {"one/a"}


@pytest.mark.parametrize("revision", ["999999999999999", "0", "-1", ""])
def test_a_token_of_a_revision_that_never_was_gets_everything_again(world: World, revision: str) -> None:
    world.places["one"].plant("a")
    world.wait_listed("one/a")
    with Watcher(world.client) as first:
        wait_until(lambda: first.snapshots == 1, "the snapshot is complete")
    life = first.token.partition(":")[0]
    with Watcher(world.client, resume_token=f"{life}:{revision}") as watcher:
        wait_until(lambda: watcher.snapshots == 1, "the snapshot is complete")
        assert set(watcher.images) == {"one/a"}


def test_a_snapshot_of_many_messages_is_whole(world: World) -> None:
    place = world.places["one"]
    wanted = {f"one/i{number:04}" for number in range(1_100)}
    for name in wanted:
        place.plant(name.removeprefix("one/"), data=[])
    wait_until(lambda: len(world.listed()) == len(wanted), "all are listed")
    answers = []
    with world.client.watch() as watch:
        for answer in watch:
            answers.append(answer)
            if answer.snapshot_complete:
                break
    assert {text(image.ref) for answer in answers for image in answer.images} == wanted
    assert len(answers) >= 3
    assert [answer.snapshot_start for answer in answers] == [True] + [False] * (len(answers) - 1)
    # Who stops in the middle has no token that would skip the rest.
    assert [bool(answer.resume_token) for answer in answers] == [False] * (len(answers) - 1) + [True]


def put(catalog: Catalog, image_id: str) -> None:
    key = ImageKey("one", image_id)
    catalog.put(Image(key, f"image_{image_id}", ImageState.VALID))


def test_removals_that_are_long_ago_are_told_by_a_snapshot_and_never_forgotten_in_silence() -> None:
    catalog = Catalog()
    put(catalog, "kept")
    put(catalog, "early")
    before = catalog.changes_since(0, "").revision
    catalog.remove(ImageKey("one", "early"))
    assert catalog.changes_since(before, "").removed == [ImageKey("one", "early")]
    for number in range(25_000):
        put(catalog, f"i{number}")
        catalog.remove(ImageKey("one", f"i{number}"))
    changes = catalog.changes_since(before, "")
    assert changes.everything
    assert [image.key.image_id for image in changes.images] == ["kept"]
    latest = changes.revision
    put(catalog, "new")
    changes = catalog.changes_since(latest, "")
    assert not changes.everything
    assert [image.key.image_id for image in changes.images] == ["new"]


def test_a_watch_that_ends_leaves_room_for_the_next(world: World) -> None:
    # More than may run at once, one after the other.
    for _ in range(80):
        with world.client.watch() as watch:
            next(watch)


def waiting_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Watches:
    """Of datastores of which no scan ever ends."""
    monkeypatch.setattr(watching, "FIRST_SCAN_SECONDS", 0.4)
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.01)
    catalog = Catalog()
    stores = [ImageStore(PosixDatastore(name, str(tmp_path / name)), LAYOUTS["compound"]) for name in names]
    return Watches(catalog, [Discovery(store, catalog) for store in stores])


def test_datastores_that_hang_at_the_start_are_waited_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    event = next(waiting_watch(tmp_path, monkeypatch, "a", "b", "c", "d").follow("", "", lambda: True))
    assert time.monotonic() - began < 1.0
    assert event.everything
    assert event.incomplete == ["a", "b", "c", "d"]
    assert event.resume_token == ""


def test_nothing_is_told_while_an_empty_library_stays_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(range(20))
    events = list(waiting_watch(tmp_path, monkeypatch, "a").follow("", "", lambda: next(looks, None) is not None))
    assert len(events) == 1


def test_a_fault_that_comes_while_an_answer_is_made_is_told_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flickering(Discovery):
        looks = 0

        @property
        def status(self) -> DatastoreStatus:
            self.looks += 1
            return DatastoreStatus(Capacity(0, 0), "" if self.looks == 1 else "gone", 0)

    monkeypatch.setattr(watching, "FIRST_SCAN_SECONDS", 0)
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.01)
    catalog = Catalog()
    store = ImageStore(PosixDatastore("one", str(tmp_path)), LAYOUTS["compound"])
    looks = iter(range(20))
    watches = Watches(catalog, [Flickering(store, catalog)])
    assert len(list(watches.follow("", "", lambda: next(looks, None) is not None))) == 2
