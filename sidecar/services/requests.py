"""Idempotency: a change is made once for its request_id, however often the call is repeated."""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from sidecar.errors import DeadlineExceeded, ImagesError, InternalError, InvalidRequest, OperationCancelled
from sidecar.images.operations import check_request_id

T = TypeVar("T")
Aside: TypeAlias = Callable[[], AbstractContextManager[Callable[[], None]]]
"""Gives, for a wait, what is called again and again meanwhile; what that raises ends the wait."""

# An error that says nothing about the next try is not remembered.
TRANSIENT = frozenset({"UNAVAILABLE", "ABORTED", "RESOURCE_EXHAUSTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL"})
# The fate of the caller that happened to be first, not of the change.
PERSONAL = frozenset({"CANCELLED", "DEADLINE_EXCEEDED"})
# A caller without a deadline has an infinite one, which no wait takes.
MAX_WAIT_SECONDS = 3600.0
_LOOK_SECONDS = 0.1


def fingerprint(method: str, request: Message) -> bytes:
    """Tells one change from another: the method, and the request but for its request_id and the caller's patience."""
    bare = type(request)()
    bare.CopyFrom(request)
    bare.ClearField("request_id")
    if "lock_timeout" in bare.DESCRIPTOR.fields_by_name:
        bare.ClearField("lock_timeout")
    return hashlib.sha256(method.encode() + b"\0" + bare.SerializeToString(deterministic=True)).digest()


def wanted_by(context: grpc.ServicerContext) -> Callable[[], None]:
    """What raises OperationCancelled once the caller has gone, or its deadline is over."""

    def check() -> None:
        if not context.is_active():
            raise OperationCancelled("nobody waits for this call any more")

    return check


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A result, or what makes the error again: an exception object would keep the frames of its traceback alive."""

    fingerprint: bytes
    at: float
    result: Any
    error: Callable[[], ImagesError] | None = None

    def deliver(self) -> Any:
        if self.error is not None:
            raise self.error()
        return self.result


@dataclass(slots=True)
class _Running:
    fingerprint: bytes
    done: threading.Event = field(default_factory=threading.Event)
    # Set before done. None: the next one has to do the work.
    outcome: _Outcome | None = None


class Requests:
    """What became of the newest changes, by request_id."""

    def __init__(
        self,
        max_remembered: int = 10_000,
        max_age_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_remembered = max_remembered
        self._max_age = max_age_seconds
        self._clock = clock
        self._lock = threading.Lock()
        # Both guarded by _lock. The remembered ones are in the order in which they ended.
        self._running: dict[str, _Running] = {}
        self._remembered: OrderedDict[str, _Outcome] = OrderedDict()

    def run(
        self,
        request_id: str,
        fingerprint: bytes,
        work: Callable[[], T],
        timeout: float | None,
        aside: Aside | None = None,
    ) -> T:
        """The result of `work`, or of an earlier or running call of the same id; its error likewise.

        `timeout`: seconds to wait for a running one, the caller's deadline. Raises DeadlineExceeded after that, and
        InvalidRequest when the id was used for another change. An empty id is nobody's: the work is just done.
        `aside`: for the wait for a running one.
        """
        if not request_id:
            return work()
        check_request_id(request_id)
        until = self._clock() + min(MAX_WAIT_SECONDS if timeout is None else timeout, MAX_WAIT_SECONDS)
        while True:
            with self._lock:
                found = self._find(request_id)
                if found is None:
                    mine = self._running[request_id] = _Running(fingerprint)
                    break
            if found.fingerprint != fingerprint:
                raise InvalidRequest(
                    f"request_id {request_id} was used for another change: use a new one for each, and repeat a "
                    "call with the same arguments"
                )
            if isinstance(found, _Running):
                if not _wait(found.done, max(until - self._clock(), 0), aside):
                    raise DeadlineExceeded(f"the call with request_id {request_id} still runs: ask again later")
                outcome = found.outcome
            else:
                outcome = found
            if outcome is not None:
                result: T = outcome.deliver()
                return result
        return self._work(request_id, mine, work)

    def _find(self, request_id: str) -> _Running | _Outcome | None:
        oldest = self._clock() - self._max_age
        while self._remembered and next(iter(self._remembered.values())).at < oldest:
            self._remembered.popitem(last=False)
        return self._running.get(request_id) or self._remembered.get(request_id)

    def _work(self, request_id: str, mine: _Running, work: Callable[[], T]) -> T:
        remember = False
        try:
            result = work()
            mine.outcome = _Outcome(mine.fingerprint, self._clock(), result)
            remember = True
            return result
        except ImagesError as error:
            if error.code not in PERSONAL:
                kind, message = type(error), error.message
                mine.outcome = _Outcome(mine.fingerprint, self._clock(), None, lambda: kind(message))
            remember = error.code not in TRANSIENT
            raise
        except Exception:
            # The first caller gets the defect itself; who waits learns that there was one.
            mine.outcome = _Outcome(
                mine.fingerprint,
                self._clock(),
                None,
                lambda: InternalError(
                    f"the call with request_id {request_id} failed: the sidecar's log has the details"
                ),
            )
            raise
        finally:
            with self._lock:
                del self._running[request_id]
                if remember and mine.outcome is not None:
                    self._remembered[request_id] = mine.outcome
                    if len(self._remembered) > self._max_remembered:
                        self._remembered.popitem(last=False)
            mine.done.set()


def _wait(done: threading.Event, seconds: float, aside: Aside | None) -> bool:
    until = time.monotonic() + seconds
    with aside() if aside else nullcontext(lambda: None) as step:
        while not done.wait(min(max(until - time.monotonic(), 0), _LOOK_SECONDS)):
            if time.monotonic() >= until:
                return False
            step()
    return True
