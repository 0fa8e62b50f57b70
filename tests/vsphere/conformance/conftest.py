"""The conformance suite of tests/images on datastores of a vSphere server: of a vCenter and of a single host, by API
alone and with the path where this host sees them.
"""

from collections.abc import Iterator

import pytest

from tests.images.conftest import CONFIG, place, scratch, world
from tests.support.choosing import is_named, keep
from tests.support.vcsim import Vcsim
from tests.support.world import World, make_places, running_sidecar

__all__ = ["place", "scratch", "world"]

# What the API does not tell or do, by test; a word in brackets: with this parameter only.
_LINKS = "links and pipes, which such a datastore does not have"
_STAGED = "looks for staged bytes on the datastore: they are on the sidecar's host until they are complete"
_BESIDE = "opens a file beside the server, which protects what is open there itself"
_HOLES = "counts allocated bytes: the server fills holes, and what is one cannot be told in an upload"
_VMS = "has VMs that the server does not know: see test_in_use.py beside this directory"
_MANY = "has tens of thousands of files, which are listed again and again here"
NOT_BY_API = {
    "test_a_link_in_an_image_is_a_problem_and_never_followed": _LINKS,
    "test_an_image_directory_that_is_a_link_is_no_image": _LINKS,
    "test_a_link_in_place_of_a_companion_is_replaced_and_not_followed": _LINKS,
    "test_a_bookkeeping_file_that_is_no_plain_file_is_a_problem_of_an_image_that_can_be_deleted[link]": _LINKS,
    "test_a_bookkeeping_file_that_is_no_plain_file_is_a_problem_of_an_image_that_can_be_deleted[fifo]": _LINKS,
    "test_what_is_staged_is_nobodys_image_until_it_is_committed": _STAGED,
    "test_data_and_holes_are_read_back_as_they_were_written": _STAGED,
    "test_a_size_cuts_or_extends_a_file": _STAGED,
    "test_a_file_cloned_by_ranges_is_the_file_with_its_holes": _STAGED,
    "test_a_disk_is_cloned_into_a_staging_directory_without_its_companions": _STAGED,
    "test_a_disk_under_a_foreign_name_is_imported_under_the_images": _HOLES,
    "test_a_listing_has_what_a_table_of_images_shows[three]": "has VSAN list names alone, which the server need not",
    "test_a_copys_staging_directory_is_locked_for_as_long_as_it_lives": "looks at a lock file: see tests/locks",
    "test_a_disk_of_every_kind_is_copied": _HOLES,
    "test_a_disk_of_holes_only_is_copied": _HOLES,
    "test_holes_stay_holes": _HOLES,
    "test_a_copy_of_a_copy_of_a_copy_is_the_disk[twoGbMaxExtentFlat]": _HOLES,
    "test_an_overlay_on_an_image_keeps_it": _VMS,
    "test_every_user_is_named": _VMS,
    "test_a_wreck_that_a_vm_has_a_disk_on_is_not_replaced": _VMS,
    "test_images_of_many_files_are_listed_and_watched_in_answers_that_arrive": _MANY,
    "test_a_snapshot_of_many_messages_is_whole": _MANY,
    "test_sizes_times_and_numbers_are_those_of_the_disk": "compares with inodes, blocks and nanoseconds",
    "test_a_touch_sets_the_time_and_nothing_else": "compares nanoseconds: the server tells microseconds",
    "test_a_wreck_that_somebody_has_open_is_not_replaced": _BESIDE,
    "test_a_disk_that_qemu_has_open_is_never_taken_away": _BESIDE,
}


# And with a path: the server copies disks all the same.
BY_THE_SERVER = {name: why for name, why in NOT_BY_API.items() if why is _HOLES} | {
    "test_a_disk_is_cloned_into_a_staging_directory_without_its_companions": _HOLES
}


@pytest.fixture(scope="module", params=["vcenter", "vcenter-path", "host", "host-path"])
def shared_world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[World]:
    kind, _, path = request.param.partition("-")
    directory = tmp_path_factory.mktemp("world")
    places = make_places(directory)
    with Vcsim(directory / "vcsim", {name: place.root for name, place in places.items()}, kind=kind) as simulator:
        config = simulator.configuration() + getattr(request.module, CONFIG, "")
        for name, place in places.items():
            config += f'[datastore.{name}]\ntype = "vsphere"\nserver = "sim"\nlayout = "{place.layout}"\n'
            config += "rescan_seconds = 0.5\n" + (f'path = "{place.root}"\nlocks = "flock"\n' if path else "")
        with running_sidecar(directory, places, config) as world:
            yield world


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep(config, items, _runs)


def _runs(item: pytest.Function) -> bool:
    if "conformance" not in item.path.parts or not hasattr(item, "callspec"):
        return True
    by_path = str(item.callspec.params.get("shared_world", "")).endswith("-path")
    return not is_named(item, BY_THE_SERVER if by_path else NOT_BY_API)
