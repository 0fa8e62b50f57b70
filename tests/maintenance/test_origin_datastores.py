"""Datastores that the origin's three versions left: what repair, scan, sweep and reap make of what lies there."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.errors import ImageIncomplete, ImagesError
from sidecar.images.checking import validate_image
from sidecar.images.image import ImageState
from sidecar.images.reaping import reap
from tests.maintenance.conftest import DAY, NOW, Site
from tests.support.places import MARKER, RENAMED, TIMESTAMP, flat_files, write_flat_disk

HOURS = 3600.0


@dataclass(frozen=True)
class Origin:
    """A version of the origin: the layout that it wrote, and where it left what it did not finish."""

    datastore: str
    staging: str
    vm: str
    trash: str | None


ORIGINS = {
    "first version": Origin("two", "tmp_images/{uuid}", "vms/vm/vm-1", "deleted_images/{uuid}"),
    "second version": Origin("two", "tmp_images/{uuid}", "vms/vm/vm-1", "deleted_images/{uuid}"),
    "third version": Origin("one", "tmp_image_{uuid}", "vm_vm-1", "deleted_images/{uuid}"),
    "third version on VSAN": Origin("three", "image_{id}/tmp_image_{uuid}", "vm_vm-1", None),
}
ID = "5f9c3b6e-2c1d-4f3a-9d0e-0b8b1a6f2e11"
UUID = "c0ffee00-1111-2222-3333-444455556666"


@pytest.fixture(params=ORIGINS)
def origin(request: pytest.FixtureRequest) -> Origin:
    return ORIGINS[request.param]


@pytest.fixture
def datastore(origin: Origin, make_site: Callable[[str], Site]) -> Site:
    """As that version left it, an hour after its agent was killed for good: nobody writes there."""
    site = make_site(origin.datastore)
    site.plant("whole", used_ago=3 * DAY)
    site.plant("used", used_ago=3 * DAY)
    # Its scans wrote the time as the interpreter prints it.
    site.plant("marked", used_ago=3 * DAY)
    site.place.file("marked", MARKER).write_text(f"{NOW - DAY}.25")
    site.plant("touched", used_ago=DAY / 2, marked_ago=DAY)
    # Its sweep died between steps 5 and 6, before and after the image was used again.
    for image_id, ago in (("deciding", 3 * DAY), ("deciding-used", DAY / 2)):
        site.plant(image_id, used_ago=ago, marked_ago=DAY)
        site.place.file(image_id, TIMESTAMP).rename(site.place.file(image_id, RENAMED))
    # Its copy died, or its storage lost a file.
    site.plant("timeless")
    site.place.file("timeless", TIMESTAMP).unlink()
    only = site.place.directory("only-time")
    only.mkdir(parents=True)
    site.set_used("only-time", 3 * DAY)
    torn = site.plant("torn", marked_ago=DAY)
    (torn / TIMESTAMP).unlink()
    (torn / "torn-flat.vmdk").unlink()
    # Temporary directories: never locked, one with a disk, one empty; and what its removals put aside.
    for number, uuid in enumerate((UUID, UUID[::-1])):
        path = site.place.root / origin.staging.format(uuid=uuid, id=ID)
        path.mkdir(parents=True)
        if not number:
            write_flat_disk(path, ID, size=64 << 10, data=((0, 4096),), seed=1)
        site.set_age(path, 3 * HOURS)
    if origin.trash:
        path = site.place.root / origin.trash.format(uuid=UUID)
        path.mkdir(parents=True)
        write_flat_disk(path, "gone", size=64 << 10, data=((0, 4096),), seed=1)
    (site.place.root / origin.vm).mkdir(parents=True)
    site.vms.found = {(origin.datastore, origin.vm): [f"{origin.datastore}/used"]}
    return site


def repaired(site: Site, image_id: str) -> str:
    try:
        return "repaired" if validate_image(site.store, image_id, repair=True)[1] else "valid"
    except ImagesError as error:
        return type(error).__name__


def test_its_images_are_read_as_what_they_are(datastore: Site) -> None:
    states = {image_id: datastore.store.read(image_id).state for image_id in ("whole", "marked", "used", "touched")}
    assert set(states.values()) == {ImageState.VALID}
    for image_id in ("deciding", "deciding-used", "timeless", "only-time", "torn"):
        assert datastore.store.read(image_id).state is ImageState.INCOMPLETE
    assert datastore.store.read("marked").marked_unused_s == NOW - DAY


def test_repair_gives_back_the_timestamp_of_what_is_whole(datastore: Site) -> None:
    before = datastore.place.snapshot()
    outcomes = {
        i: repaired(datastore, i) for i in ("whole", "deciding", "deciding-used", "timeless", "only-time", "torn")
    }
    assert outcomes == {
        "whole": "valid",
        "deciding": "repaired",
        "deciding-used": "repaired",
        "timeless": "repaired",
        "only-time": "ImageIncomplete",
        "torn": "ImageIncomplete",
    }
    # The last use is kept where it is known, and is now where it is not.
    times = {i: datastore.place.file(i, TIMESTAMP).stat().st_mtime for i in ("deciding", "deciding-used", "timeless")}
    assert times == {"deciding": NOW - 3 * DAY, "deciding-used": NOW - DAY / 2, "timeless": NOW}
    after = datastore.place.snapshot()
    for image_id in ("only-time", "torn"):
        directory = str(datastore.place.directory(image_id).relative_to(datastore.place.root))
        assert {p: v for p, v in before.items() if p.startswith(directory)} == {
            p: v for p, v in after.items() if p.startswith(directory)
        }


def test_scan_marks_what_is_valid_and_unused_and_mends_what_a_sweep_left(datastore: Site) -> None:
    tally = datastore.scan()
    marks = {
        i: datastore.marker(i)
        for i in ("whole", "used", "marked", "touched", "deciding", "deciding-used", "timeless", "only-time", "torn")
    }
    now, old = str(NOW), str(NOW - DAY)
    assert marks == {
        "whole": now,
        "used": None,
        "marked": now,
        "touched": now,  # half a day ago, before this scan
        "deciding": now,
        "deciding-used": now,
        "timeless": None,
        "only-time": None,
        "torn": old,
    }
    assert (tally.vms, tally.marked, tally.used) == (1, 5, 1)


def test_sweep_by_its_old_marks_deletes_what_was_not_used_since_and_nothing_else(datastore: Site) -> None:
    dry = datastore.sweep(dry_run=True)
    results = datastore.sweep()
    assert {i: result.deleted for i, result in dry.items()} == {i: result.deleted for i, result in results.items()}
    assert {i for i, result in results.items() if result.deleted} == {"marked", "deciding"}
    assert all(result.reason for result in results.values())
    assert datastore.store.read("touched").state is ImageState.VALID
    assert datastore.store.read("deciding-used").state is ImageState.VALID
    assert (datastore.marker("touched"), datastore.marker("deciding-used")) == (None, None)
    assert "no timestamp file" in results["torn"].reason


def test_reap_frees_temporary_directories_and_trash_and_no_image(datastore: Site, origin: Origin) -> None:
    reaped = reap(datastore.store, 2 * HOURS)
    assert len(reaped.staging) == 2
    assert len(reaped.trash) == (1 if origin.trash else 0)
    assert reaped.recovered == ["deciding", "deciding-used"]
    assert reaped.faults == []
    datastore.place.root.joinpath(origin.vm).rmdir()
    for parent in ("vms/vm", "vms"):
        if (datastore.place.root / parent).is_dir():
            (datastore.place.root / parent).rmdir()
    datastore.place.assert_holds(
        {
            "whole": flat_files("whole"),
            "used": flat_files("used"),
            "marked": flat_files("marked", MARKER),
            "touched": flat_files("touched", MARKER),
            "deciding": flat_files("deciding", MARKER),
            "deciding-used": flat_files("deciding-used", MARKER),
            "timeless": flat_files("timeless") - {TIMESTAMP},
            "only-time": {TIMESTAMP},
            "torn": {"torn.vmdk", MARKER},
        }
    )


def test_all_together_leave_what_is_used_and_what_only_its_owner_can_judge(datastore: Site) -> None:
    reap(datastore.store, 2 * HOURS)
    datastore.clock.seconds += 60
    datastore.scan()
    datastore.clock.seconds += 60
    datastore.sweep()
    left = {
        i
        for i in ("whole", "used", "marked", "touched", "deciding", "deciding-used", "timeless", "only-time", "torn")
        if datastore.place.directory(i).exists()
    }
    assert left == {"used", "timeless", "only-time", "torn"}
    with pytest.raises(ImageIncomplete):
        validate_image(datastore.store, "torn", repair=True)


def test_a_copy_that_the_origin_makes_just_now_is_left_alone(datastore: Site, origin: Origin) -> None:
    path = datastore.place.root / origin.staging.format(uuid=UUID, id=ID)
    extent = path / f"{ID}-flat.vmdk"
    os.utime(extent, (NOW - 60, NOW - 60))
    reaped = reap(datastore.store, 2 * HOURS)
    assert extent.exists()
    assert str(Path(path).relative_to(datastore.place.root)) not in reaped.staging
