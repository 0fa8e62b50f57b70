"""A datastore that hangs: its calls do not come back, and everything else goes on as if it were not there."""

import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar import errors
from sidecar.datastores.interface import Capacity
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.admission import LINE, RESERVED, Admission
from sidecar.images.catalog import Catalog
from sidecar.images.deletion import purge_image
from sidecar.images.discovery import Discovery
from sidecar.images.image import ImageKey
from sidecar.images.layouts import LAYOUTS as IMAGE_LAYOUTS
from sidecar.images.library import Library
from sidecar.images.maintenance import Maintenance, Plan
from sidecar.images.runs import Runs, RunState
from sidecar.images.store import ImageStore
from sidecar.images.usage import uses_of_image, uses_of_vm, vm_directories
from sidecar.images.vm_scan import VmSource
from tests.crash.support import answers, lock_files, staging_directories, write_image
from tests.support.disks import MIB
from tests.support.places import Place
from tests.support.processes import Sidecar, loop_mount, run, wait_until

QUICK = 5.0  # seconds, of a call that nothing holds up


@pytest.fixture
def hanging(tmp_path: Path, stack: ExitStack) -> Path:
    """The root of a file system of its own, which `frozen` stops."""
    return stack.enter_context(loop_mount(tmp_path / "fs", 320 * MIB, ("mkfs.xfs", "-q")))


@contextmanager
def frozen(root: Path) -> Iterator[None]:
    """For the block, whoever changes anything there stays in the kernel, whatever becomes of its caller."""
    run("fsfreeze", "--freeze", root)
    try:
        yield
    finally:
        run("fsfreeze", "--unfreeze", root)


@pytest.mark.slow
def test_calls_to_a_datastore_that_hangs_hold_up_no_other(tmp_path: Path, hanging: Path, stack: ExitStack) -> None:
    for number in range(8):
        write_image(hanging, "compound", f"a{number}")
    write_image(tmp_path / "fine", "compound", "a")
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"hanging={hanging}", f"fine={tmp_path / 'fine'}"))
    client = stack.enter_context(sidecar.client(timeout=60.0))
    impatient = stack.enter_context(sidecar.client(timeout=QUICK))
    wait_until(lambda: len(list(client.images())) == 9, "all are listed")

    def calls(number: int) -> list[Callable[[], object]]:
        ref = f"hanging/a{number % 8}"
        return [
            lambda: client.touch(ref),
            lambda: client.delete(ref),
            lambda: client.create_staging(f"hanging/new-{number}").abort(),
            lambda: client.copy("fine/a", f"hanging/copy-{number}").wait(),
        ]

    pool = stack.enter_context(ThreadPoolExecutor(288))
    with frozen(hanging):
        # 288 calls: more than the sidecar has threads.
        outcomes = [pool.submit(answers, call) for number in range(72) for call in calls(number)]
        wait_until(lambda: sum(outcome.done() for outcome in outcomes) > 64, "the first are refused")
        assert health(sidecar.address)
        assert [datastore.name for datastore in impatient.datastores()] == ["fine", "hanging"]
        assert "a" in [image.ref.image_id for image in impatient.images("fine")]
        impatient.copy("fine/a", "fine/b").wait()
        impatient.touch("fine/a")
        with impatient.watch("fine") as watch:
            assert next(watch).snapshot_complete
        wait_until(lambda: answers(lambda: client.delete("hanging/a1")) != "TOO_MANY_CALLS", "the line is refused")
        with pytest.raises(errors.DatastoreUnavailable, match="none came back in the last 5 s"):
            impatient.delete("hanging/a1")
    assert {outcome.result(60) for outcome in outcomes} <= {
        "ok", "DATASTORE_UNAVAILABLE", "TOO_MANY_CALLS", "IMAGE_TOMBSTONED"
    }  # fmt: skip
    client.touch("fine/a")
    client.copy("fine/a", "hanging/after").wait()
    wait_until(lambda: not (lock_files(hanging) or staging_directories(hanging)), "nothing is left on the datastore")
    assert not open_below(sidecar.pid, hanging)


@pytest.mark.slow
def test_a_datastore_that_hangs_keeps_no_lease_and_no_end_of_another(
    tmp_path: Path, hanging: Path, stack: ExitStack
) -> None:
    fine = tmp_path / "fine"
    fine.mkdir()
    config = "[limits]\nstaging_lease_seconds = 2\nshutdown_seconds = 0\n"
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"hanging={hanging}", f"fine={fine}", config=config))
    client = stack.enter_context(sidecar.client())
    client.create_staging("hanging/x")
    client.create_staging("fine/x")
    with frozen(hanging):
        wait_until(lambda: not staging_directories(fine), "its lease is over")
        client.create_staging("fine/y")
        sidecar.signal(signal.SIGTERM)
        wait_until(lambda: not staging_directories(fine) and not lock_files(fine), "the end of the sidecar drops it")
        assert "staging dropped image=fine/y" not in sidecar.log.read_text(), "that was no lease"
        wait_until(lambda: "close does not end" in sidecar.log.read_text(), "it gives up on the one that hangs")


def open_below(pid: int, root: Path) -> list[str]:
    """What a process has open below a directory."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return [path for path in found if path.startswith(f"{root}/")]


def health(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its stub file has no methods
        answer: health_pb2.HealthCheckResponse = stub.Check(health_pb2.HealthCheckRequest(), timeout=QUICK)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_datastore_that_is_known_not_to_answer_is_not_asked(tmp_path: Path, stack: ExitStack) -> None:
    now = [100.0]
    datastore = stack.enter_context(closing(PosixDatastore("one", str(tmp_path))))
    store = ImageStore(datastore, IMAGE_LAYOUTS["compound"])
    discovery = Discovery(store, Catalog(), monotonic=lambda: now[0])
    library = Library([discovery], Catalog(), max_copies=1, lease_seconds=1)
    stack.callback(library.copies.close)
    key = ImageKey("one", "a")
    asks: list[Callable[[], object]] = [
        lambda: library.using("one", lambda: True).__enter__(),
        lambda: library.start_copy(key, key, ""),
        lambda: store.admission.transfer().__enter__(),
    ]
    for since in ("the start", "2"):
        now[0] += 16
        for ask in asks:
            with pytest.raises(errors.DatastoreUnavailable, match=f"datastore one: it has not answered since {since}"):
                ask()
        assert discovery.wait_first_scan(60), "no listing waits for it"
        discovery.check()
        with library.using("one", lambda: True) as found:
            assert found is store


def test_who_waits_in_line_goes_on_when_a_call_comes_back_or_its_caller_leaves() -> None:
    admission = Admission("one", calls=1, patience=3600)
    entered = threading.Event()
    wanted = [True]

    def wait() -> str:
        entered.set()
        return answers(lambda: admission.call(lambda: wanted[0]).__enter__())

    with ThreadPoolExecutor(1) as pool:
        with admission.call():
            waiting = pool.submit(wait)
            assert entered.wait(10)
            wanted[0] = False
            assert waiting.result(10) == "CANCELLED"
            wanted[0] = True
            waiting = pool.submit(wait)
        assert waiting.result(10) == "ok"


# --- waiting for locks, which is not hanging ---

# One place for calls: whatever holds it while it waits is noticed.
IN_OPEN = 0x20
NARROW = "[limits]\nmax_calls = 1\n"


@pytest.fixture
def narrow(tmp_path: Path, stack: ExitStack) -> Sidecar:
    """A sidecar with the images one/a and one/b, and one place for calls."""
    for name in ("a", "b"):
        write_image(tmp_path / "one", "compound", name)
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={tmp_path / 'one'}", config=NARROW))
    client = stack.enter_context(sidecar.client())
    wait_until(lambda: len(list(client.images())) == 2, "all are listed")
    return sidecar


@contextmanager
def somebody_waits_for_a(sidecar: Sidecar, root: Path) -> Iterator[Future[str]]:
    """A call that waits for the lock of one/a in the block; its outcome, after it."""
    place = Place("one", "compound", root)
    with sidecar.client() as client, ThreadPoolExecutor(1) as pool, place.locked("a"):
        with opened(place.lock_file("a")) as tries:
            waiting = pool.submit(answers, lambda: client.touch("one/a"))
            for _ in range(2):  # a lock that is waited for is opened for each try
                tries()
        yield waiting


@contextmanager
def opened(path: Path) -> Iterator[Callable[[], object]]:
    """Waits, when it is called, until somebody has opened the file since it was called last."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(fd, os.fsencode(path), IN_OPEN) >= 0, os.strerror(ctypes.get_errno())

        def wait() -> None:
            assert select.select([fd], [], [], 20)[0], f"nobody opens {path}"
            os.read(fd, 4096)

        yield wait
    finally:
        os.close(fd)


def test_who_waits_for_one_images_lock_holds_up_no_other(narrow: Sidecar, tmp_path: Path) -> None:
    with narrow.client(timeout=QUICK) as client:
        staging = client.create_staging("one/c")
        with somebody_waits_for_a(narrow, tmp_path / "one") as waiting:
            client.image("one/b")
            client.touch("one/b")
            staging.abort()
            assert not waiting.done()
        assert waiting.result(30) == "ok"


def test_more_calls_than_may_wait_for_locks_are_refused_for_what_they_are() -> None:
    now = [100.0]
    admission = Admission("one", calls=1, patience=10, monotonic=lambda: now[0])

    def one_more() -> None:
        with admission.call(lambda: False), admission.stepping_aside() as step:
            step()  # it keeps its place for now
            now[0] += 5
            step()

    for _ in range(2):
        with ThreadPoolExecutor(1) as pool, admission.call(), admission.stepping_aside() as step:
            step()
            assert pool.submit(answers, one_more).result(10) == "TOO_MANY_CALLS"
            assert pool.submit(answers, lambda: admission.call(lambda: False).__enter__()).result(10) == "ok"
    with admission.call(lambda: False):
        pass


def test_who_got_the_lock_does_not_wait_for_a_place() -> None:
    """The places may be held by those who wait for that very lock."""
    admission = Admission("one", calls=1, patience=3600)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with admission.call():
            entered.set()
            assert leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with admission.call(), admission.stepping_aside() as step:
            step()
            call = pool.submit(other)
            assert entered.wait(10)
        leave.set()
        call.result(10)


def test_one_locked_image_takes_no_more_of_the_sidecar_than_its_datastores_share(
    tmp_path: Path, stack: ExitStack
) -> None:
    """More calls for it than there are threads: beyond those in line, they are told so at once."""
    for name in ("one", "two"):
        write_image(tmp_path / name, "compound", "a")
    config = "[limits]\nmax_calls = 1\nmax_copies = 1\nmax_watches = 1\nmax_transfers = 1\nlock_timeout_seconds = 20\n"
    datastores = [f"{name}={tmp_path / name}" for name in ("one", "two")]
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", *datastores, config=config))
    client = stack.enter_context(sidecar.client())
    quick = stack.enter_context(sidecar.client(timeout=QUICK))
    wait_until(lambda: len(list(client.images())) == 2, "all are listed")
    pool = stack.enter_context(ThreadPoolExecutor(350))
    with Place("one", "compound", tmp_path / "one").locked("a"):
        touches = [pool.submit(answers, lambda: client.touch("one/a")) for _ in range(350)]
        wait_until(lambda: any(touch.done() for touch in touches), "the line is full")
        for _ in range(5):
            assert health(sidecar.address)
            quick.touch("two/a")
    assert {touch.result(60) for touch in touches} == {"ok", "TOO_MANY_CALLS"}
    client.touch("one/a")


def test_the_line_is_bounded_and_whoever_frees_what_others_hold_has_room_in_it() -> None:
    admission = Admission("one", calls=1, patience=3600)
    wanted = [True]

    def wait(*, frees: bool) -> str:
        return answers(lambda: admission.long_call(lambda: wanted[0], frees=frees).__enter__())

    with ExitStack() as stack, ThreadPoolExecutor(LINE + RESERVED) as pool:
        stack.enter_context(admission.long_call())
        waiting = [pool.submit(wait, frees=False) for _ in range(LINE)]
        wait_until(lambda: wait_briefly(admission) == "TOO_MANY_CALLS", "the line is full")
        for _ in range(RESERVED):
            stack.enter_context(admission.long_call(frees=True))
        wanted[0] = False
        assert {each.result(10) for each in waiting} == {"CANCELLED"}


def wait_briefly(admission: Admission) -> str:
    return answers(lambda: admission.long_call(lambda: False).__enter__())


def test_a_burst_of_calls_that_wait_for_one_lock_is_served(narrow: Sidecar) -> None:
    with narrow.client() as client, ThreadPoolExecutor(32) as pool:
        assert set(pool.map(lambda _: answers(lambda: client.touch("one/a")), range(64))) == {"ok"}


def test_aborting_does_not_wait_behind_what_hangs() -> None:
    admission = Admission("one", calls=1, patience=3600)
    with ExitStack() as stack:
        stack.enter_context(admission.long_call())
        for _ in range(RESERVED):
            stack.enter_context(admission.long_call(lambda: False, frees=True))
        with pytest.raises(errors.OperationCancelled):  # also of them, what hangs takes no more than that
            stack.enter_context(admission.long_call(lambda: False, frees=True))


def test_a_call_on_two_datastores_holds_no_place_of_one_while_it_waits_for_the_other() -> None:
    one, two = Admission("one", calls=1, patience=3600), Admission("two", calls=1, patience=3600)
    asked, inside, leave = threading.Event(), threading.Event(), threading.Event()

    def wanted() -> bool:
        asked.set()
        return True

    def both() -> None:
        with one.call_with(two, wanted):
            inside.set()
            assert leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with two.call():
            call = pool.submit(both)
            assert asked.wait(10), "it waits for two"
            with one.call(lambda: False):
                assert not inside.is_set()
        assert inside.wait(10)
        for admission in (one, two):
            assert answers(lambda on=admission: on.call(lambda: False).__enter__()) == "CANCELLED"  # type: ignore[misc]
        leave.set()
        call.result(10)
    with one.call(lambda: False), two.call(lambda: False):
        pass


class Hanging(PosixDatastore):
    """A datastore that does not answer who asks for its VMs, or whether it is well, until `answers` is set."""

    def __init__(self, name: str, root: str) -> None:
        super().__init__(name, root)
        self.asked, self.answers = threading.Event(), threading.Event()

    def silence(self) -> str:
        """As the discovery tells it a while later."""
        return "it has not answered since noon" if self.asked.is_set() and not self.answers.is_set() else ""

    def check(self) -> Capacity:
        self._hang()
        return super().check()

    def names(self, path: str) -> list[str]:
        self._hang()
        return super().names(path)

    def _hang(self) -> None:
        self.asked.set()
        self.answers.wait()


LOOKS: dict[str, Callable[[Maintenance, list[ImageStore]], object]] = {
    "purge": lambda maintenance, stores: purge_image(stores[0], "a", force=True),
    "users": lambda maintenance, stores: uses_of_image(stores, ImageKey("fine", "a")),
    "expiry": lambda maintenance, stores: maintenance.purge(0),
    "scan": lambda maintenance, stores: raise_of(maintenance.start_scan, maintenance.scans),
    "sweep": lambda maintenance, stores: raise_of(maintenance.start_sweep, maintenance.sweeps),
}


def raise_of(start: Callable[[str], None], runs: Runs[Any]) -> None:
    """What a run ends with."""
    start("run")
    wait_until(lambda: (now := runs.current()) is not None and now[0].state is RunState.IDLE, "it ends")
    current = runs.current()
    assert current and current[0].error
    raise current[0].error


@pytest.mark.parametrize("look", LOOKS)
def test_a_datastore_that_begins_to_hang_holds_no_look_at_the_vms_of_the_others_up(
    tmp_path: Path, stack: ExitStack, look: str
) -> None:
    """The lock of an image on another one was held, and nothing there freed any more, until it answered."""
    write_image(tmp_path / "fine", "compound", "a")
    (tmp_path / "fine" / "image_a" / "image_tombstone.txt").touch()
    (tmp_path / "hangs").mkdir()
    fine = stack.enter_context(closing(PosixDatastore("fine", str(tmp_path / "fine"))))
    hangs = stack.enter_context(closing(Hanging("hangs", str(tmp_path / "hangs"))))
    stores = [ImageStore(datastore, IMAGE_LAYOUTS["compound"]) for datastore in (fine, hangs)]
    stores[0].share_host(stores)
    stores[1].admission.ask(hangs.silence)
    source = VmSource(vm_directories, uses_of_vm)
    maintenance = stack.enter_context(closing(Maintenance(stores[0], source, Plan())))
    with ThreadPoolExecutor(1) as pool:
        try:
            outcome = pool.submit(LOOKS[look], maintenance, stores)
            with pytest.raises(errors.DatastoreUnavailable, match="hangs: it has not answered since noon"):
                outcome.result(QUICK)
            with stores[0].lock("a", "test", timeout=0):
                pass
            assert (tmp_path / "fine" / "image_a").is_dir()
        finally:
            hangs.answers.set()
