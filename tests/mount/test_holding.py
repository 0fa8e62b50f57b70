"""What a mount has held for it: what is open, whatever becomes of the sidecar meanwhile, and nothing else."""

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fusefs.holding import _AGAIN_SECONDS, _UNKNOWN_PAUSE_SECONDS, Hold, Holding
from fusefs.pulse import Pulse
from protos.images.v1 import staging_service_pb2 as wire
from sidecar.client import ImageFile, ImageRef, SidecarClient
from sidecar.errors import (
    DatastoreUnavailable,
    HolderNotFound,
    ImageInUse,
    ImageNotFound,
    ImagesError,
    SidecarUnavailable,
    TooManyCalls,
)
from sidecar.images.maintenance import FIRST_PURGE_SECONDS
from sidecar.services.errors import to_status
from tests.support.processes import wait_until
from tests.unit.test_client import Scripted, serving

FILE = ImageFile(size_bytes=1)


class Server:
    """What is held, by the numbers. `failure` of a datastore is the answer to who holds a file of that."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._lives = 0
        self.held: dict[int, str] = {}
        self.failure: dict[str, ImagesError] = {}
        self.releasing: Callable[[str], ImagesError | None] = lambda datastore: None
        self.refusals: list[ImagesError] = []  # of the next holders
        self.streams: list[queue.SimpleQueue[None]] = []  # that are there
        self.answer: Callable[[str], None] = lambda datastore: None  # called before who holds a file is answered

    @contextmanager
    def serving(self, *, knows_holding: bool = True) -> Iterator[None]:
        scripted = Scripted()
        if knows_holding:
            scripted.behaviors |= {
                "OpenHolder": self._open_holder,
                "HoldFile": self._hold_file,
                "ReleaseFile": self._release_file,
            }
        with serving(self._address, scripted):
            yield
        with self._lock:
            self.held.clear()

    def files(self) -> list[str]:
        with self._lock:
            return sorted(self.held.values())

    def wait_holds(self, *files: str) -> None:
        wait_until(lambda: self.files() == sorted(files), f"it holds {files}")

    def _open_holder(self, request: Any, context: grpc.ServicerContext) -> Iterator[wire.OpenHolderResponse]:
        if self.refusals:
            context.abort_with_status(to_status(self.refusals.pop()))
        over: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.streams.append(over)
        if context.add_callback(lambda: over.put(None)):
            yield wire.OpenHolderResponse(holder_id="h")
            over.get()

    def _hold_file(self, request: wire.HoldFileRequest, context: grpc.ServicerContext) -> wire.HoldFileResponse:
        self.answer(request.ref.datastore)
        if failure := self.failure.get(request.ref.datastore):
            context.abort_with_status(to_status(failure))
        with self._lock:
            self.held[request.number] = f"{request.ref.datastore}/{request.ref.image_id}/{request.name}"
        return wire.HoldFileResponse()

    def _release_file(
        self, request: wire.ReleaseFileRequest, context: grpc.ServicerContext
    ) -> wire.ReleaseFileResponse:
        with self._lock:
            datastore = self.held.get(request.number, "").partition("/")[0]
        if failure := self.releasing(datastore):
            context.abort_with_status(to_status(failure))
        with self._lock:
            self.held.pop(request.number, None)
        return wire.ReleaseFileResponse()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(f"unix:{tmp_path}/s.sock")


@pytest.fixture
def clock() -> Iterator[float]:
    """Stands still."""
    return itertools.repeat(0.0)


@pytest.fixture
def holding(tmp_path: Path, stack: ExitStack, clock: Iterator[float]) -> Holding:
    client = stack.enter_context(SidecarClient(f"unix:{tmp_path}/s.sock", timeout=5))
    holding = Holding(client, Pulse(client), clock=lambda: next(clock))
    holding.start()
    stack.callback(holding.stop)
    return holding


def void(done: object) -> None: ...


def hold(holding: Holding, datastore: str = "one", name: str = "a.vmdk") -> Hold:
    return holding.hold(ImageRef(datastore=datastore, image_id="a"), name, FILE)


def test_each_open_file_is_held_until_it_is_closed(server: Server, holding: Holding) -> None:
    with server.serving():
        first, second = hold(holding), hold(holding)
        assert server.files() == ["one/a/a.vmdk"] * 2
        holding.release(first)
        holding.release(first)
        server.wait_holds("one/a/a.vmdk")
        holding.release(second)
        server.wait_holds()
        holding.stop()


def test_what_is_open_is_held_again_and_what_was_closed_meanwhile_is_not(server: Server, holding: Holding) -> None:
    with server.serving():
        hold(holding, name="open.vmdk")
        closed = hold(holding, name="closed.vmdk")
    holding.release(closed)
    with server.serving():
        server.wait_holds("one/a/open.vmdk")
        holding.stop()


def test_a_datastore_that_does_not_answer_after_a_restart_keeps_no_other_one_waiting(
    server: Server, holding: Holding
) -> None:
    with server.serving():
        for name in ("a.vmdk", "a-flat.vmdk"):
            hold(holding, "one", name)
        hold(holding, "two")
    server.failure["one"] = DatastoreUnavailable("it hangs")
    with server.serving():
        server.wait_holds("two/a/a.vmdk")
        server.failure.clear()
        server.wait_holds("two/a/a.vmdk", "one/a/a.vmdk", "one/a/a-flat.vmdk")
        holding.stop()


def test_what_a_datastore_does_not_let_release_is_released_later_and_keeps_no_other_one(
    server: Server, holding: Holding
) -> None:
    refused = DatastoreUnavailable("it hangs")
    server.releasing = lambda datastore: refused if datastore == "one" else None
    with server.serving():
        opened = [hold(holding, datastore) for datastore in ("one", "one", "two")]
        for each in opened:
            holding.release(each)
        server.wait_holds("one/a/a.vmdk", "one/a/a.vmdk")
        server.releasing = lambda datastore: None
        server.wait_holds()
        holding.stop()


def test_what_is_open_is_held_again_by_several_threads(server: Server, holding: Holding) -> None:
    names = [f"{number}.vmdk" for number in range(8)]
    with server.serving():
        for name in names:
            hold(holding, name=name)
    together = threading.Barrier(4)
    server.answer = lambda datastore: void(together.wait(5))
    with server.serving():
        server.wait_holds(*(f"one/a/{name}" for name in names))
        holding.stop()


def test_a_datastore_that_hangs_keeps_no_file_of_another_one_from_being_held_again(
    server: Server, holding: Holding
) -> None:
    datastores = ("one", "two", "three") * 2
    with server.serving():
        for datastore in datastores:
            hold(holding, datastore)
    over = threading.Event()
    server.answer = lambda datastore: void(datastore == "one" and over.wait(30))
    with server.serving():
        others = sorted(f"{datastore}/a/a.vmdk" for datastore in datastores if datastore != "one")
        # In less than a call of that datastore has.
        wait_until(lambda: server.files() == others, "it holds the others", _AGAIN_SECONDS / 2)
        over.set()
        server.wait_holds(*(f"{datastore}/a/a.vmdk" for datastore in datastores))
        holding.stop()


def test_what_is_open_is_held_again_before_a_sidecar_purges_by_itself() -> None:
    assert _UNKNOWN_PAUSE_SECONDS <= FIRST_PURGE_SECONDS / 2


@pytest.mark.parametrize("clock", [itertools.count(0.0, 6.0)])
def test_an_open_ends_though_the_sidecar_restarts_again_and_again(server: Server, holding: Holding) -> None:
    turns: list[str] = []

    def restart(datastore: str) -> None:
        turns.append(datastore)
        if len(turns) == 20:  # or it would never end
            server.failure.clear()
        server.streams.pop().put(None)

    server.failure["one"] = HolderNotFound("it has ended")
    server.answer = restart
    with server.serving():
        with pytest.raises((HolderNotFound, SidecarUnavailable)):
            hold(holding)
        assert 1 <= len(turns) < 10
        holding.stop()


def test_an_open_is_not_told_the_error_of_a_stream_long_past(
    server: Server, holding: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refusals.append(TooManyCalls("too many holders"))
    with server.serving():
        hold(holding)
        monkeypatch.setattr("fusefs.holding._STREAM_SECONDS", 0.1)
        server.failure["one"] = HolderNotFound("it has ended")
        with pytest.raises(SidecarUnavailable, match="holds no files for this mount"):
            hold(holding)
        holding.stop()


@pytest.mark.parametrize("failure", [ImageNotFound("gone"), ImageInUse("being purged")])
def test_a_file_that_cannot_be_held_is_not_opened(server: Server, holding: Holding, failure: ImagesError) -> None:
    server.failure["one"] = failure
    with server.serving():
        with pytest.raises(type(failure)):
            hold(holding)
        holding.stop()
    assert server.files() == []


def test_while_the_sidecar_is_away_nothing_is_opened_and_the_mount_ends(server: Server, holding: Holding) -> None:
    with server.serving():
        hold(holding)
    with pytest.raises(SidecarUnavailable):
        hold(holding)
    holding.stop()


def test_by_an_older_sidecar_files_are_opened_as_before(
    server: Server, holding: Holding, caplog: pytest.LogCaptureFixture
) -> None:
    with server.serving(knows_holding=False):
        opened = [hold(holding), hold(holding, "two")]
        for each in opened:
            holding.release(each)
        holding.stop()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text.partition(":")[0] for text in warnings] == ["the sidecar is too old to hold files"]
