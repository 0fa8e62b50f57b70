"""Expiry: deleted images go when their time is over, the oldest first, and never one that is in use."""

import os
import subprocess
from collections.abc import Callable

import pytest

from sidecar.datastores.interface import Capacity
from sidecar.errors import DatastoreUnavailable
from sidecar.images.deletion import restore_image
from sidecar.images.expiry import Expired, expire
from tests.maintenance.conftest import DAY, Site
from tests.support.places import TOMBSTONE, flat_files


def delete(site: Site, image_id: str, ago: float) -> None:
    site.plant(image_id)
    site.set_used(image_id, ago, TOMBSTONE)


def run(site: Site, grace: float = DAY, wanted_free: int = 0) -> Expired:
    return expire(site.store, site.vms.source(), grace=grace, wanted_free=wanted_free)


def test_what_was_deleted_longer_ago_than_the_grace_time_goes_the_oldest_first(site: Site) -> None:
    for image_id, ago in (("a", DAY + 1), ("b", 3 * DAY), ("c", DAY - 1), ("d", 2 * DAY)):
        delete(site, image_id, ago)
    site.plant("e")
    expired = run(site)
    assert expired.purged == ["b", "d", "a"]
    assert expired.freed > 0
    site.place.assert_holds({"c": flat_files("c", TOMBSTONE), "e": flat_files("e")})


def test_a_deleted_image_that_a_vm_uses_or_somebody_has_open_stays(site: Site) -> None:
    for image_id in ("open", "vm", "free"):
        delete(site, image_id, 2 * DAY)
    site.vms.found = {(site.place.name, "vm_1"): [f"{site.place.name}/vm"]}
    with subprocess.Popen(
        ["qemu-io", "-r", "-f", "raw", str(site.place.file("open", "open-flat.vmdk"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(b"length\n")
            process.stdin.flush()
            process.stdout.readline()
            expired = run(site)
        finally:
            process.kill()
    assert expired.purged == ["free"]
    assert sorted(reason.split(" by ")[1].split(" ")[0] for reason in expired.kept) == ["VM", "qemu-io"]
    for image_id in ("open", "vm"):
        restore_image(site.store, image_id)


def test_a_vm_that_cannot_be_read_keeps_every_deleted_image(site: Site) -> None:
    delete(site, "a", 2 * DAY)
    site.vms.found = {(site.place.name, "vm_1"): DatastoreUnavailable("vm_1: EIO")}
    with pytest.raises(DatastoreUnavailable):
        run(site)
    restore_image(site.store, "a")


def test_no_vm_is_read_when_nothing_is_to_be_purged(site: Site) -> None:
    delete(site, "a", DAY / 2)
    site.vms.found = {(site.place.name, "vm_1"): DatastoreUnavailable("vm_1: EIO")}
    assert run(site).purged == []


@pytest.mark.parametrize("again", [False, True])
def test_an_image_that_is_restored_meanwhile_is_not_lost(site: Site, again: bool) -> None:
    # Also when it is deleted again after that: its time begins anew.
    delete(site, "a", 2 * DAY)
    site.vms.found = {(site.place.name, "vm_1"): []}

    def restore(directory: str) -> None:
        restore_image(site.store, "a")
        if again:
            site.set_used("a", 0, TOMBSTONE)

    site.vms.on_read = restore
    assert run(site).purged == []
    site.place.assert_holds({"a": flat_files("a", *([TOMBSTONE] if again else []))})


def test_only_as_many_go_early_as_it_takes_to_have_the_space(
    make_site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site("one")
    for image_id, ago in (("a", 30), ("b", 20), ("c", 10)):
        delete(site, image_id, ago)
    freed = sum(os.stat(path).st_blocks * 512 for path in site.place.directory("a").iterdir())
    # What a file system says that counts only later what was freed.
    monkeypatch.setattr(site.store.datastore, "capacity", lambda: Capacity(10**9, 5000))
    assert run(site, wanted_free=5000).purged == []
    assert run(site, wanted_free=5000 + freed + 1).purged == ["a", "b"]


def test_one_that_another_process_changes_waits_for_the_next_time(site: Site) -> None:
    delete(site, "a", 2 * DAY)
    delete(site, "b", 2 * DAY)
    with site.place.locked("a"):
        assert run(site).purged == ["b"]
    assert run(site).purged == ["a"]
