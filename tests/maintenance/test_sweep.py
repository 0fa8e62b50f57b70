"""Sweep: what is used, or was touched in time, stays; what goes is whole or gone, also when the sweep dies."""

import os
import subprocess
from collections.abc import Callable

import pytest

from sidecar.errors import DatastoreUnavailable
from sidecar.images import sweep as sweep_module
from sidecar.images.deletion import discard_unused, purge_image
from sidecar.images.image import Image, ImageState
from sidecar.images.reaping import reap
from sidecar.images.runs import Ended, Outcome
from sidecar.images.store import ImageStore
from sidecar.images.unused_marker import rename_timestamp
from tests.maintenance.conftest import DAY, NOW, Site
from tests.support.places import MARKER, RENAMED, TIMESTAMP, TOMBSTONE, flat_files


def test_what_was_marked_and_not_touched_since_goes_and_leaves_nothing(site: Site) -> None:
    site.plant("a", marked_ago=3600)
    site.plant("b")
    changed: list[str] = []
    site.store.observe(changed.append)
    results = site.sweep()
    assert results["a"].deleted
    assert results["a"].freed > 0
    assert (results["b"].deleted, results["b"].reason) == (False, "no scan found it unused")
    site.place.assert_holds({"b": flat_files("b")})
    assert changed == ["a"]


@pytest.mark.parametrize("grace", [0, 60])
def test_what_was_touched_since_the_scan_or_within_the_grace_time_stays(site: Site, grace: int) -> None:
    for image_id, ago in (("since", 3599), ("start", 3600), ("within", 3600 + grace), ("before", 3601 + grace)):
        site.plant(image_id, used_ago=ago, marked_ago=3600)
    results = site.sweep(grace=grace)
    assert [image_id for image_id, result in results.items() if result.deleted] == ["before"]
    assert "it was used at" in results["since"].reason
    # In use now: no later sweep goes by this mark.
    assert site.marker("since") is None
    assert site.place.file("since", TIMESTAMP).stat().st_mtime == NOW - 3599


def test_a_dry_run_changes_nothing_and_has_a_reason_for_every_image(site: Site) -> None:
    site.plant("unmarked")
    site.plant("goes", marked_ago=3600)
    site.plant("touched", used_ago=0, marked_ago=3600)
    site.plant("deleted", marked_ago=3600)
    site.place.file("deleted", TOMBSTONE).touch()
    site.plant("garbled")
    site.place.file("garbled", MARKER).write_text("yesterday")
    site.plant("used", marked_ago=3600)
    site.plant("timeless", marked_ago=3600)
    site.place.file("timeless", TIMESTAMP).unlink()
    site.vms.found = {(site.place.name, "vm_1"): [f"{site.place.name}/used"]}
    before = site.place.snapshot()
    results = site.sweep("nothing", *("goes", "touched"), dry_run=True) | site.sweep(dry_run=True)
    assert site.place.snapshot() == before
    assert {image_id: (result.deleted, result.reason.split(":")[0]) for image_id, result in results.items()} == {
        "nothing": (False, "it is not there"),
        "unmarked": (False, "no scan found it unused"),
        "goes": (True, "unused since 2033-05-18T02"),
        "touched": (False, "it was used at 2033-05-18T03"),
        "deleted": (False, "it is deleted (tombstoned) already"),
        "garbled": (False, f"{MARKER} does not hold a time"),
        "used": (False, "it is in use by VM vm_1"),
        "timeless": (False, "it has no timestamp file, so nobody knows when it was last used"),
    }
    # The sweep itself does what was said.
    assert {i for i, result in site.sweep().items() if result.deleted} == {"goes"}


def test_an_image_that_somebody_has_open_stays_with_its_timestamp_and_is_not_marked_any_more(site: Site) -> None:
    site.plant("a", marked_ago=3600)
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
            assert "qemu-io" in site.sweep(dry_run=True)["a"].reason
            assert site.marker("a") is not None
            result = site.sweep()["a"]
        finally:
            process.kill()
    assert not result.deleted
    assert f"in use by qemu-io (pid {process.pid})" in result.reason
    site.place.assert_holds({"a": flat_files("a")})
    assert site.place.file("a", TIMESTAMP).stat().st_mtime == NOW - DAY


def test_a_mark_by_a_host_whose_clock_was_ahead_takes_no_image_that_was_touched_since(site: Site) -> None:
    site.plant("a", used_ago=0, marked_ago=-DAY)
    result = site.sweep()["a"]
    assert not result.deleted
    assert "is to come" in result.reason
    site.place.assert_holds({"a": flat_files("a", MARKER)})


def test_a_vm_that_cannot_be_read_ends_the_sweep_before_anything_goes(site: Site) -> None:
    site.plant("a", marked_ago=3600)
    site.vms.found = {(site.place.name, "vm_1"): DatastoreUnavailable("vm_1: EIO")}
    with pytest.raises(DatastoreUnavailable, match="vm_1"):
        site.sweep()
    site.place.assert_holds({"a": flat_files("a", MARKER)})


def test_a_touch_between_the_look_and_the_lock_is_seen(site: Site) -> None:
    # The harm: a VM is made from an image while a sweep waits for its turn.
    site.plant("a", marked_ago=3600)
    site.plant("b", marked_ago=3600)
    site.clock.on_wait = lambda: site.set_used("b", 0)  # the sweep has read the mark of b, and waits
    results = site.sweep(rate=10)
    assert (results["a"].deleted, results["b"].deleted) == (True, False)
    assert site.place.file("b", TIMESTAMP).exists()


def test_a_touch_by_who_asks_for_no_lock_is_noticed_by_the_renamed_timestamp(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.plant("a", marked_ago=3600)
    rename = rename_timestamp

    def touch_and_rename(store: ImageStore, image: Image) -> None:
        site.set_used("a", 0)  # after steps 3 and 4, before step 5
        rename(store, image)

    monkeypatch.setattr(sweep_module, "rename_timestamp", touch_and_rename)
    result = site.sweep()["a"]
    assert (result.deleted, result.reason) == (False, "it was used just now")
    site.place.assert_holds({"a": flat_files("a")})
    assert site.place.file("a", TIMESTAMP).stat().st_mtime == NOW


def test_a_vm_that_was_made_without_a_touch_while_the_sweep_runs_keeps_its_image(site: Site) -> None:
    site.plant("a", marked_ago=3600)
    site.plant("b", marked_ago=3600)
    made = (site.place.name, "vm_1")
    site.clock.on_wait = lambda: site.vms.found.update({made: [f"{site.place.name}/b"]})
    results = site.sweep(rate=10)
    assert (results["a"].deleted, results["b"].deleted) == (True, False)
    assert "VM vm_1" in results["b"].reason
    site.place.assert_holds({"b": flat_files("b")})


def test_an_image_that_was_replaced_since_its_mark_was_read_stays(site: Site) -> None:
    site.plant("a", marked_ago=3600)
    site.plant("b", marked_ago=3600)

    def replace() -> None:
        if site.marker("b"):
            purge_image(site.store, "b", force=True)
            site.plant("b", used_ago=2 * DAY)

    site.clock.on_wait = replace
    results = site.sweep(rate=10)
    assert (results["b"].deleted, results["b"].reason) == (False, "no scan found it unused")


def test_an_image_is_gone_before_its_lock_is_given_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # The origin removed the directory after the lock was given back.
    site.plant("a", marked_ago=3600)
    discard = discard_unused

    def discard_locked(store: ImageStore, image: Image) -> str | None:
        assert site.place.lock_file("a").exists()
        trash = discard(store, image)
        assert site.place.lock_file("a").exists()
        assert not site.place.descriptor("a").exists()
        return trash

    monkeypatch.setattr(sweep_module, "discard_unused", discard_locked)
    assert site.sweep()["a"].deleted
    site.place.assert_holds({})


def test_an_image_that_another_process_changes_stays_and_says_who_holds_it(site: Site) -> None:
    site.plant("a", marked_ago=3600)
    site.plant("b", marked_ago=3600)
    with site.place.locked("a"):
        results = site.sweep()
    assert (results["a"].deleted, results["b"].deleted) == (False, True)
    assert "held by" in results["a"].reason
    assert site.marker("a") is not None


def test_a_failure_of_the_last_step_puts_the_timestamp_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.plant("a", marked_ago=3600)

    def fail(store: ImageStore, image: Image) -> str | None:
        raise DatastoreUnavailable("EIO")

    monkeypatch.setattr(sweep_module, "discard_unused", fail)
    result = site.sweep()["a"]
    assert (result.deleted, result.reason) == (False, "EIO")
    site.place.assert_holds({"a": flat_files("a", MARKER)})
    assert site.place.file("a", TIMESTAMP).stat().st_mtime == NOW - DAY


def test_targets_alone_are_swept_and_a_stop_takes_effect_within_one(site: Site) -> None:
    for image_id in ("a", "b", "c", "d"):
        site.plant(image_id, marked_ago=3600)
    assert list(site.sweep("b", "b")) == ["b"]
    run = site.run()
    site.clock.on_wait = run.stop
    with pytest.raises(Ended) as end:
        site.sweep(run=run, rate=10)
    assert end.value.outcome is Outcome.STOPPED
    site.place.assert_holds({image_id: flat_files(image_id, MARKER) for image_id in ("c", "d")})


@pytest.mark.parametrize("after", ["reap", "sweep", "repair by scan"])
def test_a_sweep_that_died_after_the_rename_leaves_what_the_next_one_handles(
    site: Site, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    site.plant("old", marked_ago=3600)
    site.plant("used", used_ago=3000, marked_ago=3600)
    for image_id in ("old", "used"):
        site.place.file(image_id, TIMESTAMP).rename(site.place.file(image_id, RENAMED))
        assert site.store.read(image_id).state is ImageState.INCOMPLETE
    if after == "reap":
        assert reap(site.store, 7200).recovered == ["old", "used"]
    elif after == "repair by scan":
        site.scan()
    else:
        results = site.sweep()
        assert (results["old"].deleted, results["used"].deleted) == (True, False)
        site.place.assert_holds({"used": flat_files("used")})
        return
    for image_id, ago in (("old", DAY), ("used", 3000)):
        assert site.store.read(image_id).state is ImageState.VALID
        assert site.place.file(image_id, TIMESTAMP).stat().st_mtime == NOW - ago


@pytest.mark.parametrize("keep", [("a-flat.vmdk", MARKER, RENAMED), (MARKER, RENAMED), (MARKER,), (RENAMED,)])
def test_a_sweep_that_died_while_it_took_the_image_apart_is_finished(
    make_site: Callable[[str], Site], keep: tuple[str, ...]
) -> None:
    """Layout vsan: file by file, the descriptor first, the files of the sweep last."""
    site = make_site("three")
    directory = site.plant("a", marked_ago=3600)
    site.place.file("a", TIMESTAMP).rename(site.place.file("a", RENAMED))
    for path in directory.iterdir():
        if path.name not in keep:
            path.unlink()
    site.set_age(directory, DAY)
    reap(site.store, 7200)  # does not take for an image what is none
    site.sweep()
    reap(site.store, 7200)
    site.place.assert_holds({})


def test_a_timestamp_that_an_older_sweep_left_beside_the_new_one_is_no_obstacle(site: Site) -> None:
    site.plant("a", marked_ago=3600)
    site.set_used("a", 2 * DAY, RENAMED)
    site.plant("b", marked_ago=3600)
    site.set_used("b", 0, RENAMED)  # somebody used it while it was renamed
    results = site.sweep()
    assert (results["a"].deleted, results["b"].deleted) == (True, False)


def test_a_mark_with_a_fraction_is_rounded_down(site: Site) -> None:
    site.plant("a", used_ago=3600)
    site.place.file("a", MARKER).write_text(f"{NOW - 3600}.9")
    assert not site.sweep(grace=0)["a"].deleted
    site.plant("b", used_ago=3601)
    site.place.file("b", MARKER).write_text(f"{NOW - 3600}.1\n")
    assert site.sweep(grace=0)["b"].deleted


def test_any_bytes_in_a_mark_are_a_time_or_no_mark(site: Site) -> None:
    site.plant("a")
    for content in (b"", b"nan", b"inf", b"-1", b"1e400", b"9" * 60, b"\xff\x00", b"12 34", os.urandom(64), b"0x10"):
        site.place.file("a", MARKER).write_bytes(content)
        assert site.store.read("a").marked_unused_s is None
        assert not site.sweep()["a"].deleted
