"""An image's lock is held for a look at all VMs: for no longer than somebody waits for it, nor without end."""

from pathlib import Path

import pytest

from sidecar import errors
from sidecar.images import vm_scan
from sidecar.images.deletion import purge_image
from sidecar.images.maintenance import Maintenance, Plan
from sidecar.images.usage import uses_of_vm, vm_directories
from sidecar.images.vm_scan import VmSource
from tests.support.places import TOMBSTONE, Place
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


@pytest.mark.parametrize("work", ["purge", "expiry", "sweep"])
def test_vms_that_take_too_long_to_read_keep_the_image_and_not_its_lock(
    host: Host, vm: Path, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, store = host.places["one"], host.stores["one"]
    monkeypatch.setattr(vm_scan, "LOCKED_SECONDS", 0.0)
    maintenance = Maintenance(store, [store], VmSource(vm_directories, uses_of_vm), Plan())
    with pytest.raises(errors.UseUnknown, match="not read within 0 s"):
        if work == "purge":
            purge_image(store, "a", force=True)
        elif work == "expiry":
            place.file("a", TOMBSTONE).touch()
            maintenance.purge(0)
        else:
            maintenance.start_sweep("run")
            wait_until(
                lambda: (now := maintenance.sweeps.current()) is not None and now[0].error is not None, "it ends"
            )
            current = maintenance.sweeps.current()
            assert current and current[0].error
            raise current[0].error
    maintenance.close()
    assert_there_and_free(host, place)
