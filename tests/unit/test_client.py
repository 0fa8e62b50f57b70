"""The client against a real gRPC server that answers as each test says."""

import contextlib
import faulthandler
import itertools
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from protos.images.v1 import datastore_service_pb2, image_service_pb2, staging_service_pb2
from sidecar import client_calls, errors
from sidecar.client import Datastore, Hole, Image, ImageRef, SidecarClient, default_address, parse_ref
from sidecar.services.errors import to_status
from tests.support.processes import run

ONE = ImageRef(datastore="one", image_id="a")
Behavior = Callable[[Any, grpc.ServicerContext], Any]


class Scripted(grpc.GenericRpcHandler):
    """A server whose methods do what was given for them, and which keeps the requests."""

    def __init__(self) -> None:
        self.behaviors: dict[str, Behavior] = {}
        self.requests: list[Any] = []
        self.ended = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        service, _, method = details.method.removeprefix("/images.v1.").partition("/")
        if method not in self.behaviors:
            return None
        modules = {
            "ImageService": image_service_pb2,
            "StagingService": staging_service_pb2,
            "DatastoreService": datastore_service_pb2,
        }
        module = modules[service]
        description = module.DESCRIPTOR.services_by_name[service].methods_by_name[method]
        streams_in, streams_out = description.client_streaming, description.server_streaming
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
        }[streams_in, streams_out]

        def behavior(request: Any, context: grpc.ServicerContext) -> Any:
            context.add_callback(self.ended.set)
            if not streams_in:
                self.requests.append(request)
            return self.behaviors[method](request, context)

        return make(
            behavior,
            request_deserializer=getattr(module, f"{method}Request").FromString,
            response_serializer=getattr(module, f"{method}Response").SerializeToString,
        )


@contextlib.contextmanager
def serving(address: str, scripted: Scripted) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((scripted,))
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/s.sock"


@pytest.fixture
def scripted(address: str) -> Iterator[Scripted]:
    made = Scripted()
    with serving(address, made):
        yield made


@pytest.fixture
def client(address: str, scripted: Scripted) -> Iterator[SidecarClient]:
    with SidecarClient(address, timeout=10) as made:
        yield made


def raising(*failures: BaseException | None, answer: Any = None) -> Behavior:
    """Fails as given, call by call (the last for ever), and answers where None is given."""
    left = itertools.chain(failures[:-1], itertools.repeat(failures[-1]))

    def behave(request: Any, context: grpc.ServicerContext) -> Any:
        failure = next(left)
        if isinstance(failure, errors.ImagesError):
            context.abort_with_status(to_status(failure))
        if isinstance(failure, Bare):
            context.abort(failure.code, failure.message)
        return answer

    return behave


class Bare(Exception):  # noqa: N818 - a status, not a fault of the test
    """A status without ErrorInfo, as gRPC itself and servers in the way send them."""

    def __init__(self, code: grpc.StatusCode, message: str = "why") -> None:
        super().__init__(message)
        self.code = code
        self.message = message


# --- names ---


def test_the_address_is_the_environments_then_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_SIDECAR", "unix:/elsewhere.sock")
    assert default_address() == "unix:/elsewhere.sock"
    monkeypatch.delenv("IMAGE_SIDECAR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_address() == "unix:/run/image-sidecar.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/runtime")
    assert default_address() == "unix:/runtime/image-sidecar.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_address() == "unix:/run/user/1234/image-sidecar.sock"


def test_a_relative_socket_is_found_after_a_change_of_directory(
    tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.behaviors["ListDatastores"] = raising(None, answer=datastore_service_pb2.ListDatastoresResponse())
    monkeypatch.chdir(tmp_path)
    with SidecarClient("unix:s.sock") as client, SidecarClient("./s.sock") as other:
        monkeypatch.chdir("/")
        assert client.datastores() == other.datastores() == []
        assert client.address == f"unix:{tmp_path}/s.sock"


def test_a_socket_path_that_no_kernel_takes_is_said_before_it_is_tried() -> None:
    with pytest.raises(errors.InvalidRequest, match="longer than 107 bytes"):
        SidecarClient("unix:/" + "x" * 107)


def test_an_image_is_written_datastore_slash_image() -> None:
    assert parse_ref("one/a") == ONE


@pytest.mark.parametrize("text", ["", "one", "one/", "/a", "one/a/", "one/a/b", "one/\udc80", "one/a\n"])
def test_what_names_no_image_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="DATASTORE/IMAGE"):
        parse_ref(text)


# --- errors ---


@pytest.mark.parametrize("reason", sorted(errors.error_classes()))
def test_every_error_of_the_sidecar_is_the_same_class_here(
    reason: str, client: SidecarClient, scripted: Scripted
) -> None:
    kind = errors.error_classes()[reason]
    scripted.behaviors["GetImage"] = raising(kind("what, where, what next"))
    with pytest.raises(kind) as caught:
        client.image(ONE)
    assert type(caught.value) is kind
    assert caught.value.message == "what, where, what next"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.SidecarUnavailable),
        (grpc.StatusCode.CANCELLED, errors.OperationCancelled),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.UNIMPLEMENTED, errors.CallUnknown),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.TooManyCalls),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
def test_a_status_without_error_info_is_translated_by_its_code(
    code: grpc.StatusCode, kind: type[errors.ImagesError], client: SidecarClient, scripted: Scripted
) -> None:
    scripted.behaviors["GetImage"] = raising(Bare(code))
    with pytest.raises(kind) as caught:
        client.image(ONE)
    assert type(caught.value) is kind


def test_a_call_that_the_sidecar_does_not_know_speaks_of_versions(client: SidecarClient) -> None:
    with pytest.raises(errors.InternalError, match="different versions"):
        client.image(ONE)


def test_error_info_of_somebody_else_is_not_ours(client: SidecarClient, scripted: Scripted) -> None:
    def behave(request: Any, context: grpc.ServicerContext) -> None:
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(domain="proxy.example", reason="IMAGE_NOT_FOUND"))
        context.abort_with_status(rpc_status.to_status(status_pb2.Status(code=13, message="why", details=[detail])))

    scripted.behaviors["GetImage"] = behave
    with pytest.raises(errors.InternalError, match="INTERNAL: why"):
        client.image(ONE)


def test_no_sidecar_names_the_address_and_the_next_step(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/none.sock"
    with SidecarClient(address) as client:
        with pytest.raises(errors.SidecarUnavailable) as caught:
            client.datastores()
        assert address in caught.value.message
        assert "No such file" in caught.value.message
        assert "image-sidecar serve" in caught.value.message
        started = time.monotonic()
        with pytest.raises(errors.SidecarUnavailable, match=address):
            client.wait_ready(0.5)
        assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "address", ["nonsense", "host:", ":7000", "host:port", "host:0", "host:65536", "unix:", "unix://"]
)
def test_what_is_no_address_is_said_before_it_is_tried(address: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="write unix:PATH or HOST:PORT"):
        SidecarClient(address)


def test_a_host_that_there_is_not_is_said_in_our_words() -> None:
    with SidecarClient("no-such-host.invalid:7000") as client, pytest.raises(errors.SidecarUnavailable) as caught:
        client.datastores()
    assert caught.value.message == (
        "no sidecar answers at no-such-host.invalid:7000 (there is no host of that name): "
        "see that image-sidecar is running there, or name another with IMAGE_SIDECAR or --sidecar"
    )


@contextlib.contextmanager
def other_program(answer: bytes) -> Iterator[str]:
    """What takes connections, gives that answer, and no other; its address."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    connection = stack.enter_context(listener.accept()[0])
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_another_program_at_the_address_is_said_in_our_words() -> None:
    with (
        other_program(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as address,
        SidecarClient(address) as client,
        pytest.raises(errors.SidecarUnavailable) as caught,
    ):
        client.datastores()
    assert f"at {address} (what answers there is another program: it does not speak gRPC): see " in caught.value.message


@pytest.mark.slow
def test_a_program_that_takes_the_connection_and_is_silent_is_left_soon() -> None:
    started = time.monotonic()
    with (
        other_program(b"") as address,
        SidecarClient(address) as client,
        pytest.raises(errors.SidecarUnavailable) as caught,
    ):
        client.datastores()
    assert f"at {address} (something takes the connection and does not answer): see " in caught.value.message
    assert time.monotonic() - started < 15


# --- deadlines and retries ---


def test_unavailable_is_tried_again_and_is_one_change(client: SidecarClient, scripted: Scripted) -> None:
    scripted.behaviors["DeleteImage"] = raising(
        errors.DatastoreUnavailable("I/O error"),
        Bare(grpc.StatusCode.UNAVAILABLE),
        None,
        answer=image_service_pb2.DeleteImageResponse(),
    )
    client.delete("one/a")
    client.delete("one/a")
    first, second, third, other = (request.request_id for request in scripted.requests)
    assert first == second == third
    assert len(first) == 32
    assert other != first


def test_unavailable_for_good_is_said_after_three_tries(client: SidecarClient, scripted: Scripted) -> None:
    scripted.behaviors["GetImage"] = raising(errors.DatastoreUnavailable("I/O error"))
    with pytest.raises(errors.DatastoreUnavailable):
        client.image(ONE)
    assert len(scripted.requests) == 3


@pytest.mark.parametrize("refusal", [errors.TooManyCalls, errors.DatastoreUnavailable])
def test_a_try_that_is_refused_does_not_say_that_one_before_it_did_nothing(
    refusal: type[errors.ImagesError], client: SidecarClient, scripted: Scripted
) -> None:
    """The mount would let its files be written again, while the lost try publishes them."""
    scripted.behaviors["DeleteImage"] = raising(Bare(grpc.StatusCode.UNAVAILABLE, "Socket closed"), refusal("no room"))
    with pytest.raises(errors.SidecarUnavailable, match="Socket closed"):
        client.delete("one/a")


@pytest.mark.parametrize("kind", [errors.LockTimeout, errors.NoSpace, errors.TooManyCalls, errors.InternalError])
def test_no_other_error_is_tried_again(
    kind: type[errors.ImagesError], client: SidecarClient, scripted: Scripted
) -> None:
    scripted.behaviors["GetImage"] = raising(kind("no"))
    with pytest.raises(kind):
        client.image(ONE)
    assert len(scripted.requests) == 1


def test_tries_end_at_the_deadline(address: str, scripted: Scripted) -> None:
    scripted.behaviors["GetImage"] = raising(Bare(grpc.StatusCode.UNAVAILABLE, "busy"))
    with SidecarClient(address, timeout=0.4) as client, pytest.raises(errors.SidecarUnavailable):
        client.image(ONE)
    assert len(scripted.requests) <= 2, "a third try would begin after the deadline"


def test_a_sidecar_that_hangs_is_left_at_the_deadline(address: str, scripted: Scripted) -> None:
    release = threading.Event()
    scripted.behaviors["GetImage"] = lambda request, context: release.wait(20) and None
    started = time.monotonic()
    with SidecarClient(address, timeout=0.3) as client, pytest.raises(errors.DeadlineExceeded, match="in time"):
        client.image(ONE)
    assert time.monotonic() - started < 2
    release.set()


def test_the_sidecar_may_restart_between_two_calls(address: str) -> None:
    scripted = Scripted()
    scripted.behaviors["ListDatastores"] = raising(None, answer=datastore_service_pb2.ListDatastoresResponse())
    with SidecarClient(address) as client:
        for _ in range(3):
            with serving(address, scripted):
                client.wait_ready(10)
                client.datastores()
    assert len(scripted.requests) == 3


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy", "all_proxy"])
def test_a_proxy_of_the_environment_is_not_on_the_way(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    scripted = Scripted()
    scripted.behaviors["ListDatastores"] = raising(None, answer=datastore_service_pb2.ListDatastoresResponse())
    with serving("127.0.0.1:0", scripted) as address, SidecarClient(address) as client:
        assert client.datastores() == []


# --- answers ---


def test_images_are_fetched_page_by_page(client: SidecarClient, scripted: Scripted) -> None:
    tokens: list[str] = []

    def pages(request: image_service_pb2.ListImagesRequest, context: grpc.ServicerContext) -> Any:
        tokens.append(request.page_token)
        number = int(request.page_token or 0)
        ref = ImageRef(datastore="one", image_id=str(number))
        return image_service_pb2.ListImagesResponse(
            images=[Image(ref=ref)], next_page_token=str(number + 1) if number < 2 else ""
        )

    scripted.behaviors["ListImages"] = pages
    images = client.images("one", page_size=1)
    assert next(images).ref.image_id == "0"
    assert tokens == [""]
    assert [image.ref.image_id for image in images] == ["1", "2"]
    assert scripted.requests[-1].page_size == 1


def test_a_touch_is_told_in_utc(client: SidecarClient, scripted: Scripted) -> None:
    answer = image_service_pb2.TouchImageResponse()
    answer.touch_time.FromDatetime(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    scripted.behaviors["TouchImage"] = raising(None, answer=answer)
    assert client.touch("one/a") == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_companion_files_travel_by_name(client: SidecarClient, scripted: Scripted) -> None:
    answer = image_service_pb2.UpdateMetadataResponse(image=Image(ref=ONE))
    scripted.behaviors["UpdateMetadata"] = raising(None, answer=answer)
    assert client.update_metadata(ONE, files={"a.ecv": b"{}" * (400 << 10)}, remove=["a.manifest"]).ref == ONE
    assert dict(scripted.requests[0].files) == {"a.ecv": b"{}" * (400 << 10)}
    assert list(scripted.requests[0].remove_files) == ["a.manifest"]


# --- copies and watches ---


def copying(context_ended: threading.Event) -> Behavior:
    def behave(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield image_service_pb2.CopyImageResponse(done_bytes=1, total_bytes=2)
        context_ended.wait(20)

    return behave


def test_a_copy_ends_with_its_image(client: SidecarClient, scripted: Scripted) -> None:
    scripted.behaviors["CopyImage"] = lambda request, context: iter(
        [
            image_service_pb2.CopyImageResponse(done_bytes=1, total_bytes=2),
            image_service_pb2.CopyImageResponse(done_bytes=2, total_bytes=2, image=Image(ref=request.destination)),
        ]
    )
    seen: list[int] = []
    image = client.copy(ONE, "two/b", request_id="r").wait(lambda answer: seen.append(answer.done_bytes))
    assert image.ref == parse_ref("two/b")
    assert seen == [1, 2]
    assert scripted.requests[0].request_id == "r"
    assert [answer.done_bytes for answer in client.copy(ONE, "two/b")] == [1, 2]


def test_a_copy_that_ends_without_an_image_is_no_success(client: SidecarClient, scripted: Scripted) -> None:
    scripted.behaviors["CopyImage"] = lambda request, context: iter([image_service_pb2.CopyImageResponse()])
    with pytest.raises(errors.InternalError, match="without saying"):
        client.copy(ONE, "two/b").wait()


def test_cancelling_a_copy_reaches_the_sidecar(client: SidecarClient, scripted: Scripted) -> None:
    scripted.behaviors["CopyImage"] = copying(scripted.ended)
    copy = client.copy(ONE, "two/b")
    threading.Timer(0.2, copy.cancel).start()
    with pytest.raises(errors.OperationCancelled):
        copy.wait()
    assert scripted.ended.wait(5)


def test_a_copy_whose_watcher_fails_is_cancelled(client: SidecarClient, scripted: Scripted) -> None:
    """Ctrl-C is such a failure: it is raised wherever the program is."""
    scripted.behaviors["CopyImage"] = copying(scripted.ended)

    def progress(answer: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.copy(ONE, "two/b").wait(progress)
    assert scripted.ended.wait(5)


def test_an_error_in_the_middle_of_a_copy_keeps_its_class(client: SidecarClient, scripted: Scripted) -> None:
    def behave(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield image_service_pb2.CopyImageResponse(done_bytes=1, total_bytes=2)
        context.abort_with_status(to_status(errors.NoSpace("two is full")))

    scripted.behaviors["CopyImage"] = behave
    with pytest.raises(errors.NoSpace, match="two is full"):
        client.copy(ONE, "two/b").wait()
    assert len(scripted.requests) == 1


def test_a_cancelled_watch_ends_without_an_error(client: SidecarClient, scripted: Scripted) -> None:
    def behave(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield image_service_pb2.WatchImagesResponse(resume_token="1")
        scripted.ended.wait(20)

    scripted.behaviors["WatchImages"] = behave
    watch = client.watch("one", resume_token="0")
    threading.Timer(0.2, watch.cancel).start()
    assert [answer.resume_token for answer in watch] == ["1"]
    assert scripted.requests[0].resume_token == "0"
    assert scripted.ended.wait(5)


def test_a_watch_whose_sidecar_is_gone_says_so(address: str) -> None:
    scripted = Scripted()

    def behave(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield image_service_pb2.WatchImagesResponse(resume_token="1")
        scripted.ended.wait(20)

    scripted.behaviors["WatchImages"] = behave
    with SidecarClient(address) as client:
        with serving(address, scripted):
            watch = client.watch()
            assert next(watch).resume_token == "1"
        with pytest.raises((errors.SidecarUnavailable, errors.OperationCancelled)):
            next(watch)


# --- staging ---


class StagingArea:
    """What a staging directory was told."""

    def __init__(self, scripted: Scripted) -> None:
        self.aborted: list[str] = []
        self.written: queue.SimpleQueue[list[staging_service_pb2.WriteFileRequest]] = queue.SimpleQueue()
        self.next_id = "s1"
        scripted.behaviors |= {
            "CreateStaging": lambda request, context: staging_service_pb2.CreateStagingResponse(
                staging_id=self.next_id, directory="tmp", lease_seconds=60
            ),
            "WriteFile": self.write,
            "AbortStaging": self.abort,
            "CommitStaging": lambda request, context: staging_service_pb2.CommitStagingResponse(image=Image(ref=ONE)),
        }

    def write(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        taken = list(requests)
        self.written.put(taken)
        return staging_service_pb2.WriteFileResponse(written_bytes=sum(len(request.data) for request in taken))

    def abort(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.aborted.append(request.staging_id)
        return staging_service_pb2.AbortStagingResponse()


@pytest.fixture
def area(scripted: Scripted) -> StagingArea:
    return StagingArea(scripted)


def test_a_staging_directory_that_is_left_is_aborted(client: SidecarClient, area: StagingArea) -> None:
    with pytest.raises(ZeroDivisionError), client.create_staging("one/a") as staging:
        assert (staging.id, staging.directory, staging.lease_seconds, staging.ref) == ("s1", "tmp", 60, ONE)
        raise ZeroDivisionError
    assert area.aborted == ["s1"]


@pytest.mark.parametrize("moment", ["before it is asked, or a little later", "when it is asked"])
def test_ctrl_c_before_the_answer_leaves_no_staging_directory(
    moment: str, client: SidecarClient, area: StagingArea, scripted: Scripted
) -> None:
    made = scripted.behaviors["CreateStaging"]
    interrupted = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        if moment == "when it is asked":
            signal.pthread_kill(main, signal.SIGUSR1)
        assert interrupted.wait(20)
        return made(request, context)

    def interrupt(number: int, frame: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    scripted.behaviors["CreateStaging"] = slow
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            if moment != "when it is asked":
                threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGUSR1)).start()
            client.create_staging(ONE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    # Early enough, and the sidecar was not asked at all.
    assert area.aborted == ["s1"] * sum(
        isinstance(request, staging_service_pb2.CreateStagingRequest) for request in scripted.requests
    )


# --- cancelling everything ---


@pytest.fixture
def asked(scripted: Scripted) -> Iterator[threading.Event]:
    """Set when an image is asked for; the answer does not come before the end of the test."""
    asked, over = threading.Event(), threading.Event()

    def behave(request: Any, context: grpc.ServicerContext) -> None:
        asked.set()
        over.wait(20)

    scripted.behaviors["GetImage"] = behave
    yield asked
    over.set()


def test_a_call_that_waits_is_cancelled_from_another_thread(client: SidecarClient, asked: threading.Event) -> None:
    def cancel() -> None:
        assert asked.wait(10)
        client.cancel_calls()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(errors.OperationCancelled):
        client.image(ONE)
    thread.join()


def test_a_stream_that_waits_is_cancelled_from_another_thread(client: SidecarClient, scripted: Scripted) -> None:
    scripted.behaviors["CopyImage"] = copying(scripted.ended)
    with pytest.raises(errors.OperationCancelled):
        client.copy(ONE, "two/b").wait(lambda answer: client.cancel_calls())
    assert scripted.ended.wait(5)


def test_no_call_begins_after_all_were_cancelled(client: SidecarClient, area: StagingArea, scripted: Scripted) -> None:
    scripted.behaviors["GetImage"] = raising(None, answer=image_service_pb2.GetImageResponse())
    client.image(ONE)
    asked = len(scripted.requests)
    client.cancel_calls()
    for call in (
        lambda: client.image(ONE),
        lambda: client.copy(ONE, "two/b"),
        client.watch,
        lambda: client.create_staging(ONE),
        lambda: client.wait_ready(5),
    ):
        with pytest.raises(errors.OperationCancelled):
            call()
    assert len(scripted.requests) == asked


def test_what_was_begun_is_aborted_also_when_all_is_cancelled(
    client: SidecarClient, area: StagingArea, scripted: Scripted
) -> None:
    def parts() -> Iterator[tuple[int, bytes]]:
        client.cancel_calls()
        yield 0, b"data"

    with pytest.raises(errors.OperationCancelled), client.create_staging(ONE) as staging:
        staging.write_file("disk.vmdk", parts())
    assert area.aborted == ["s1"]


def test_a_staging_directory_that_is_being_made_when_all_is_cancelled_is_aborted(
    client: SidecarClient, area: StagingArea, scripted: Scripted
) -> None:
    made = scripted.behaviors["CreateStaging"]

    def behave(request: Any, context: grpc.ServicerContext) -> Any:
        client.cancel_calls()
        return made(request, context)

    scripted.behaviors["CreateStaging"] = behave
    with pytest.raises(errors.OperationCancelled), client.create_staging(ONE) as staging:
        staging.write_file("disk.vmdk", ())  # the answer may be as fast as the cancelling
    assert area.aborted == ["s1"]


class Begun:
    """A call, as far as it can be cancelled."""

    ended = False

    def cancel(self) -> None:
        self.ended = True


def test_a_signal_handler_may_cancel_whatever_it_interrupts(address: str) -> None:
    caller = client_calls.Caller(address, 10)

    def make() -> Begun:
        signal.raise_signal(signal.SIGUSR1)
        return Begun()

    before = signal.signal(signal.SIGUSR1, lambda number, frame: caller.cancel_calls())
    # A deadlock of the main thread is ended by nothing else.
    faulthandler.dump_traceback_later(20, exit=True)
    try:
        assert caller.begin(make).ended
    finally:
        caller.close()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGUSR1, before)


def test_what_takes_back_pauses_between_its_tries_also_when_all_is_cancelled(
    client: SidecarClient, area: StagingArea, scripted: Scripted
) -> None:
    tries: list[float] = []
    refuse = raising(errors.DatastoreUnavailable("busy"))

    def behave(request: Any, context: grpc.ServicerContext) -> Any:
        tries.append(time.monotonic())
        return refuse(request, context)

    scripted.behaviors["AbortStaging"] = behave
    staging = client.create_staging(ONE)
    client.cancel_calls()
    with pytest.raises(errors.DatastoreUnavailable):
        staging.abort()
    assert len(tries) == 3
    assert min(later - earlier for earlier, later in itertools.pairwise(tries)) > 0.15


@pytest.mark.parametrize(
    "call",
    [
        "client.image('one/a')",
        "client.copy('one/a', 'one/b')",
        "client.watch()",
        "client.wait_ready(1)",
        "client.create_staging('one/x')",
        "next(client.read_file('one/x', 'f'))",
        "staging.renew()",
        "staging.write_file('f', ())",
        "staging.abort()",
    ],
)
def test_a_closed_client_says_so_and_does_not_take_the_process_down(call: str, address: str, area: StagingArea) -> None:
    # In a process of its own: gRPC may end it with SIGSEGV.
    script = (
        "from sidecar.client import SidecarClient, errors\n"
        f"client = SidecarClient({address!r})\n"
        "staging = client.create_staging('one/a')\n"
        "client.close()\n"
        f"try: {call}\n"
        "except errors.ImagesError as error: print(error)\n"
    )
    said = f"the client of the sidecar at {address} is closed: make a new one\n"
    result = run(sys.executable, "-c", script, check=False)
    assert (result.returncode, result.stdout) == (0, said), result.stderr


def test_a_sidecar_that_takes_nothing_more_is_given_up(
    client: SidecarClient, area: StagingArea, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_calls, "STALL_SECONDS", 0.1)
    over = threading.Event()
    scripted.behaviors["WriteFile"] = lambda requests, context: over.wait(20) and None
    data = bytes(1 << 20)
    try:
        with pytest.raises(errors.DeadlineExceeded, match="took nothing"), client.create_staging(ONE) as staging:
            staging.write_file("disk.vmdk", ((number << 20, data) for number in range(64)))
    finally:
        over.set()
    assert area.aborted == ["s1"]


def test_a_source_that_takes_its_time_is_waited_for(
    client: SidecarClient, area: StagingArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_calls, "STALL_SECONDS", 0.05)

    def parts() -> Iterator[tuple[int, bytes]]:
        time.sleep(0.3)  # longer than the sidecar may take
        yield 0, b"data"

    with client.create_staging(ONE) as staging:
        assert staging.write_file("disk.vmdk", parts()).written_bytes == 4


def test_a_staging_directory_that_cannot_be_made_is_not_aborted(
    client: SidecarClient, area: StagingArea, scripted: Scripted
) -> None:
    scripted.behaviors["CreateStaging"] = raising(errors.ImageAlreadyExists("it is there"))
    with pytest.raises(errors.ImageAlreadyExists):
        client.create_staging(ONE)
    assert area.aborted == []


def test_a_staging_directory_that_was_published_is_not_aborted(client: SidecarClient, area: StagingArea) -> None:
    with client.create_staging(ONE) as staging:
        assert staging.commit().image.ref == ONE
    assert area.aborted == []


def test_a_staging_directory_that_could_not_be_published_is_aborted(
    client: SidecarClient, area: StagingArea, scripted: Scripted
) -> None:
    scripted.behaviors["CommitStaging"] = raising(errors.ImageAlreadyExists("somebody was faster"))
    with pytest.raises(errors.ImageAlreadyExists), client.create_staging(ONE) as staging:
        staging.commit()
    assert area.aborted == ["s1"]


def test_what_cannot_be_aborted_does_not_hide_what_went_wrong(
    client: SidecarClient, area: StagingArea, scripted: Scripted
) -> None:
    scripted.behaviors["AbortStaging"] = raising(errors.DatastoreUnavailable("I/O error"))
    with pytest.raises(ZeroDivisionError), client.create_staging(ONE):
        raise ZeroDivisionError


def test_data_is_cut_to_what_a_message_carries(client: SidecarClient, area: StagingArea) -> None:
    data = os.urandom((2 << 20) + 5)
    with client.create_staging(ONE) as staging:
        answer = staging.write_file("d", [(0, b"head"), Hole(4, 96), Hole(100, 0), (100, data), (7, b"")], size=9 << 20)
    assert answer.written_bytes == len(data) + 4
    first, *rest = area.written.get_nowait()
    assert (first.staging_id, first.name, first.size_bytes) == ("s1", "d", 9 << 20)
    assert [(r.offset, len(r.data), r.hole_bytes) for r in rest] == [
        (0, 4, 0),
        (4, 0, 96),
        (100, 1 << 20, 0),
        (100 + (1 << 20), 1 << 20, 0),
        (100 + (2 << 20), 5, 0),
    ]
    assert b"".join(r.data for r in rest[2:]) == data


def test_a_file_without_parts_is_made_too(client: SidecarClient, area: StagingArea) -> None:
    with client.create_staging(ONE) as staging:
        staging.write_file("empty", ())
    (only,) = area.written.get_nowait()
    assert only.name == "empty"
    assert not only.HasField("size_bytes")


@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_source_that_fails_is_raised_here(
    before: int, client: SidecarClient, area: StagingArea, caplog: pytest.LogCaptureFixture
) -> None:
    def parts() -> Iterator[tuple[int, bytes]]:
        for number in range(before):
            yield number, b"x"
        raise ZeroDivisionError

    with client.create_staging(ONE) as staging, pytest.raises(ZeroDivisionError):
        staging.write_file("d", parts())
    # gRPC would have logged a traceback of its own.
    assert all(record.name.startswith("grpc._server") for record in caplog.records)


def test_a_full_datastore_ends_the_writing(client: SidecarClient, area: StagingArea, scripted: Scripted) -> None:
    def behave(requests: Iterator[Any], context: grpc.ServicerContext) -> None:
        next(requests)
        context.abort_with_status(to_status(errors.NoSpace("one is full")))

    scripted.behaviors["WriteFile"] = behave
    endless = ((offset, bytes(1 << 20)) for offset in itertools.count(0, 1 << 20))
    with client.create_staging(ONE) as staging, pytest.raises(errors.NoSpace, match="one is full"):
        staging.write_file("d", endless)


def test_renewing_is_the_same_request_again(client: SidecarClient, area: StagingArea, scripted: Scripted) -> None:
    with client.create_staging(ONE, expected_bytes=5) as staging:
        staging.renew()
    assert scripted.requests[0] == scripted.requests[1]
    assert scripted.requests[0].request_id


def test_renewing_what_the_sidecar_forgot_makes_nothing(client: SidecarClient, area: StagingArea) -> None:
    with client.create_staging(ONE) as staging:
        area.next_id = "s2"
        with pytest.raises(errors.StagingNotFound, match="start again"):
            staging.renew()
    assert area.aborted == ["s2", "s1"]


def test_cloning_names_the_source_and_the_staged_file(
    client: SidecarClient, area: StagingArea, scripted: Scripted
) -> None:
    scripted.behaviors["CloneRange"] = raising(None, answer=staging_service_pb2.CloneRangeResponse(done_bytes=7))
    scripted.behaviors["CloneDisk"] = lambda request, context: iter(
        [staging_service_pb2.CloneDiskResponse(done_bytes=number) for number in (1, 2)]
    )
    with client.create_staging("two/b") as staging:
        assert staging.clone_range(ONE, "a.vmdk", 1, "b.vmdk", 2, 7).done_bytes == 7
        assert [answer.done_bytes for answer in staging.clone_disk("one/a")] == [1, 2]
        staging.commit(copied_from=ONE)
    _, ranged, whole, commit = scripted.requests
    assert (ranged.source, ranged.source_name, ranged.source_offset) == (ONE, "a.vmdk", 1)
    assert (ranged.staging_id, ranged.name, ranged.offset, ranged.length) == ("s1", "b.vmdk", 2, 7)
    assert (whole.source, whole.staging_id) == (ONE, "s1")
    assert commit.copied_from == ONE
    assert commit.request_id


def test_a_reader_that_has_enough_ends_the_call(client: SidecarClient, area: StagingArea, scripted: Scripted) -> None:
    def behave(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for offset in itertools.count(0, 1 << 20):
            if not context.is_active():
                return
            yield staging_service_pb2.ReadFileResponse(offset=offset, data=bytes(1 << 20))

    scripted.behaviors["ReadFile"] = behave
    with contextlib.closing(client.read_file("one/a", "a.vmdk", 5, 6)) as answers:  # type: ignore[type-var]
        assert next(answers).offset == 0
        scripted.ended.clear()
    assert scripted.ended.wait(5)
    assert (scripted.requests[0].ref, scripted.requests[0].offset, scripted.requests[0].length) == (ONE, 5, 6)
    with client.create_staging(ONE) as staging:
        next(client.read_file(staging, "d"))
    assert scripted.requests[2].staging_id == "s1"


def test_a_client_serves_many_threads(client: SidecarClient, scripted: Scripted) -> None:
    scripted.behaviors["GetDatastore"] = lambda request, context: datastore_service_pb2.GetDatastoreResponse(
        datastore=Datastore(name=request.name)
    )
    names = [str(number) for number in range(200)]
    with futures.ThreadPoolExecutor(8) as pool:
        assert [datastore.name for datastore in pool.map(client.datastore, names)] == names
