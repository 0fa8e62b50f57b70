"""What every call passes through: admission, errors into statuses, a log line, and the count of what still runs."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc

from sidecar.errors import (
    DatastoreUnavailable,
    DiskFileFault,
    ImagesError,
    InternalError,
    OperationCancelled,
    SidecarUnavailable,
    StagingLost,
)
from sidecar.images.admission import Slots
from sidecar.services.errors import to_status

# Generic for the type checker only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

logger = logging.getLogger(__name__)

PACKAGE = "/images.v1."
# Calls that only look, or hold what others read. WriteFile and CloneRange change something, but are steps of an import
# or a copy: there are thousands of them, and CommitStaging says what came of it.
QUIET_PREFIXES = ("List", "Get", "Watch", "Read")
QUIET_METHODS = ("WriteFile", "CloneRange", "OpenHolder", "HoldFile", "ReleaseFile")


class Activity:
    """How many calls still run: threads in handlers, and answers that have not reached the transport."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # Guarded by _changed.
        self._count = 0
        self._hurried = False

    def begin(self) -> None:
        with self._changed:
            self._count += 1

    def end(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def hurry(self) -> None:
        """Ends a wait_idle that runs, and those to come."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def wait_idle(self, timeout: float, *, hurried: bool = True) -> bool:
        """Waits at most `timeout` seconds until nothing runs. False: something still does.

        With `hurried` False, hurry does not end the wait.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0 or (hurried and self._hurried), max(timeout, 0))
            return self._count == 0


class CallInterceptor(grpc.ServerInterceptor):
    """Wraps every handler of the images services, and those of others that have slots.

    Handlers raise ImagesError and never call context.abort. Others, such as health, pass as they are: their handlers
    use marks on the function that a wrapper would hide.
    """

    def __init__(
        self,
        slots: Mapping[str, Slots],
        activity: Activity,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`slots` by full method, such as `/images.v1.ImageService/CopyImage`."""
        self._slots = slots
        self._activity = activity
        self._clock = clock
        # One wrapper a method, made when it is called first; methods that nobody serves are not remembered.
        self._wrapped: dict[str, Handler] = {}
        self._refusing = threading.Event()
        self._lock = threading.Lock()
        # Running calls of services that are not ours; guarded by _lock.
        self._foreign: set[grpc.ServicerContext] = set()

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Handler | None]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None:
            return known
        handler = continuation(handler_call_details)
        if handler is None or not (method.startswith(PACKAGE) or method in self._slots):
            return handler
        return self._wrapped.setdefault(method, self._wrap(method, handler))

    def refuse(self) -> None:
        """From now on, calls are told that the sidecar ends."""
        self._refusing.set()

    def cancel_foreign(self) -> None:
        """Ends the calls of other services (reflection): they have no result, and may be held open for ever."""
        with self._lock:
            running = list(self._foreign)
        for context in running:
            context.cancel()

    def _wrap(self, method: str, handler: "Handler") -> "Handler":
        slots = self._slots.get(method)

        def admitted() -> contextlib.AbstractContextManager[None]:
            if self._refusing.is_set():
                raise SidecarUnavailable("the sidecar is shutting down: call again when it is back")
            return contextlib.nullcontext() if slots is None else slots.take()

        def single(behavior: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
            def call(request: Any, context: grpc.ServicerContext) -> Any:
                with self._tracked(method, context), _Call(method, request, context, self._clock, False), admitted():
                    return behavior(request, context)

            return call

        def streamed(
            behavior: Callable[[Any, grpc.ServicerContext], Iterator[Any]],
        ) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
            # A generator, so that the slot is taken when the stream starts and given back when the generator ends or
            # is dropped: a callback of the context would give it back while the thread is still in the handler.
            def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                with self._tracked(method, context), _Call(method, request, context, self._clock, True), admitted():
                    yield from behavior(request, context)

            return call

        serialization = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(single(handler.unary_unary), *serialization)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(streamed(handler.unary_stream), *serialization)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(single(handler.stream_unary), *serialization)
        assert handler.stream_stream is not None
        return grpc.stream_stream_rpc_method_handler(streamed(handler.stream_stream), *serialization)

    @contextlib.contextmanager
    def _tracked(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        if method.startswith(PACKAGE):
            # The thread is counted by the pool; this is the answer, which is sent after the handler returned.
            # Cancelling between the two would tell the caller that a change which was made was not.
            self._activity.begin()
            if not context.add_callback(self._activity.end):
                self._activity.end()
            yield
            return
        with self._lock:
            self._foreign.add(context)
        try:
            yield
        finally:
            with self._lock:
                self._foreign.discard(context)


class _Call:
    """One call: its errors become statuses, its outcome a log line."""

    def __init__(
        self,
        method: str,
        request: object,
        context: grpc.ServicerContext,
        clock: Callable[[], float],
        streamed: bool,
    ) -> None:
        self._method = method
        self._subject = subject(request)
        self._context = context
        self._clock = clock
        self._streamed = streamed
        self._started = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        gone = not self._context.is_active()
        if error is None:
            # A stream that sees that its caller is gone just ends; a single call has done what it was asked.
            self._log(self._level(), "CANCELLED" if gone and self._streamed else "OK")
            return
        if isinstance(error, GeneratorExit) or (gone and isinstance(error, grpc.RpcError | OperationCancelled)):
            # The caller cancelled, went away or ran out of time: there is nobody to answer.
            self._log(self._level(), "CANCELLED")
            if isinstance(error, ImagesError):
                # gRPC takes what just passes for a defect, and logs its traceback.
                self._context.abort_with_status(to_status(error))
            return
        if isinstance(error, ImagesError) and not isinstance(error, InternalError):
            # What the caller did wrong is the caller's; what the storage did is the operator's.
            serious = isinstance(error, DatastoreUnavailable | DiskFileFault | StagingLost)
            self._log(logging.WARNING if serious else self._level(), error.reason, error.message)
            self._context.abort_with_status(to_status(error))
        logger.error("call failed method=%s%s", self._method, self._subject, exc_info=error)
        self._context.abort_with_status(
            to_status(InternalError(f"{self._method}: a defect of the sidecar; its log has the details"))
        )

    def _level(self) -> int:
        name = self._method.rpartition("/")[2]
        quiet = not self._method.startswith(PACKAGE) or name.startswith(QUIET_PREFIXES) or name in QUIET_METHODS
        return logging.DEBUG if quiet else logging.INFO

    def _log(self, level: int, outcome: str, message: str | None = None) -> None:
        logger.log(
            level,
            "call done method=%s%s seconds=%.3f outcome=%s%s",
            self._method.rpartition("/")[2],
            self._subject,
            self._clock() - self._started,
            outcome,
            "" if message is None else f" message={message!r}",
        )


def subject(request: object) -> str:
    """What the request is about, as ` key=value` pairs for the log; values that are no plain names are quoted."""
    pairs: list[str] = []
    for field in ("ref", "source", "destination", "datastore", "staging_id", "name", "request_id"):
        value = getattr(request, field, None)
        if value is not None and not isinstance(value, str):
            image_id = getattr(value, "image_id", "")
            value = f"{value.datastore}/{image_id}" if image_id else ""
        if value:
            value = value if len(value) <= 200 else value[:200] + "…"
            plain = value.isascii() and value.isprintable() and not set(value) & set(" ='\"\\")
            pairs.append(f" {field}={value if plain else repr(value)}")
    return "".join(pairs)
