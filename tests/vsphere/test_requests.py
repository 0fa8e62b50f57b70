"""How often a server is asked for what, counted by the server: a round trip to a real one takes many milliseconds."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sidecar.datastores.vsphere_api import VsphereApiDatastore
from tests.support.places import TIMESTAMP, Place, flat_descriptor
from tests.support.processes import wait_until
from tests.support.vcsim import STATUS_REQUESTS
from tests.vsphere.conftest import MakeSite, Served, Site

Serve = Callable[..., Served]
IMAGES = 1000
DATASTORES = 2
HANDFUL = 10  # for each of them, the login among it
ONCE, NEVER = "rescan_seconds = 3600", "reap_interval_seconds = 0\npurge_interval_seconds = 0"
LISTING, READING = "SearchDatastoreSubFolders_Task", "GET /folder"


@pytest.fixture
def kind() -> str:
    return "vcenter"


def plant(root: Path, layout: str = "compound", files: int = 3) -> None:
    """So many files in each of the images, and one image on the other datastore: an empty one is looked at closely."""
    Place("two", layout, root / "two").plant("a")
    place = Place("one", layout, root / "one")
    for number in range(IMAGES):
        image_id = f"base-{number:04d}"
        descriptor = place.descriptor(image_id)
        descriptor.parent.mkdir(parents=True)
        descriptor.write_text(flat_descriptor(f"{image_id}-flat.vmdk", 512))
        place.file(image_id, f"{image_id}-flat.vmdk").write_bytes(bytes(512))
        place.file(image_id, TIMESTAMP).touch()
        for companion in range(files - 3):
            place.file(image_id, f"{image_id}.{companion}.json").touch()


@pytest.fixture
def one(make_site: MakeSite) -> Iterator[tuple[Site, VsphereApiDatastore]]:
    """The datastore one, which was looked at."""
    site = make_site()
    datastore = VsphereApiDatastore("one", site.address(site.connection(), "one"))
    with closing(datastore):
        datastore.names("")
        yield site, datastore


def asked_for(site: Site, operation: Callable[[], object]) -> Counter[str]:
    before = site.simulator.requests()
    operation()
    return site.simulator.requests() - before


def asked(served: Served) -> Counter[str]:
    """But for the looks at the datastores' state, of which there are as many as time goes by."""
    return Counter({what: n for what, n in served.site.simulator.requests().items() if what not in STATUS_REQUESTS})


def until_listed(served: Served) -> Counter[str]:
    expected = {"one": IMAGES, "two": 1, "three": 0}

    def listed() -> bool:  # as it is known: to ask for one datastore asks the server
        return {each.name: each.image_count for each in served.client.datastores()} == expected

    wait_until(listed, "the images are listed", 60)
    return asked(served)


def until_read(served: Served) -> Counter[str]:
    until_listed(served)
    wait_until(lambda: asked(served)[READING] == IMAGES + 1, "every descriptor is read", 60)
    wait_until(lambda: all(image.details_known for image in served.client.images()), "all details are known", 60)
    return asked(served)


@pytest.mark.parametrize(
    ("layout", "files"),
    [("compound", 3), ("sharded", 3), pytest.param("compound", 30, marks=pytest.mark.slow)],
)
def test_a_thousand_images_are_listed_with_a_handful_of_requests(
    serve: Serve, tmp_path: Path, layout: str, files: int
) -> None:
    plant(tmp_path, layout, files)
    served = serve(path=False, layout=layout, more=ONCE, maintenance=NEVER)
    requests = until_listed(served)
    # Their descriptors are read when the listing has ended, and nobody waits for that.
    del requests[READING]
    assert requests[LISTING] == DATASTORES
    assert requests.total() <= HANDFUL * DATASTORES, requests


def test_a_rescan_without_changes_reads_no_descriptor_again(serve: Serve, tmp_path: Path) -> None:
    plant(tmp_path)
    served = serve(path=False, more="rescan_seconds = 1", maintenance=NEVER)
    before = until_read(served)
    assert before[READING] == IMAGES + 1
    often = 3 * DATASTORES
    wait_until(lambda: asked(served)[LISTING] >= before[LISTING] + often, "all is listed again and again", 60)
    after = asked(served)
    assert after[READING] == before[READING]
    assert (after - before).total() <= HANDFUL * (after[LISTING] - before[LISTING] + DATASTORES), after - before


def test_what_is_known_is_told_without_asking_the_server(serve: Serve, tmp_path: Path) -> None:
    plant(tmp_path)
    served = serve(path=False, more=ONCE, maintenance=NEVER)
    before = until_read(served)
    assert len(list(served.client.images("one"))) == IMAGES
    served.imagectl("ls")
    served.imagectl("datastores")
    assert asked(served) == before


@pytest.mark.slow
def test_a_reaping_and_a_purge_look_at_no_image_that_they_have_nothing_to_do_with(serve: Serve, tmp_path: Path) -> None:
    plant(tmp_path)
    served = serve(path=False, more=ONCE, maintenance="reap_interval_seconds = 1\npurge_interval_seconds = 1")
    before = until_read(served)
    often = 3 * 2 * DATASTORES
    wait_until(lambda: asked(served)[LISTING] >= before[LISTING] + often, "both ran again and again", 60)
    after = asked(served)
    assert (after - before).total() <= HANDFUL * (after[LISTING] - before[LISTING] + DATASTORES), after - before


def test_a_lock_takes_four_requests_and_its_release_three_with_a_look_at_each_task(
    one: tuple[Site, VsphereApiDatastore],
) -> None:
    site, datastore = one
    requests = asked_for(site, lambda: datastore.lock("a.ec_lock", "test", 0).release())
    assert requests == {
        "MakeDirectory": 1,
        "PUT /folder": 1,
        "MoveDatastoreFile_Task": 2,
        "DeleteDatastoreFile_Task": 1,
        "RetrievePropertiesEx Task": 3,
    }
    assert list(site.roots["one"].iterdir()) == []


def test_whether_all_of_a_file_arrived_is_asked_only_where_something_can_be_missing(
    one: tuple[Site, VsphereApiDatastore],
) -> None:
    site, datastore = one
    (site.roots["one"] / "a").mkdir()
    assert asked_for(site, lambda: datastore.create_file("a/empty", 1))["HEAD /folder"] == 0
    assert asked_for(site, lambda: datastore.write_file("a/full", b"x"))["HEAD /folder"] == 1


def test_a_tree_is_removed_after_one_look_at_its_sizes(one: tuple[Site, VsphereApiDatastore]) -> None:
    site, datastore = one
    inner = site.roots["one"] / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "c").write_bytes(bytes(1000))
    (inner.parent / "d").write_bytes(bytes(23))
    (site.roots["one"] / "e").write_bytes(bytes(5))
    freed = []
    requests = asked_for(site, lambda: freed.append(datastore.remove_tree("a")))
    assert requests == {LISTING: 1, "DeleteDatastoreFile_Task": 1, "RetrievePropertiesEx Task": 2}
    assert [*freed, datastore.remove_tree("e"), datastore.remove_tree("f")] == [1023, 5, 0]
    assert list(site.roots["one"].iterdir()) == []


def test_the_time_of_a_staged_file_that_was_sent_before_is_that_of_its_last_setting(
    one: tuple[Site, VsphereApiDatastore],
) -> None:
    """What is published after a long wait for a lock was used then: a scan that began meanwhile must not miss it."""
    site, datastore = one
    (site.roots["one"] / "a").mkdir()
    datastore.open_writable("a/b").close()
    datastore.sync_file("a/b")
    os.utime(site.roots["one"] / "a" / "b", ns=(1, 1))
    with datastore.set_modified("a/b", 2):
        pass
    assert (site.roots["one"] / "a" / "b").stat().st_mtime_ns > 1_000_000_000_000_000_000


def test_the_state_of_a_datastore_is_looked_at_with_two_requests(one: tuple[Site, VsphereApiDatastore]) -> None:
    site, datastore = one
    assert asked_for(site, datastore.check) == {"RefreshDatastore": 1, "RetrievePropertiesEx Folder": 1}
    assert datastore.check().capacity == datastore.capacity().capacity > 0
