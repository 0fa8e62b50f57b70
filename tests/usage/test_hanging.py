"""A disk of a VM hangs when it is read, on what is no datastore: nobody knows that it does not answer."""

import itertools
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar import errors
from sidecar.images import vm_disks, vm_look
from sidecar.images.deletion import purge_image
from sidecar.images.disk_parents import Named, names_in
from sidecar.images.maintenance import Maintenance, Plan
from sidecar.images.runs import Outcome, Runs
from sidecar.images.store import ImageStore
from sidecar.images.usage import uses_of_image, uses_of_vm, vm_directories
from sidecar.images.vm_scan import Uses, VmSource, read_uses
from tests.support.places import TOMBSTONE
from tests.usage.conftest import Host, delta

SOURCE = VmSource(vm_directories, uses_of_vm)
QUICK = 10.0  # seconds, of what nothing holds up


class Dead:
    """A file server that does not answer: who is `asked` waits until it `answers`."""

    def __init__(self) -> None:
        self.asked, self.answers = threading.Event(), threading.Event()

    def check(self) -> None:
        """Of a caller that goes when it hangs."""
        if self.asked.is_set():
            raise errors.OperationCancelled("nobody waits for this call any more")


@pytest.fixture
def dead(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dead]:
    """The parent of the disk of a VM is there."""
    dead, parent = Dead(), tmp_path / "dead" / "base.img"
    parent.parent.mkdir()
    parent.touch()
    (host.vm("1") / "disk.vmdk").write_text(delta(str(parent)))

    def hang(name: str, size: int, read: Callable[[int, int], bytes]) -> Named:
        if name == str(parent):
            dead.asked.set()
            dead.answers.wait()
        return names_in(name, size, read)

    monkeypatch.setattr(vm_disks, "names_in", hang)
    yield dead
    dead.answers.set()
    for thread in looks():
        thread.join(QUICK)


@pytest.fixture
def maintenance(host: Host) -> Iterator[Maintenance]:
    host.places["one"].file("a", TOMBSTONE).touch()
    with closing(Maintenance(host.stores["one"], SOURCE, Plan())) as maintenance:
        yield maintenance


@contextmanager
def waiting(dead: Dead) -> Iterator[ThreadPoolExecutor]:
    """A thread for what should not hang; at the end of the block it ends in any case."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool
        finally:
            dead.answers.set()


def looks() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "look"]


LOOKS: dict[str, Callable[[Maintenance, Callable[[], None]], object]] = {
    "purge": lambda maintenance, check: purge_image(maintenance.store, "a", check=check),
    "users": lambda maintenance, check: uses_of_image([maintenance.store], maintenance.store.key("a"), check=check),
    "expiry": lambda maintenance, check: maintenance.purge(0, check=check),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_ends_with_who_waits_for_it(maintenance: Maintenance, dead: Dead, look: str) -> None:
    with waiting(dead) as pool:
        with pytest.raises(errors.OperationCancelled):
            pool.submit(LOOKS[look], maintenance, dead.check).result(QUICK)
        assert dead.asked.is_set()
        assert_free(maintenance.store)


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_ends_in_time_and_says_what_hangs(
    maintenance: Maintenance, dead: Dead, look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_look, "monotonic", lambda: 300.0 * dead.asked.is_set())
    with waiting(dead) as pool:
        with pytest.raises(errors.UseUnknown, match="datastore one: VM vm_1 was not read within 300 s"):
            pool.submit(LOOKS[look], maintenance, lambda: None).result(QUICK)
        assert_free(maintenance.store)


def assert_free(store: ImageStore) -> None:
    with store.lock("a", "test", timeout=0):
        assert store.read("a").tombstoned_ns


@pytest.mark.parametrize("kind", ["scan", "sweep"])
def test_the_end_of_the_sidecar_ends_a_run_that_hangs(maintenance: Maintenance, dead: Dead, kind: str) -> None:
    (maintenance.start_scan if kind == "scan" else maintenance.start_sweep)("run")
    assert dead.asked.wait(QUICK)
    with waiting(dead) as pool:
        pool.submit(maintenance.close).result(QUICK)
    runs: Runs[Any] = maintenance.scans if kind == "scan" else maintenance.sweeps
    current = runs.current()
    assert current and current[0].outcome is Outcome.STOPPED


def test_the_end_of_the_sidecar_ends_an_expiry_that_hangs(host: Host, dead: Dead) -> None:
    host.places["one"].file("a", TOMBSTONE).touch()
    maintenance = Maintenance(host.stores["one"], SOURCE, Plan(purge_interval=0.1, tombstone_grace=0))
    maintenance.start()
    assert dead.asked.wait(QUICK)
    with waiting(dead) as pool:
        pool.submit(maintenance.close).result(QUICK)


def test_looks_that_hang_one_after_the_other_keep_one_thread(
    maintenance: Maintenance, dead: Dead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_look, "HUNG_SECONDS", 0.0)
    store = maintenance.store
    with pytest.raises(errors.OperationCancelled):
        purge_image(store, "a", check=dead.check)
    with waiting(dead) as pool:
        for look in LOOKS.values():
            with pytest.raises(errors.DatastoreUnavailable, match="one: an earlier look at VM vm_1 hangs still"):
                pool.submit(look, maintenance, lambda: None).result(QUICK)
        (thread,) = looks()
    thread.join(QUICK)
    assert purge_image(store, "a"), "it answers again"


def test_a_look_that_was_left_by_who_was_in_a_hurry_refuses_no_other(
    maintenance: Maintenance, dead: Dead, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.OperationCancelled):
        purge_image(maintenance.store, "a", check=dead.check)

    waits = itertools.count()

    def wait(steps: Collection[Future[Any]], seconds: float) -> Any:
        if next(waits) < 3:
            return futures.wait(steps, 0)
        dead.answers.set()
        return futures.wait(steps, QUICK)

    monkeypatch.setattr(vm_look, "wait", wait)
    assert purge_image(maintenance.store, "a")


def test_all_vms_are_read_in_one_thread(host: Host) -> None:
    threads: list[threading.Thread] = []

    def uses(stores: object, store: ImageStore, vm_directory: str) -> Uses:
        threads.append(threading.current_thread())
        return {}

    for datastore in host.stores:
        host.vm("1", datastore)
        host.vm("2", datastore)
    stores = list(host.stores.values())
    stores[0].share_host(stores)
    host.places["one"].file("a", TOMBSTONE).touch()
    with closing(Maintenance(stores[0], VmSource(vm_directories, uses), Plan())) as maintenance:
        assert maintenance.purge(0).purged == ["a"]
    assert len(threads) == 12, "without the lock, and under it"
    assert len(set(threads)) == 2


def test_a_vm_that_hangs_is_named_in_one_line_of_text(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is by whoever runs it, and comes into logs and answers."""
    directory, dead = host.vm("\udcff\nstopped"), Dead()
    monkeypatch.setattr(vm_look, "monotonic", lambda: 300.0 * dead.asked.is_set())

    def uses(stores: object, store: ImageStore, vm_directory: str) -> Uses:
        assert vm_directory == directory.name
        dead.asked.set()
        dead.answers.wait()
        return {}

    with waiting(dead) as pool, pytest.raises(errors.UseUnknown) as raised:
        pool.submit(read_uses, VmSource(vm_directories, uses), [host.stores["one"]], lambda: None).result(QUICK)
    assert r"VM vm_\udcff?stopped was not read" in raised.value.message
