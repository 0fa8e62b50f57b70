"""Scan: what nobody uses is marked with the time at which the scan started, and nothing else is."""

import subprocess
from collections.abc import Callable

import pytest

from sidecar.errors import DatastoreUnavailable
from sidecar.images.runs import Ended, Outcome
from tests.maintenance.conftest import DAY, NOW, Site
from tests.support.places import MARKER, RENAMED, TIMESTAMP, TOMBSTONE


def test_only_what_nobody_uses_is_marked_with_the_start_of_the_scan(site: Site) -> None:
    name = site.place.name
    for image_id in ("used", "unused", "touched", "deleted", "broken"):
        site.plant(image_id)
    site.set_used("touched", 0)
    site.place.file("deleted", TOMBSTONE).touch()
    site.place.file("broken", TIMESTAMP).unlink()
    site.vms.found = {(name, "vm_1"): [f"{name}/used"], (name, "vm_2"): []}
    tally = site.scan(rate=1)  # minutes go by
    assert {image_id: site.marker(image_id) for image_id in ("used", "unused", "touched", "deleted", "broken")} == {
        "used": None,
        "unused": str(NOW),
        "touched": None,
        "deleted": None,
        "broken": None,
    }
    assert (tally.vms, tally.marked, tally.used, tally.others) == (2, 1, 2, 2)
    assert site.clock.seconds >= NOW + 60


def test_an_image_of_the_second_disk_or_of_another_datastore_is_in_use(make_site: Callable[[str], Site]) -> None:
    # The origin stopped at the first disk of each VM, and an image used by the second one was swept.
    one, two = make_site("one"), make_site("two")
    for image_id in ("first", "second", "far"):
        one.plant(image_id)
    one.vms.found = {("one", "vm_1"): ["one/first", "one/second"], ("two", "vms/ab/abc"): ["one/far"]}
    tally = one.scan(others=[two])
    assert (tally.marked, tally.used) == (0, 3)


def test_a_vm_that_cannot_be_read_ends_the_scan_without_a_mark(site: Site) -> None:
    site.plant("a")
    site.vms.found = {(site.place.name, "vm_1"): [], (site.place.name, "vm_2"): DatastoreUnavailable("vm_2: EIO")}
    with pytest.raises(DatastoreUnavailable, match="vm_2"):
        site.scan()
    assert site.marker("a") is None


def test_a_datastore_that_is_away_ends_the_scan_of_another_one(make_site: Callable[[str], Site]) -> None:
    one, two = make_site("one"), make_site("two")
    one.plant("a")
    two.place.root.rename(two.place.root.with_name("away"))
    with pytest.raises(DatastoreUnavailable):
        one.scan(others=[two])
    assert one.marker("a") is None


def test_a_vm_that_moves_while_the_vms_are_read_is_not_missed(make_site: Callable[[str], Site]) -> None:
    one, two = make_site("one"), make_site("two")
    one.plant("a")
    vms = one.vms
    vms.found = {("one", "vm_1"): [], ("two", "vm_2"): ["one/a"]}

    def move(directory: str) -> None:
        if directory == "vm_1":
            del vms.found["two", "vm_2"]
            vms.found["one", "vm_2"] = ["one/a"]

    vms.on_read = move
    assert one.scan(others=[two]).marked == 0


def test_an_image_that_was_marked_and_is_used_loses_its_mark(site: Site) -> None:
    site.plant("vm", marked_ago=3600)
    site.plant("touched", used_ago=0, marked_ago=3600)
    site.plant("still", marked_ago=3600)
    site.vms.found = {(site.place.name, "vm_1"): [f"{site.place.name}/vm"]}
    site.scan()
    assert (site.marker("vm"), site.marker("touched"), site.marker("still")) == (None, None, str(NOW))


def test_an_image_that_somebody_has_open_is_not_marked(site: Site) -> None:
    site.plant("a")
    with subprocess.Popen(
        ["qemu-io", "-r", "-f", "raw", str(site.place.file("a", "a-flat.vmdk"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(b"length\n")
            process.stdin.flush()
            process.stdout.readline()
            assert site.scan().used == 1
        finally:
            process.kill()
    assert site.marker("a") is None


def test_a_scan_is_stopped_within_one_item_and_makes_no_mark_before_all_vms_are_read(site: Site) -> None:
    for image_id in ("a", "b", "c"):
        site.plant(image_id)
    site.vms.found = {(site.place.name, f"vm_{number}"): [] for number in range(5)}
    run = site.run()
    site.vms.on_read = lambda directory: run.stop() if directory == "vm_2" else None
    with pytest.raises(Ended) as end:
        site.scan(run)
    assert end.value.outcome is Outcome.STOPPED
    assert site.vms.read == ["vm_0", "vm_1", "vm_2"]
    site.vms.on_read = lambda directory: None
    run = site.run()
    site.clock.on_wait = lambda: run.stop() if site.marker("b") else None
    with pytest.raises(Ended):
        site.scan(run, rate=10)
    assert [site.marker(image_id) is not None for image_id in ("a", "b", "c")] == [True, True, False]


def test_vms_and_images_are_looked_at_no_faster_than_told(site: Site) -> None:
    for image_id in ("a", "b", "c"):
        site.plant(image_id)
    site.vms.found = {(site.place.name, f"vm_{number}"): [] for number in range(4)}
    site.scan(rate=10)
    assert site.clock.seconds - NOW == pytest.approx(3 * 6 + 2 * 6)


def test_a_scan_ends_by_its_timeout(site: Site) -> None:
    site.vms.found = {(site.place.name, f"vm_{number}"): [] for number in range(9)}
    with pytest.raises(Ended) as end:
        site.scan(site.run(timeout=20), rate=10)
    assert end.value.outcome is Outcome.TIMED_OUT
    assert site.clock.seconds - NOW == 20


def test_an_image_that_another_process_changes_is_left_and_the_others_are_marked(site: Site) -> None:
    site.plant("a")
    site.plant("b")
    with site.place.locked("a"):
        tally = site.scan()
    assert site.marker("a") is None
    assert site.marker("b") == str(NOW)
    assert len(tally.unread) == 1
    assert "held by" in tally.unread[0]


def test_what_a_dead_sweep_renamed_is_put_back_and_the_last_use_is_kept(site: Site) -> None:
    site.plant("a", used_ago=5 * DAY)
    site.place.file("a", TIMESTAMP).rename(site.place.file("a", RENAMED))
    site.scan()
    assert site.place.file("a", TIMESTAMP).stat().st_mtime == NOW - 5 * DAY
    assert not site.place.file("a", RENAMED).exists()
    assert site.place.file("a", MARKER).read_text() == str(NOW)
