"""The server on real sockets: who may connect, who may listen, what arrives when a call fails, and how it ends."""

import contextlib
import fcntl
import logging
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from protos.images.v1 import datastore_service_pb2 as datastores
from protos.images.v1 import datastore_service_pb2_grpc as datastores_grpc
from protos.images.v1 import image_service_pb2 as images
from protos.images.v1 import image_service_pb2_grpc as images_grpc
from protos.images.v1 import types_pb2
from sidecar.config import DatastoreConfig, Limits, SidecarConfig
from sidecar.errors import (
    DatastoreUnavailable,
    ImageNotFound,
    ImagesError,
    InternalError,
    OperationCancelled,
    error_classes,
)
from sidecar.listening import ListenError, UnixSocket
from sidecar.server import MAX_REFLECTIONS, Service, SidecarServer
from sidecar.services.interceptors import subject

LIMIT = 10.0
Deed = Callable[[grpc.ServicerContext], Any]


class Datastores(datastores_grpc.DatastoreServiceServicer):
    """GetDatastore does what the test has set for the name; ListDatastores just answers."""

    def __init__(self) -> None:
        self.deeds: dict[str, Deed] = {}

    def ListDatastores(  # noqa: N802
        self, request: datastores.ListDatastoresRequest, context: grpc.ServicerContext
    ) -> datastores.ListDatastoresResponse:
        return datastores.ListDatastoresResponse(datastores=[types_pb2.Datastore(name="one")])

    def GetDatastore(  # noqa: N802
        self, request: datastores.GetDatastoreRequest, context: grpc.ServicerContext
    ) -> datastores.GetDatastoreResponse:
        self.deeds[request.name](context)
        return datastores.GetDatastoreResponse(datastore=types_pb2.Datastore(name=request.name))


class Images(images_grpc.ImageServiceServicer):
    """Streams go on until the test, or the server, ends them."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.ended = threading.Semaphore(0)
        self.error: Exception | None = None

    def CopyImage(  # noqa: N802
        self, request: images.CopyImageRequest, context: grpc.ServicerContext
    ) -> Iterator[images.CopyImageResponse]:
        gone = threading.Event()
        context.add_callback(gone.set)
        context.add_callback(self.go.set)
        try:
            yield images.CopyImageResponse(done_bytes=1)
            assert self.go.wait(LIMIT)
            if self.error is not None:
                raise self.error
            if not gone.is_set():
                yield images.CopyImageResponse(done_bytes=2)
        finally:
            self.ended.release()


class Running:
    """A server with the two servicers, and a channel to it."""

    def __init__(self, config: SidecarConfig) -> None:
        # Abstract only in their stubs: the classes answer UNIMPLEMENTED.
        self.datastores = Datastores()  # type: ignore[abstract]
        self.images = Images()  # type: ignore[abstract]
        self.server = SidecarServer(
            [
                Service(
                    "images.v1.DatastoreService",
                    lambda server: datastores_grpc.add_DatastoreServiceServicer_to_server(self.datastores, server),
                ),
                Service(
                    "images.v1.ImageService",
                    lambda server: images_grpc.add_ImageServiceServicer_to_server(self.images, server),
                ),
            ],
            config,
        )

    def start(self) -> None:
        self.server.start()
        self.channel = grpc.insecure_channel(
            self.server.address, [("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", -1)]
        )
        self.stub = datastores_grpc.DatastoreServiceStub(self.channel)
        self.copies = images_grpc.ImageServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)  # its stub file has no methods

    def list(self) -> Sequence[str]:
        answer = self.stub.ListDatastores(datastores.ListDatastoresRequest(), timeout=LIMIT)
        return [datastore.name for datastore in answer.datastores]

    def get(self, deed: Deed, name: str = "one") -> datastores.GetDatastoreResponse:
        self.datastores.deeds[name] = deed
        return self.stub.GetDatastore(datastores.GetDatastoreRequest(name=name), timeout=LIMIT)

    def copy(self) -> Any:
        """A running copy, of which the first answer has arrived."""
        call = self.copies.CopyImage(images.CopyImageRequest(), timeout=LIMIT)
        assert next(iter(call)).done_bytes == 1
        return call

    def status(self, service: str = "") -> int:
        answer: health_pb2.HealthCheckResponse = self.health.Check(
            health_pb2.HealthCheckRequest(service=service), timeout=LIMIT
        )
        return answer.status


def configured(listen: str, **limits: Any) -> SidecarConfig:
    return SidecarConfig(
        listen=listen,
        datastores=(DatastoreConfig(name="one", path="/one"),),
        limits=Limits(**{"shutdown_seconds": LIMIT, **limits}),
    )


@contextlib.contextmanager
def serving(listen: str, **limits: Any) -> Iterator[Running]:
    running = Running(configured(listen, **limits))
    running.start()
    try:
        yield running
    finally:
        running.images.go.set()
        running.server.cancel()
        running.server.stop()
        running.channel.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sidecar.sock"


@pytest.fixture
def running(path: Path) -> Iterator[Running]:
    with serving(f"unix:{path}") as running:
        yield running


def make_stale(path: Path) -> None:
    """What a process that was killed leaves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
        dead.listen()


def raised(call: Callable[[], object]) -> Any:
    """The gRPC error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def info_of(error: Any) -> Any:
    """The ErrorInfo of an error that arrived."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


# Who may connect.


def test_a_socket_is_never_open_to_everyone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[int, int]] = []
    before = os.chmod

    def chmod(name: str, mode: int, *, dir_fd: int) -> None:
        directory, bound = os.stat(dir_fd), os.stat(name, dir_fd=dir_fd)
        modes.append((stat.S_IMODE(directory.st_mode), stat.S_IMODE(bound.st_mode)))
        assert not path.exists()
        before(name, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "chmod", chmod)
    old = os.umask(0)
    try:
        with serving(f"unix:{path}") as running:
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert running.list() == ["one"]
    finally:
        os.umask(old)
    # The worst umask made it 0777, where nobody but us could get at it.
    assert modes == [(0o700, 0o777)]


def test_a_socket_gets_its_mode_under_a_strict_umask_too(path: Path) -> None:
    old = os.umask(0o077)
    try:
        with serving(f"unix:{path}"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
    finally:
        os.umask(old)


def test_the_longest_path_that_a_client_can_name_works(tmp_path: Path) -> None:
    room = 107 - len(os.fsencode(tmp_path)) - 1
    path = tmp_path / ("x" * room)
    assert len(os.fsencode(path)) == 107
    with serving(f"unix:{path}") as running:
        assert running.list() == ["one"]


def test_nothing_is_left_behind(path: Path) -> None:
    with serving(f"unix:{path}") as running:
        assert running.list() == ["one"]
        assert sorted(os.listdir(path.parent)) == [path.name, f"{path.name}.lock"]
    assert os.listdir(path.parent) == []


# Who may listen.


def test_a_stale_socket_does_not_keep_a_sidecar_from_starting(path: Path) -> None:
    make_stale(path)
    with serving(f"unix:{path}") as running:
        assert running.list() == ["one"]


def test_what_a_sidecar_left_that_was_killed_while_it_started_is_cleared(path: Path) -> None:
    private = path.with_name(f"{path.name}.new")
    private.mkdir()
    make_stale(private / "sidecar-0")
    with serving(f"unix:{path}") as running:
        assert running.list() == ["one"]
        assert not private.exists()


def test_a_second_sidecar_does_not_take_the_socket_of_the_first(path: Path, running: Running) -> None:
    second = SidecarServer([], configured(f"unix:{path}"))
    with pytest.raises(ListenError, match=rf"{path}: another sidecar \(process {os.getpid()}\) serves there"):
        second.start()
    assert running.list() == ["one"]
    assert path.exists()


def test_a_socket_of_another_program_is_not_taken(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen(0)
        inode = path.stat().st_ino
        # With its queue empty, and with its queue full.
        for _ in range(2):
            with pytest.raises(ListenError, match=f"{path}: another process serves there"):
                SidecarServer([], configured(f"unix:{path}")).start()
        assert path.stat().st_ino == inode
        assert os.listdir(path.parent) == [path.name], "who is refused leaves no lock"


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_not_touched(path: Path, kind: str) -> None:
    target = path.with_name("precious")
    target.write_text("precious")
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(target)
    inode = path.lstat().st_ino
    with pytest.raises(ListenError, match="something that is not a socket"):
        SidecarServer([], configured(f"unix:{path}")).start()
    assert path.lstat().st_ino == inode
    assert target.read_text() == "precious"
    assert sorted(os.listdir(path.parent)) == sorted({path.name, target.name}), "who is refused leaves no lock"


def test_what_comes_to_the_path_while_the_server_starts_is_not_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.chmod

    def chmod(name: str, mode: int, *, dir_fd: int) -> None:
        before(name, mode, dir_fd=dir_fd)
        path.write_text("precious")

    monkeypatch.setattr(os, "chmod", chmod)
    with pytest.raises(ListenError, match="something that is not a socket"):
        SidecarServer([], configured(f"unix:{path}")).start()
    assert path.read_text() == "precious"
    assert os.listdir(path.parent) == [path.name]


def test_of_many_that_start_on_one_stale_socket_one_serves(path: Path) -> None:
    make_stale(path)
    count = 6
    together = threading.Barrier(count)
    servers = [Running(configured(f"unix:{path}")) for _ in range(count)]

    def start(server: Running) -> str:
        together.wait(LIMIT)
        try:
            server.start()
        except ListenError as error:
            return error.message
        return "serves"

    with ThreadPoolExecutor(count) as pool:
        outcomes = list(pool.map(start, servers))
    try:
        assert outcomes.count("serves") == 1
        assert all("another sidecar" in outcome for outcome in outcomes if outcome != "serves")
        assert servers[outcomes.index("serves")].list() == ["one"]
    finally:
        winner = servers[outcomes.index("serves")]
        winner.server.stop()
        winner.channel.close()


def test_a_lock_of_a_file_that_is_gone_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that ends takes its lock file away between another's open and lock: a third would not see that one."""
    lock = path.with_name(f"{path.name}.lock")
    before = fcntl.flock
    ended: list[bool] = []

    def flock(fd: int, operation: int) -> None:
        if not ended:
            ended.append(True)
            lock.unlink()
        before(fd, operation)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", flock)
        with serving(f"unix:{path}") as running:
            assert ended and lock.exists()
            with pytest.raises(ListenError, match="another sidecar"):
                SidecarServer([], configured(f"unix:{path}")).start()
            assert running.list() == ["one"]
    assert os.listdir(path.parent) == []


def test_of_many_that_end_and_start_no_two_serve(path: Path) -> None:
    serve_now = threading.Semaphore(1)
    until = time.monotonic() + 3
    count = 0

    def work() -> None:
        nonlocal count
        while time.monotonic() < until:
            socket_at = UnixSocket(str(path))
            try:
                socket_at._lock()
            except ListenError:
                continue
            assert serve_now.acquire(blocking=False), "another one has the lock"
            count += 1
            serve_now.release()
            socket_at._release()

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(work) for _ in range(4)]:
            each.result(LIMIT * 3)
    assert count > 10
    assert os.listdir(path.parent) == []


def test_a_server_that_ends_does_not_remove_the_socket_of_its_successor(path: Path) -> None:
    with serving(f"unix:{path}"):
        path.unlink()
        make_stale(path)
        inode = path.stat().st_ino
    assert path.stat().st_ino == inode


def test_the_address_is_free_when_a_server_has_ended(path: Path) -> None:
    for _ in range(3):
        with serving(f"unix:{path}") as running:
            assert running.list() == ["one"]


def test_a_directory_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(ListenError, match=r"missing/x\.sock: there is no directory .*missing: make it first"):
        SidecarServer([], configured(f"unix:{path.parent}/missing/x.sock")).start()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_port_that_is_chosen_is_told(host: str) -> None:
    if host == "[::1]" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    with serving(f"{host}:0") as running:
        assert re.fullmatch(rf"{re.escape(host)}:[1-9]\d*", running.server.address)
        assert running.list() == ["one"]


def test_two_sidecars_do_not_share_a_port_and_each_get_half_of_the_calls() -> None:
    with serving("127.0.0.1:0") as running:
        with pytest.raises(ListenError, match=running.server.address):
            SidecarServer([], configured(running.server.address)).start()
        assert running.list() == ["one"]


# What arrives when a call fails.


@pytest.mark.parametrize("kind", error_classes().values(), ids=lambda kind: kind.__name__)
def test_every_error_arrives_with_its_code_reason_and_message(running: Running, kind: type[ImagesError]) -> None:
    def deed(context: grpc.ServicerContext) -> None:
        raise kind("what, where, and what to do: é {x} %s\n")

    error = raised(lambda: running.get(deed))
    info = info_of(error)
    assert (info.domain, info.reason, error.code().name) == ("images.v1", kind.reason, kind.code)
    if kind is not InternalError:
        assert error.details() == "what, where, and what to do: é {x} %s\n"


def test_an_error_in_the_middle_of_a_stream_arrives_with_its_reason(running: Running) -> None:
    running.images.error = ImageNotFound("gone while it was copied")
    call = running.copy()
    running.images.go.set()
    error = raised(lambda: list(call))
    assert (error.code(), info_of(error).reason) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")


def test_an_error_that_names_a_thousand_holders_still_arrives_as_that_error(running: Running) -> None:
    def deed(context: grpc.ServicerContext) -> None:
        raise ImageNotFound("é" * 100_000)

    error = raised(lambda: running.get(deed))
    assert info_of(error).reason == "IMAGE_NOT_FOUND"
    assert error.details().endswith("é…")


def test_an_error_about_a_file_name_that_is_not_utf8_still_arrives_as_that_error(running: Running) -> None:
    def deed(context: grpc.ServicerContext) -> None:
        raise ImageNotFound(os.fsdecode(b"one/\xff"))

    error = raised(lambda: running.get(deed))
    assert info_of(error).reason == "IMAGE_NOT_FOUND"
    assert error.details() == "one/\\udcff"


@pytest.mark.parametrize("error", [OSError(5, "secret"), InternalError("secret"), Exception(), SystemExit("secret")])
def test_a_defect_is_logged_and_its_inside_is_not_told(
    running: Running, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def deed(context: grpc.ServicerContext) -> None:
        raise error

    arrived = raised(lambda: running.get(deed))
    assert (arrived.code(), info_of(arrived).reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in arrived.details()
    logged = [record for record in caplog.records if record.exc_info]
    assert [record.levelname for record in logged] == ["ERROR"]
    assert logged[0].exc_info is not None
    assert logged[0].exc_info[1] is error


@pytest.mark.parametrize("kind", [OperationCancelled, DatastoreUnavailable])
def test_a_caller_who_left_is_no_defect(path: Path, caplog: pytest.LogCaptureFixture, kind: type[ImagesError]) -> None:
    started, gone = threading.Event(), threading.Event()

    def deed(context: grpc.ServicerContext) -> None:
        context.add_callback(gone.set)
        started.set()
        assert gone.wait(LIMIT)
        raise kind("nobody waits any more")

    caplog.set_level(logging.DEBUG)
    with serving(f"unix:{path}") as running:
        running.datastores.deeds["one"] = deed
        call: Any = running.stub.GetDatastore.future(datastores.GetDatastoreRequest(name="one"), timeout=LIMIT)
        assert started.wait(LIMIT)
        call.cancel()
        assert gone.wait(LIMIT)
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []
    told = "CANCELLED" if kind is OperationCancelled else kind.reason
    assert [record for record in caplog.records if f"outcome={told}" in record.getMessage()]


def test_a_method_that_nobody_serves_is_unimplemented(running: Running) -> None:
    call: Any = running.channel.unary_unary("/images.v1.DatastoreService/Nothing")
    assert raised(lambda: call(b"", timeout=LIMIT)).code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_message_larger_than_the_limit_is_refused(running: Running) -> None:
    request = datastores.GetDatastoreRequest(name="x" * (8 << 20))
    error = raised(lambda: running.stub.GetDatastore(request, timeout=LIMIT))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_log_tells_who_changed_what_and_how_it_ended(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sidecar")
    ref = types_pb2.ImageRef(datastore="one", image_id="a")
    evil = types_pb2.ImageRef(datastore="two", image_id="b\noutcome=OK")
    with serving(f"unix:{path}") as running:
        running.list()
        running.images.go.set()
        request = images.CopyImageRequest(source=ref, destination=evil, request_id="1")
        list(running.copies.CopyImage(request, timeout=LIMIT))
    lines = [record.getMessage() for record in caplog.records if "call done" in record.getMessage()]
    # Of the two calls, the one that changes something.
    assert len(lines) == 1
    assert re.fullmatch(
        r"call done method=CopyImage source=one/a destination='two/b\\noutcome=OK' request_id=1 "
        r"seconds=\d+\.\d{3} outcome=OK",
        lines[0],
    )


def test_a_request_cannot_fill_the_log() -> None:
    assert len(subject(datastores.GetDatastoreRequest(name="x" * 1_000_000))) < 300


# How many at a time.


def test_copies_beyond_the_limit_are_told_so_and_leave_room_for_small_calls(path: Path) -> None:
    with serving(f"unix:{path}", max_copies=2, max_watches=1, max_transfers=1, max_calls=1) as running:
        calls = [running.copy(), running.copy()]
        for _ in range(20):
            error = raised(running.copy)
            assert (error.code(), info_of(error).reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
            assert running.list() == ["one"]
        running.images.go.set()
        assert [[answer.done_bytes for answer in call] for call in calls] == [[2], [2]]
        running.copy().cancel()


def test_a_cancelled_copy_gives_its_place_back(path: Path) -> None:
    with serving(f"unix:{path}", max_copies=1) as running:
        for _ in range(20):
            running.images.go.clear()
            # The place is free a moment after the handler ended: what is asked is that it is not lost.
            call = _until_admitted(running)
            call.cancel()
            assert running.images.ended.acquire(timeout=LIMIT)


def _until_admitted(running: Running) -> Any:
    while True:
        try:
            return running.copy()
        except grpc.RpcError as error:
            assert info_of(error).reason == "TOO_MANY_CALLS"


def test_reflection_that_is_held_open_leaves_room_for_calls_and_for_the_end(path: Path) -> None:
    with serving(f"unix:{path}", max_copies=1, max_watches=1, max_transfers=1, max_calls=1) as running:
        done = threading.Event()

        def requests() -> Iterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            done.wait(LIMIT)

        stub: Any = reflection_pb2_grpc.ServerReflectionStub(running.channel)
        held = [stub.ServerReflectionInfo(requests(), timeout=LIMIT) for _ in range(MAX_REFLECTIONS)]
        for call in held:
            next(call)
        assert raised(lambda: next(stub.ServerReflectionInfo(requests(), timeout=LIMIT))).code() == (
            grpc.StatusCode.RESOURCE_EXHAUSTED
        )
        assert running.list() == ["one"]
        # It does not wait for the grace time, which is as long as the calls' own limit.
        assert running.server.stop()
        done.set()
        assert raised(lambda: next(held[0])).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


# Health and reflection.


def test_health_tells_of_every_service(running: Running) -> None:
    serves = health_pb2.HealthCheckResponse.SERVING
    for service in ("", "images.v1.DatastoreService", "images.v1.ImageService"):
        assert running.status(service) == serves
    assert raised(lambda: running.status("images.v1.Nothing")).code() == grpc.StatusCode.NOT_FOUND


def test_a_tool_without_our_files_finds_the_services(running: Running) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="images.v1.DatastoreService"),
    ]
    services, file = list(stub.ServerReflectionInfo(iter(asked), timeout=LIMIT))
    names = {service.name for service in services.list_services_response.service}
    assert {"images.v1.DatastoreService", "images.v1.ImageService", "grpc.health.v1.Health"} <= names
    assert file.file_descriptor_response.file_descriptor_proto


def test_health_watches_hold_no_threads_and_do_not_hold_up_the_end(path: Path) -> None:
    with serving(f"unix:{path}", max_copies=1, max_watches=1, max_transfers=1, max_calls=1) as running:
        watches = [running.health.Watch(health_pb2.HealthCheckRequest(), timeout=LIMIT) for _ in range(50)]
        for watch in watches:
            assert next(iter(watch)).status == health_pb2.HealthCheckResponse.SERVING
        assert running.list() == ["one"]
        assert running.server.stop()
        assert next(iter(watches[0])).status == health_pb2.HealthCheckResponse.NOT_SERVING


# The end.


def test_a_running_call_may_end_and_new_ones_are_told_to_come_again(path: Path) -> None:
    with serving(f"unix:{path}") as running:
        call = running.copy()
        running.server.refuse()
        assert running.status() == health_pb2.HealthCheckResponse.NOT_SERVING
        assert running.status("images.v1.ImageService") == health_pb2.HealthCheckResponse.NOT_SERVING
        # Never CANCELLED, for which nobody tries again.
        for _ in range(100):
            error = raised(running.list)
            assert (error.code(), info_of(error).reason) == (grpc.StatusCode.UNAVAILABLE, "SIDECAR_UNAVAILABLE")
        running.images.go.set()
        assert running.server.stop()
        assert [answer.done_bytes for answer in call] == [2]


def test_a_change_that_is_made_while_the_server_ends_is_answered(path: Path) -> None:
    """Cancelling between the handler's return and its answer would tell that it was not made."""
    # So large that it takes a while to be sent.
    name = "x" * (7 << 20)
    for _ in range(5):
        with serving(f"unix:{path}") as running, ThreadPoolExecutor() as pool:
            started, go = threading.Event(), threading.Event()

            def deed(context: grpc.ServicerContext, started: threading.Event = started, go: Any = go) -> None:
                started.set()
                assert go.wait(LIMIT)

            answer = pool.submit(running.get, deed, name)
            assert started.wait(LIMIT)
            stopped = pool.submit(running.server.stop)
            go.set()
            assert stopped.result(LIMIT)
            assert answer.result(LIMIT).datastore.name == name


def test_what_does_not_end_in_time_is_cancelled(path: Path) -> None:
    with serving(f"unix:{path}", shutdown_seconds=0.0) as running:
        call = running.copy()
        assert running.server.stop()
        assert raised(lambda: list(call)).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        assert running.images.ended.acquire(blocking=False)


def test_an_impatient_operator_does_not_wait_for_the_grace_time(path: Path) -> None:
    with serving(f"unix:{path}", shutdown_seconds=3600.0) as running, ThreadPoolExecutor() as pool:
        call = running.copy()
        stopped = pool.submit(running.server.stop)
        running.server.cancel()
        assert stopped.result(LIMIT)
        assert raised(lambda: list(call)).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


def test_a_handler_that_hangs_in_the_storage_does_not_keep_the_server(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.server.CANCEL_SECONDS", 0.1)
    with serving(f"unix:{path}", shutdown_seconds=0.0) as running, ThreadPoolExecutor() as pool:
        started, go = threading.Event(), threading.Event()

        def deed(context: grpc.ServicerContext) -> None:
            started.set()
            assert go.wait(LIMIT)

        answer = pool.submit(running.get, deed)
        assert started.wait(LIMIT)
        assert not running.server.stop()
        assert not path.exists()
        go.set()
        assert isinstance(answer.exception(LIMIT), grpc.RpcError)
