"""The gRPC server: its threads, its limits, health, reflection, and an end that cuts nothing off that could finish."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sidecar.config import Limits, SidecarConfig
from sidecar.images.admission import Slots, most_copies, most_threads
from sidecar.listening import listener
from sidecar.pools import NamedPool
from sidecar.services.interceptors import Activity, CallInterceptor

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_MESSAGE_BYTES = 8 * 1024**2
# Streams of reflection; each holds a thread for as long as its client likes.
MAX_REFLECTIONS = 4
# Calls that may wait for a thread, beyond those that run.
MAX_WAITING = 1024
# For cancelled handlers to notice it.
CANCEL_SECONDS = 5.0

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A second sidecar at the same port would otherwise take half of the calls.
    ("grpc.so_reuseport", 0),
    # A client that hangs, or a host that sleeps, must not hold a watch for ever.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer: the full name of its service, and what adds it to a server."""

    name: str
    add: Callable[[grpc.Server], None]


class SidecarServer:
    """One server at one address, started once and stopped once."""

    def __init__(
        self,
        services: Sequence[Service],
        config: SidecarConfig,
        clock: Callable[[], float] = time.monotonic,
        *,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """`interrupt` is called when the calls that still run are cancelled: it ends what they wait for."""
        self._clock = clock
        self._interrupt = interrupt
        self._grace = config.limits.shutdown_seconds
        self._refused: float | None = None
        self._activity = Activity()
        slots = _slots(config.limits, len(config.datastores))
        self._interceptor = CallInterceptor(slots, self._activity)
        # Each datastore may hang with all that it may have at a time, and health, listings and the others go on.
        small = config.limits.max_calls + len(config.datastores) * most_threads(config.limits.max_calls)
        threads = sum(each.size for each in {*slots.values()}) + small
        self._pool = _CountedPool(threads, self._activity)
        self._server = grpc.server(
            self._pool,
            interceptors=[self._interceptor],
            options=OPTIONS,
            maximum_concurrent_rpcs=threads + MAX_WAITING,
        )
        # Non-blocking: a health watch holds no thread.
        self._health = health.HealthServicer(experimental_non_blocking=True)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for service in services:
            service.add(self._server)
            self._health.set(service.name, health_pb2.HealthCheckResponse.SERVING)
        names = [*(service.name for service in services), health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        self._listener = listener(config.listen)

    @property
    def address(self) -> str:
        """Where clients reach it; after start, with the port that was chosen."""
        return self._listener.address

    def start(self) -> None:
        """Binds and serves; when it returns, clients find the address. Raises ListenError, and nothing is left."""
        try:
            self._listener.bind(self._server)
            self._server.start()
            self._listener.open()
        except BaseException:
            self._server.stop(None)
            self._listener.close()
            self._pool.shutdown(wait=False)
            raise

    def refuse(self) -> None:
        """Begins the end: health says NOT_SERVING, new calls are refused, the grace time of the running ones starts.

        gRPC itself goes on until stop: from a server that is shutting down, a call that comes at the wrong moment gets
        CANCELLED, which no client takes for a reason to try again.
        """
        if self._refused is None:
            self._refused = self._clock()
            self._health.enter_graceful_shutdown()
            self._interceptor.refuse()

    def cancel(self) -> None:
        """Ends the grace time now; from any thread, while another is in stop."""
        self._activity.hurry()

    def stop(self) -> bool:
        """Refuses new calls, lets the running ones end within the grace time, cancels the rest.

        False: a cancelled handler did not end within CANCEL_SECONDS (a storage that hangs); its thread is still there.
        """
        self.refuse()
        assert self._refused is not None
        self._interceptor.cancel_foreign()
        if not self._activity.wait_idle(self._refused + self._grace - self._clock()):
            logger.warning("calls cancelled waited_seconds=%.1f", self._clock() - self._refused)
        # The calls that did not end, and the health watches, which never do.
        self._server.stop(0)
        self._interrupt()
        ended = self._activity.wait_idle(CANCEL_SECONDS, hurried=False)
        self._server.wait_for_termination(CANCEL_SECONDS)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._listener.close()
        return ended


def _slots(limits: Limits, datastores: int) -> dict[str, Slots]:
    """Of every call that holds a thread for long; methods of one kind share them."""
    copies = Slots("copies", most_copies(datastores, limits.max_copies))
    watches = Slots("watches", limits.max_watches)
    # A mount has one of each.
    holders = Slots("holders of files", limits.max_watches)
    transfers = Slots("transfers", datastores * limits.max_transfers)
    return {
        "/images.v1.ImageService/CopyImage": copies,
        "/images.v1.StagingService/CloneDisk": copies,
        "/images.v1.ImageService/WatchImages": watches,
        "/images.v1.StagingService/OpenHolder": holders,
        "/images.v1.StagingService/WriteFile": transfers,
        "/images.v1.StagingService/ReadFile": transfers,
        f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": Slots("reflections", MAX_REFLECTIONS),
    }


class _CountedPool(NamedPool):
    """Counts what waits for a thread or has one, so that the end can wait for it."""

    def __init__(self, threads: int, activity: Activity) -> None:
        super().__init__(threads, "call")
        self._activity = activity

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> futures.Future[T]:
        self._activity.begin()
        try:
            future = super().submit(fn, *args, **kwargs)
        except BaseException:
            self._activity.end()
            raise
        future.add_done_callback(lambda _: self._activity.end())
        return future
