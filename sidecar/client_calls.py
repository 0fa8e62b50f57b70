"""How the client calls: the channel, deadlines, retries, and errors that come back as this project's own classes."""

import contextlib
import os
import queue
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import grpc
import tenacity
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos.images.v1.datastore_service_pb2_grpc import DatastoreServiceStub
from protos.images.v1.image_service_pb2_grpc import ImageServiceStub
from protos.images.v1.maintenance_service_pb2_grpc import MaintenanceServiceStub
from protos.images.v1.staging_service_pb2_grpc import StagingServiceStub
from sidecar import errors

# The domain of every ErrorInfo that a sidecar sends.
ERROR_DOMAIN = "images.v1"
MAX_MESSAGE_BYTES = 8 << 20
# sun_path of Linux holds 108 bytes, the terminating zero among them.
MAX_SOCKET_PATH_BYTES = 107
ATTEMPTS = 3
# How long an answer that is not wanted any more is waited for.
UNDO_SECONDS = 5.0
# A sidecar that takes nothing of what is sent for so long hangs, or its datastore does.
STALL_SECONDS = 120.0

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Result = TypeVar("Result")
Answer_co = TypeVar("Answer_co", covariant=True)


def new_request_id() -> str:
    """A name for one change: the same over its retries, so that it happens once."""
    return uuid.uuid4().hex


def default_address() -> str:
    """Where this user's sidecar listens: IMAGE_SIDECAR, else the socket that root's or the user's sidecar makes."""
    if given := os.environ.get("IMAGE_SIDECAR"):
        return given
    if os.geteuid() == 0:
        return "unix:/run/image-sidecar.sock"
    directory = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return f"unix:{directory}/image-sidecar.sock"


def normal_address(address: str) -> str:
    """The address as gRPC takes it: a path means a unix socket, and is absolute (a daemon changes its directory).

    Raises InvalidRequest for what is neither, and for a socket path that is too long for the kernel.
    """
    if address.startswith(("/", "./", "../")):
        address = f"unix:{address}"
    if not address.startswith("unix:"):
        host, _, port = address.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise errors.InvalidRequest(f"{address!a} is no address of a sidecar: write unix:PATH or HOST:PORT")
        return address
    given = address.removeprefix("unix://").removeprefix("unix:")
    if not given:
        raise errors.InvalidRequest(f"{address!a} names no socket: write unix:PATH or HOST:PORT")
    path = os.path.abspath(given)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise errors.InvalidRequest(
            f"the socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes, the most that Linux allows: "
            "choose a shorter one"
        )
    return f"unix:{path}"


def _channel(address: str) -> grpc.Channel:
    return grpc.insecure_channel(
        address,
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            # Streams have no deadline: this is what notices a sidecar that is gone without a word, or hangs.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            # A restarted sidecar is found again within a second.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # How long who takes the connection may be silent: it is another program, or hangs.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            # A sidecar is a neighbour: proxies of the environment are never on the way to it.
            ("grpc.enable_http_proxy", 0),
            # Two channels of one process are two connections: closing one closes one.
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )


class Cancellable(Protocol):
    """Any gRPC call that runs."""

    def cancel(self) -> object: ...


Begun = TypeVar("Begun", bound=Cancellable)


class CallFuture(Cancellable, Protocol[Answer_co]):
    """What of a gRPC call that has one answer is used here."""

    def result(self, timeout: float | None = None) -> Answer_co: ...


class Call(Cancellable, Protocol[Answer_co]):
    """What of a gRPC call that streams answers is used here."""

    def __next__(self) -> Answer_co: ...


class Caller:
    """A connection to one sidecar, and the manner of every call on it. Safe to share between threads."""

    def __init__(self, address: str, timeout: float) -> None:
        self.address = normal_address(address)
        self.timeout = timeout
        # Guards what follows: no call begins unseen by cancel_calls. That may be called by a signal's handler, also one
        # that interrupts `begin` in this thread.
        self._lock = threading.RLock()
        self._running: weakref.WeakSet[Cancellable] = weakref.WeakSet()
        self._cancelled = False
        self._closed = False
        self._channel = _channel(self.address)
        # Made once, while the channel is open: gRPC crashes the process when it makes one on a closed channel.
        self.images = ImageServiceStub(self._channel)
        self.staging = StagingServiceStub(self._channel)
        self.datastores = DatastoreServiceStub(self._channel)
        self.maintenance = MaintenanceServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def close(self) -> None:
        """Ends every call that runs, and lets none begin."""
        with self._lock:
            self._closed = True
        self._channel.close()

    @property
    def cancelled(self) -> bool:
        """True once `cancel_calls` was called."""
        return self._cancelled

    def cancel_calls(self) -> None:
        """Ends every call that runs, and lets none begin, but for those that take back what others made."""
        with self._lock:
            self._cancelled = True
            running = list(self._running)
        for call in running:
            call.cancel()

    def begin(self, make: Callable[[], Begun], *, takes_back: bool = False, makes: bool = False) -> Begun:
        """The call that `make` starts, cancelled by `cancel_calls`.

        One that `takes_back` what another made, or whose answer names what it `makes`, runs on to its end; the former
        may even begin after that. Raises OperationCancelled when no call may begin.
        """
        with self._lock:
            if self._closed:
                raise errors.OperationCancelled(
                    f"the client of the sidecar at {self.address} is closed: make a new one"
                )
            if self._cancelled and not takes_back:
                raise self._was_cancelled()
            call = make()
            if not (takes_back or makes):
                self._running.add(call)
                if self._cancelled:  # by a signal's handler, while `make` ran
                    call.cancel()
            return call

    def unary(
        self,
        method: "grpc.UnaryUnaryMultiCallable[Request, Answer]",
        request: Request,
        *,
        timeout: float | None = None,
        undo: Callable[[Answer], object] | None = None,
        takes_back: bool = False,
    ) -> Answer:
        """One answer to one request, within `timeout` seconds (the client's, when None) for all attempts together.

        Only what the status UNAVAILABLE says is tried again: the request's request_id makes that one change. `undo`:
        for a call whose answer names what it made. When `cancel_calls`, or a signal whose handler raises, comes before
        the answer, the answer is waited for and undone. `takes_back`: as for `begin`.
        """
        deadline = _Deadline(self.timeout if timeout is None else timeout)
        lost: list[errors.ImagesError] = []

        def attempt() -> Answer:
            call = self.begin(
                lambda: method.future(request, timeout=deadline.remaining()),
                takes_back=takes_back,
                makes=undo is not None,
            )
            try:
                return self.result(call)
            except errors.SidecarUnavailable as error:
                lost.append(error)
                raise
            finally:
                call.cancel()

        def ask() -> Answer:
            try:
                return retrying(attempt)
            except (errors.TooManyCalls, errors.DatastoreUnavailable) as refusal:
                # Of this attempt, which was not begun. One before it may have been, and may still do its work.
                if lost:
                    raise lost[0] from refusal
                raise

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_unavailable),
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(deadline.seconds),
            wait=tenacity.wait_exponential(multiplier=0.2, max=2.0, exp_base=2.5) + tenacity.wait_random(0, 0.1),
            # What takes back goes on when all is cancelled, and leaves the sidecar the same time between two tries.
            sleep=time.sleep if takes_back else self.pause,
            reraise=True,
        )
        return ask() if undo is None else self._undone_when_interrupted(ask, undo)

    def result(self, call: CallFuture[Answer], timeout: float | None = None) -> Answer:
        """The answer of a call, which has ended afterwards; TimeoutError when it has not within `timeout` seconds."""
        try:
            return call.result(timeout)
        except grpc.FutureTimeoutError:
            raise TimeoutError from None
        except grpc.FutureCancelledError:
            raise self._was_cancelled() from None
        except grpc.RpcError as failure:
            raise self.translated(failure) from None

    def start(self, method: "grpc.UnaryStreamMultiCallable[Request, Answer]", request: Request) -> Call[Answer]:
        """A call that streams its answers; no deadline, no retries."""
        return self.begin(lambda: cast(Call[Answer], method(request)))

    def wait_ready(self, timeout: float) -> None:
        """Returns when the sidecar serves; raises SidecarUnavailable when it does not within `timeout` seconds."""
        deadline = _Deadline(timeout)

        def check() -> Any:
            left = max(deadline.remaining(), 0.05)
            return self._health.Check.future(health_pb2.HealthCheckRequest(), timeout=left, wait_for_ready=True)

        while True:
            try:
                call: CallFuture[Any] = self.begin(check)
                answer = call.result()
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.FutureCancelledError:
                raise self._was_cancelled() from None
            except grpc.RpcError as failure:
                if failure.code() is grpc.StatusCode.UNIMPLEMENTED:
                    return  # It answers, and has no health service to ask.
                if failure.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise self.translated(failure) from None
            if deadline.remaining() <= 0:
                raise errors.SidecarUnavailable(
                    f"the sidecar at {self.address} is not ready after {timeout:g} s: {self._what_to_do('')}"
                )
            self.pause(0.05)

    def translated(self, failure: grpc.RpcError) -> errors.ImagesError:
        """The error of this project that a failed call means."""
        code, details = failure.code(), failure.details() or ""
        if (by_reason := _from_error_info(failure, details)) is not None:
            return by_reason
        match code:
            case grpc.StatusCode.UNAVAILABLE:
                return errors.SidecarUnavailable(
                    f"no sidecar answers at {self.address} ({_cause(details)}): {self._what_to_do(details)}"
                )
            case grpc.StatusCode.CANCELLED:
                return self._was_cancelled()
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return errors.DeadlineExceeded(
                    f"the sidecar at {self.address} did not answer in time: look at its log and at its datastores, "
                    "or allow the call more time"
                )
            case grpc.StatusCode.UNIMPLEMENTED:
                return errors.CallUnknown(
                    f"the sidecar at {self.address} does not know this call ({details}): "
                    "it and this client are of different versions, install the same of both"
                )
            case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" not in details:
                return errors.TooManyCalls(f"the sidecar at {self.address} has no room for this call now: {details}")
            case grpc.StatusCode.INVALID_ARGUMENT:
                return errors.InvalidRequest(details)
            case _:
                return errors.InternalError(f"the sidecar at {self.address} answered {code.name}: {details}")

    def pause(self, seconds: float) -> None:
        """Not longer than until `cancel_calls`."""
        self.begin(_Waiting).wait(seconds)

    def _was_cancelled(self) -> errors.OperationCancelled:
        return errors.OperationCancelled(f"the call to the sidecar at {self.address} was cancelled")

    def _undone_when_interrupted(self, work: Callable[[], Answer], undo: Callable[[Answer], object]) -> Answer:
        # In a thread of its own, where no signal handler raises: whatever moment it is, the answer is not lost.
        answer: futures.Future[Answer] = futures.Future()
        waiting = self.begin(_Waiting)

        def run() -> None:
            try:
                answer.set_result(work())
            except BaseException as failure:
                answer.set_exception(failure)
            finally:
                waiting.cancel()

        try:
            threading.Thread(target=run, daemon=True).start()
            waiting.wait()
            if not answer.done():
                raise self._was_cancelled()
            return answer.result()
        except BaseException as failure:
            if not (answer.done() and failure is answer.exception()):
                # No answer within that time: the sidecar's own limits take care of what it made.
                with contextlib.suppress(errors.ImagesError, TimeoutError):
                    undo(answer.result(timeout=UNDO_SECONDS))
            raise

    def _what_to_do(self, details: str) -> str:
        """The next step of someone whose sidecar does not answer."""
        if self.address.startswith("unix:"):
            path = self.address.removeprefix("unix:")
            if "Permission denied" in details:
                return f"run as root, or as a member of the group of {path}"
            if not os.path.exists(path):
                return "start it with image-sidecar serve, or name another with IMAGE_SIDECAR or --sidecar"
        return "see that image-sidecar is running there, or name another with IMAGE_SIDECAR or --sidecar"


class _Waiting:
    """Somebody who waits, until `cancel`. That may come from a signal's handler, which an Event would lock up."""

    def __init__(self) -> None:
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()

    def cancel(self) -> None:
        self._ends.put(None)

    def wait(self, seconds: float | None = None) -> None:
        with contextlib.suppress(queue.Empty):
            self._ends.get(timeout=seconds)


class AnswerStream(Generic[Answer]):
    """The answers of one streaming call, and a way to end it. Iterated once; cancelled from any thread."""

    def __init__(self, caller: Caller, call: Call[Answer]) -> None:
        self._caller = caller
        self._call = call
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """True once `cancel` was called here."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ends the call; does nothing when it has ended."""
        self._cancelled.set()
        self._call.cancel()

    def __iter__(self) -> Iterator[Answer]:
        return self

    def __next__(self) -> Answer:
        try:
            return next(self._call)
        except grpc.RpcError as failure:
            raise self._caller.translated(failure) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class Outgoing(Generic[Answer]):
    """Requests on their way to a call that takes a stream of them.

    gRPC takes them from a thread of its own, and turns an exception there into a status without a cause and a
    traceback in the log: it is kept here instead, the call is cancelled, and whoever made the call raises it.
    """

    def __init__(self, items: Iterator[Answer]) -> None:
        self._items = items
        self._end: Callable[[], object] = lambda: None
        self._bound = threading.Event()  # set when _end is what it will be
        self._steps = 0  # odd while an item is being made, even while it is being sent
        self.failure: BaseException | None = None

    def bind(self, end: Callable[[], object]) -> None:
        """Names what ends the call when the requests fail; whoever makes the call does this right after."""
        self._end = end
        self._bound.set()

    def __iter__(self) -> Iterator[Answer]:
        return self

    def result(self, caller: Caller, call: CallFuture[Result]) -> Result:
        """The answer of the call that they go to; DeadlineExceeded when it takes nothing for STALL_SECONDS.

        That is not bounded which these items need to be made, nor all of it together.
        """
        while True:
            before = self._steps
            try:
                return caller.result(call, STALL_SECONDS)
            except TimeoutError:
                if self._steps == before and before % 2 == 0:
                    raise errors.DeadlineExceeded(
                        f"the sidecar at {caller.address} took nothing for {STALL_SECONDS:g} s: look at its log and at "
                        "its datastores"
                    ) from None

    def __next__(self) -> Answer:
        self._steps += 1
        try:
            return next(self._items)
        except StopIteration:
            raise
        except BaseException as failure:
            self.failure = failure  # for the thread that made the call
            # Cancelled before the requests end: an end alone would tell the sidecar that these were all.
            self._bound.wait()
            self._end()
            raise StopIteration from None
        finally:
            self._steps += 1


def is_unavailable(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment."""
    return isinstance(error, errors.ImagesError) and error.code == "UNAVAILABLE"


def _from_error_info(failure: grpc.RpcError, details: str) -> errors.ImagesError | None:
    with contextlib.suppress(ValueError):  # a status that contradicts its own details says nothing
        status = rpc_status.from_call(cast(grpc.Call, failure))
        for detail in status.details if status is not None else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                known = errors.error_classes().get(info.reason)
                # A reason of a newer sidecar: its code still says what kind of fault it is.
                return known(details) if known is not None else None
    return None


# What gRPC says when no call was made, and what it means.
_CAUSES = (
    ("lookup", "there is no host of that name"),
    ("before receiving SETTINGS", "something takes the connection and does not answer"),
    ("Failed parsing HTTP/2", "what answers there is another program: it does not speak gRPC"),
)


def _cause(details: str) -> str:
    """Why there is no answer: what the kernel said, out of all that gRPC wraps around it."""
    for said, meant in _CAUSES:
        if said in details:
            return meant
    return details.rpartition(": ")[2] or "no answer"


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        return max(self._end - time.monotonic(), 0.0)
