"""ListImages: pages, filters and totals, from memory, on every layout."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from protos.images.v1 import image_service_pb2 as wire
from protos.images.v1.types_pb2 import IMAGE_STATE_INCOMPLETE, IMAGE_STATE_TOMBSTONED, IMAGE_STATE_VALID
from sidecar import errors
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import Discovery
from sidecar.images.layouts import LAYOUTS
from sidecar.images.library import Library
from sidecar.images.store import ImageStore
from sidecar.images.watching import Watches
from sidecar.services.image_service import ImageServicer
from sidecar.services.requests import Requests
from tests.support.places import TIMESTAMP, Place, write_flat_disk
from tests.support.processes import wait_until
from tests.support.world import ALL_STATES, Watcher, World, text


def ids(world: World, datastore: str = "", **arguments: object) -> list[str]:
    return [image.ref.image_id for image in world.client.images(datastore, **arguments)]  # type: ignore[arg-type]


def test_a_library_of_many_pages_is_listed_once_and_in_order(world: World, place: Place) -> None:
    wanted = sorted(f"{letter}{number}" for letter in "aB_-z" for number in range(9))
    for image_id in wanted:
        place.plant(image_id)
    world.wait_listed(*(f"{place.name}/{image_id}" for image_id in wanted))
    pages = list(world.client.image_pages(place.name, page_size=7))
    assert [image.ref.image_id for page in pages for image in page.images] == wanted
    assert [len(page.images) for page in pages] == [7] * 6 + [3]
    assert {page.total_size for page in pages} == {45}
    assert [bool(page.next_page_token) for page in pages] == [True] * 6 + [False]
    assert not any(page.incomplete_datastores for page in pages)


def test_pages_go_on_where_they_were_when_images_come_and_go_between_them(world: World, place: Place) -> None:
    for image_id in "abcdef":
        place.plant(image_id)
    world.wait_listed(*(f"{place.name}/{image_id}" for image_id in "abcdef"))
    pages = world.client.image_pages(place.name, page_size=2)
    assert [image.ref.image_id for image in next(pages).images] == ["a", "b"]
    # The image at which the first page ended, and one before it: neither may shift the rest.
    world.client.delete(f"{place.name}/a", force=True)
    world.client.delete(f"{place.name}/b", force=True)
    assert [image.ref.image_id for page in pages for image in page.images] == ["c", "d", "e", "f"]


def test_a_last_page_that_is_full_is_the_last(world: World, place: Place) -> None:
    for image_id in "abcd":
        place.plant(image_id)
    world.wait_listed(*(f"{place.name}/{image_id}" for image_id in "abcd"))
    assert [len(page.images) for page in world.client.image_pages(place.name, page_size=2)] == [2, 2]
    assert [len(page.images) for page in world.client.image_pages(place.name, page_size=4)] == [4]


def test_pages_run_through_all_datastores(world: World) -> None:
    wanted = []
    for name, place in sorted(world.places.items()):
        for image_id in ("a", "b", "c"):
            place.plant(image_id)
            wanted.append(f"{name}/{image_id}")
    world.wait_listed(*wanted)
    for size in (1, 2, 4, 9):
        pages = list(world.client.image_pages(page_size=size))
        assert [text(image.ref) for page in pages for image in page.images] == wanted
        assert {page.total_size for page in pages} == {9}


def test_a_page_has_500_images_unless_asked_otherwise(world: World) -> None:
    place = world.places["one"]
    for number in range(501):
        place.plant(f"i{number:03}", data=[])
    wait_until(lambda: next(world.client.image_pages("one")).total_size == 501, "all are listed")
    assert [len(page.images) for page in world.client.image_pages("one")] == [500, 1]
    assert [len(page.images) for page in world.client.image_pages("one", page_size=5000)] == [501]


@pytest.mark.parametrize("size", [-1, 5_001, 2**31 - 1])
def test_a_page_size_that_cannot_be_meant_is_refused(world: World, size: int) -> None:
    with pytest.raises(errors.InvalidRequest, match="page_size"):
        next(world.client.image_pages(page_size=size))


@pytest.mark.parametrize("token", ["one", "/", "zzz/zzz", "a\0b", "one/" + "x" * 1000])
def test_a_page_token_of_nobody_is_no_defect(world: World, token: str) -> None:
    assert world.images.ListImages(wire.ListImagesRequest(page_token=token)).next_page_token == ""


def test_listing_by_state_shows_that_state_and_counts_it(world: World, place: Place) -> None:
    for image_id in ("valid", "broken", "deleted"):
        place.plant(image_id)
    place.file("broken", TIMESTAMP).unlink()
    world.wait_listed(f"{place.name}/valid", f"{place.name}/deleted")
    world.client.delete(f"{place.name}/deleted")
    wait_until(lambda: len(world.listed()) == 3, "all three are listed")

    def listed(*states: int) -> tuple[list[str], int]:
        page = next(world.client.image_pages(place.name, states=states))  # type: ignore[arg-type]
        return [image.ref.image_id for image in page.images], page.total_size

    assert listed(IMAGE_STATE_VALID) == (["valid"], 1)
    assert listed(IMAGE_STATE_INCOMPLETE) == (["broken"], 1)
    assert listed(IMAGE_STATE_TOMBSTONED) == (["deleted"], 1)
    assert listed(IMAGE_STATE_VALID, IMAGE_STATE_TOMBSTONED) == (["deleted", "valid"], 2)
    assert listed(*ALL_STATES) == (["broken", "deleted", "valid"], 3)


def test_a_tombstoned_image_is_hidden_and_an_incomplete_one_is_not(world: World, place: Place) -> None:
    for image_id in ("valid", "broken", "deleted"):
        place.plant(image_id)
    place.descriptor("broken").unlink()
    world.wait_listed(f"{place.name}/valid", f"{place.name}/deleted")
    world.client.delete(f"{place.name}/deleted")
    wait_until(lambda: len(world.listed()) == 3, "all three are listed")
    assert ids(world) == ids(world, place.name) == ["broken", "valid"]
    assert world.client.datastore(place.name).image_count == 2


@pytest.mark.parametrize("states", [(0,), (4,), (-1,), (IMAGE_STATE_VALID, 99)])
def test_a_state_that_is_none_is_refused(world: World, states: tuple[int, ...]) -> None:
    with pytest.raises(errors.InvalidRequest, match="no image state"):
        next(world.client.image_pages(states=states))  # type: ignore[arg-type]


def test_where_an_image_is_and_how_large(world: World) -> None:
    for name in ("one", "three"):
        world.places[name].plant("wanted")
        world.places[name].plant("wanted2")
        world.places[name].plant("want")
    world.wait_listed("one/wanted", "three/wanted", "one/want", "three/want")
    pages = list(world.client.image_pages(image_id="wanted"))
    assert [text(image.ref) for page in pages for image in page.images] == ["one/wanted", "three/wanted"]
    assert pages[0].total_size == 2
    assert ids(world, "one", image_id="wanted") == ["wanted"]
    assert ids(world, "two", image_id="wanted") == []
    world.client.delete("one/wanted")
    assert [text(image.ref) for image in world.client.images(image_id="wanted")] == ["three/wanted"]
    assert [text(image.ref) for image in world.client.images(image_id="wanted", states=ALL_STATES)] == [
        "one/wanted",
        "three/wanted",
    ]


def test_an_image_id_of_many_datastores_is_listed_in_pages(world: World) -> None:
    for place in world.places.values():
        place.plant("same")
    world.wait_listed("one/same", "two/same", "three/same")
    pages = list(world.client.image_pages(image_id="same", page_size=1))
    assert [text(image.ref) for page in pages for image in page.images] == ["one/same", "three/same", "two/same"]
    assert {page.total_size for page in pages} == {3}


def test_an_unknown_datastore_is_an_error_and_not_an_empty_one(world: World) -> None:
    with pytest.raises(errors.DatastoreNotFound, match="this sidecar has one, three, two"):
        ids(world, "four")
    with pytest.raises(errors.DatastoreNotFound):
        world.client.datastore("four")


def test_an_own_change_is_listed_when_its_call_returns(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    for _ in range(5):
        world.client.copy(ref, f"{place.name}/b").wait()
        assert ids(world, place.name) == ["a", "b"]
        world.client.delete(f"{place.name}/b")
        assert ids(world, place.name) == ["a"]
        world.client.restore(f"{place.name}/b")
        assert ids(world, place.name) == ["a", "b"]
        world.client.delete(f"{place.name}/b", force=True)
        assert ids(world, place.name) == ["a"]


def test_a_listing_has_what_a_table_of_images_shows(world: World, place: Place) -> None:
    place.plant("a", companions={"a.ecv": b"{}"})
    world.wait_listed(f"{place.name}/a")
    if place.layout == "vsan":
        listed = world.listed()[f"{place.name}/a"]
        assert listed.state == IMAGE_STATE_VALID
        assert not listed.details_known
        assert not listed.files
        world.client.image(f"{place.name}/a")
    listed, image = world.listed()[f"{place.name}/a"], world.client.image(f"{place.name}/a")
    assert listed.details_known
    image.ClearField("metadata_json")  # only asked for by GetImage
    assert listed == image


def test_what_is_listed_of_an_image_is_never_older_than_its_last_change(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    world.wait_listed(ref)
    before = world.client.image(ref)
    touched = world.client.touch(ref)
    assert world.listed()[ref].touch_time.ToDatetime() == touched.replace(tzinfo=None)
    world.client.update_metadata(ref, files={"a.ecv": b"{}"})
    assert [file.name for file in world.listed()[ref].files] == ["a.ecv", "a-flat.vmdk", "a.vmdk"]
    assert world.listed()[ref].touch_time.ToNanoseconds() > before.touch_time.ToNanoseconds()


@pytest.mark.parametrize(
    "name",
    [
        "image_.hidden",
        "image_",
        "image_a b",
        "image",
        "other",
        "vm_a",
        "tmp_image_x",
        "deleted_images",
        "image_a.ec_lock",
    ],
)
def test_directories_of_other_names_are_no_images(world: World, name: str) -> None:
    for place in (world.places["one"], world.places["three"]):
        place.plant("marker")
        (place.root / name).mkdir(exist_ok=True)
        (place.root / name / "image_timestamp.txt").touch()
    world.wait_listed("one/marker", "three/marker")
    assert set(world.listed()) == {"one/marker", "three/marker"}
    for place in (world.places["one"], world.places["three"]):
        (place.root / name / "image_timestamp.txt").unlink()
        (place.root / name).rmdir()


def test_an_image_in_another_shard_than_its_own_is_none(world: World) -> None:
    place = world.places["two"]
    place.plant("abc")
    stray = place.root / "images" / "zz"
    stray.mkdir()
    place.directory("abc").rename(stray / "abc")
    place.plant("marker")
    world.wait_listed("two/marker")
    wait_until(lambda: set(world.listed()) == {"two/marker"}, "only the image in its place is listed")
    with pytest.raises(errors.ImageNotFound):
        world.client.image("two/abc")
    shutil.rmtree(stray)


def test_datastores_that_hang_at_the_start_are_waited_for_together(tmp_path: Path) -> None:
    # Of none of them a first scan ever ends.
    catalog = Catalog()
    discoveries = [
        Discovery(ImageStore(PosixDatastore(name, str(tmp_path / name)), LAYOUTS["compound"]), catalog)
        for name in ("a", "b", "c", "d", "e")
    ]
    library = Library(discoveries, catalog, max_copies=1, lease_seconds=1)
    servicer = ImageServicer(library, Requests(), Watches(catalog, discoveries))
    impatient: Any = Impatient()
    began = time.monotonic()
    answer = servicer.ListImages(wire.ListImagesRequest(), impatient)
    assert time.monotonic() - began < 1.0
    assert len(answer.incomplete_datastores) == 5


class Impatient:
    """The context of a call whose caller waits half a second."""

    def time_remaining(self) -> float:
        return 0.5


@pytest.mark.slow
def test_images_of_many_files_are_listed_and_watched_in_answers_that_arrive(world: World) -> None:
    place = world.places["one"]
    images = ["a", "b", "c"]
    for image_id in images:
        making = place.root / "making"
        write_flat_disk(making, image_id)
        (making / TIMESTAMP).touch()
        for number in range(10_000):
            os.mknod(making / f"{'x' * 240}-{number}")
        making.rename(place.directory(image_id))
    wait_until(lambda: len(world.listed()) == len(images), "all are known", 30)
    for image in world.client.images("one"):
        assert len(image.files) == 10_000
        assert image.files[-1].name == f"{image.ref.image_id}.vmdk"
        assert any("more than 10000 files" in problem for problem in image.problems)
    with Watcher(world.client, "one") as watcher:
        wait_until(lambda: sorted(watcher.images) == [f"one/{image_id}" for image_id in images], "all are told")
