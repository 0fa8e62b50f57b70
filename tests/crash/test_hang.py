"""A datastore that hangs: its calls do not come back, and everything else goes on as if it were not there."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar import errors
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.admission import Admission
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import Discovery
from sidecar.images.image import ImageKey
from sidecar.images.layouts import LAYOUTS as IMAGE_LAYOUTS
from sidecar.images.library import Library
from sidecar.images.store import ImageStore
from tests.crash.support import answers, lock_files, staging_directories, write_image
from tests.support.disks import MIB
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

    pool = stack.enter_context(ThreadPoolExecutor(256))
    with frozen(hanging):
        # 256 calls: more than the sidecar has threads.
        outcomes = [pool.submit(answers, call) for number in range(64) for call in calls(number)]
        wait_until(lambda: sum(outcome.done() for outcome in outcomes) > 64, "the first are refused")
        assert health(sidecar.address)
        assert [datastore.name for datastore in impatient.datastores()] == ["fine", "hanging"]
        assert "a" in [image.ref.image_id for image in impatient.images("fine")]
        impatient.copy("fine/a", "fine/b").wait()
        impatient.touch("fine/a")
        with impatient.watch("fine") as watch:
            assert next(watch).snapshot_complete
        with pytest.raises(errors.DatastoreUnavailable, match="none came back in the last 5 s"):
            impatient.delete("hanging/a1")
    assert {outcome.result(60) for outcome in outcomes} <= {
        "ok", "DATASTORE_UNAVAILABLE", "TOO_MANY_CALLS", "IMAGE_TOMBSTONED"
    }  # fmt: skip
    client.touch("fine/a")
    client.copy("fine/a", "hanging/after").wait()
    wait_until(lambda: not (lock_files(hanging) or staging_directories(hanging)), "nothing is left on the datastore")
    assert not open_below(sidecar.pid, hanging)


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
