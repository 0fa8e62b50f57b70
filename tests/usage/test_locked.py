"""An image's lock is held for a look at all VMs: for no longer than somebody waits for it, nor without end."""

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.images import vm_disks, vm_look
from sidecar.images.deletion import purge_image
from sidecar.images.disk_parents import Named, names_in
from sidecar.images.maintenance import Maintenance, Plan
from sidecar.images.usage import uses_of_image, uses_of_vm, vm_directories
from sidecar.images.vm_scan import VmSource
from tests.support.places import MARKER, TIMESTAMP, TOMBSTONE, Place
from tests.support.processes import wait_until
from tests.usage.conftest import Host


@pytest.fixture
def vm(host: Host) -> Path:
    return host.vm("1")


def assert_there_and_free(host: Host, place: Place) -> None:
    assert place.descriptor("a").exists()
    assert not place.lock_file("a").exists()


def test_a_purge_that_nobody_waits_for_does_not_read_the_vms_that_are_left(host: Host, vm: Path) -> None:
    host.vm("2")
    asked = []

    def check() -> None:
        asked.append(host.places["one"].lock_file("a").exists())
        raise errors.OperationCancelled("nobody is there")

    with pytest.raises(errors.OperationCancelled):
        purge_image(host.stores["one"], "a", force=True, check=check)
    assert asked == [True], "once under the lock, before the first VM"
    assert_there_and_free(host, host.places["one"])


@pytest.fixture
def slow(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three VMs, each of which takes 200 s to read."""
    now = 0.0

    def read(name: str, size: int, read: Callable[[int, int], bytes]) -> Named:
        nonlocal now
        now += 200
        return names_in(name, size, read)

    for name in ("1", "2", "3"):
        (host.vm(name) / "disk.img").touch()
    monkeypatch.setattr(vm_look, "monotonic", lambda: now)
    monkeypatch.setattr(vm_disks, "names_in", read)


def purge(maintenance: Maintenance, place: Place) -> str:
    with pytest.raises(errors.UseUnknown) as raised:
        purge_image(maintenance.store, "a", force=True)
    return raised.value.message


def expire(maintenance: Maintenance, place: Place) -> str:
    place.file("a", TOMBSTONE).touch()
    (reason,) = maintenance.purge(0).kept
    return reason


def sweep(maintenance: Maintenance, place: Place) -> str:
    os.utime(place.file("a", TIMESTAMP), (0, 0))
    place.file("a", MARKER).write_text(f"{time.time():.0f}")
    maintenance.start_sweep("run")
    wait_until(lambda: (now := maintenance.sweeps.current()) is not None and now[0].outcome is not None, "it ends")
    current = maintenance.sweeps.current()
    assert current
    (result,) = current[1].results
    return result.reason


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("work", [purge, expire, sweep])
def test_vms_that_take_too_long_to_read_keep_the_image_and_not_its_lock(
    host: Host, work: Callable[[Maintenance, Place], str]
) -> None:
    """The first look of an expiry or sweep, for which no lock is held, may take longer."""
    place, store = host.places["one"], host.stores["one"]
    with closing(Maintenance(store, VmSource(vm_directories, uses_of_vm), Plan())) as maintenance:
        reason = work(maintenance, place)
    assert "not read within 300 s, nor all VMs, and an image's lock is held no longer" in reason
    assert_there_and_free(host, place)


@pytest.mark.usefixtures("slow")
def test_who_holds_no_lock_is_told_what_uses_an_image_however_long_that_takes(host: Host) -> None:
    (host.vm("3") / "disk.vmx").write_text('scsi0:0.fileName = "../image_a/a.vmdk"\n')
    (use,) = uses_of_image([host.stores["one"]], host.key("one/a"))
    assert use.startswith("VM 3 ")
