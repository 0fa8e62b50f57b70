"""Operations that take long: each has a thread of its own, tells how far it is, and ends when nobody wants it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Generic, TypeVar

from sidecar.errors import InvalidRequest
from sidecar.images.progress import Amount, Progress
from sidecar.pools import NamedPool

_REMEMBERED = 1_000
_LONGEST_REQUEST_ID = 128
_LOOK_SECONDS = 0.1

Result = TypeVar("Result")


def check_request_id(request_id: str) -> None:
    """InvalidRequest for one that is too long to be remembered."""
    if len(request_id) > _LONGEST_REQUEST_ID:
        raise InvalidRequest(f"request_id has {len(request_id)} characters: at most {_LONGEST_REQUEST_ID} are allowed")


class Operation(Generic[Result]):
    """One running or finished piece of work."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.progress = Progress()
        self._future: Future[Result] = Future()
        self._lock = threading.Lock()  # guards the count
        self._attending = 0

    def run(self, work: Callable[[Progress], Result]) -> None:
        try:
            self._future.set_result(work(self.progress))
        except BaseException as error:
            self._future.set_exception(error)

    @property
    def ended(self) -> bool:
        return self._future.done()

    @property
    def usable(self) -> bool:
        """Whether it has a result, or is still wanted."""
        if self._future.done():
            return self._future.exception() is None
        return not self.progress.cancelled

    def join(self) -> bool:
        """Counts one more who wants the result, and attends next. False: it has none, and will have none."""
        with self._lock:
            if not self.usable:
                return False
            self._attending += 1
            return True

    @contextmanager
    def attend(self) -> Iterator[Callable[[], None]]:
        """For whoever joined: wants the result for as long as the block lasts.

        When the last one leaves, what is not done is cancelled. Gives what leaves before the end of the block, from any
        thread: who finds out first that nobody is there.
        """
        here = True

        def leave() -> None:
            nonlocal here
            with self._lock:
                self._attending -= here
                if here and self._attending == 0 and not self._future.done():
                    self.progress.cancel()
                here = False

        try:
            yield leave
        finally:
            leave()

    def wait(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds for the end; whether it is there."""
        try:
            self._future.exception(timeout)
        except TimeoutError:
            return False
        return True

    def amounts(self, interval: float) -> Iterator[Amount]:
        """How far it is, every `interval` seconds until it has ended."""
        while not self.wait(interval):
            yield self.progress.amount

    def result(self) -> Result:
        """Of an operation that has ended."""
        return self._future.result(timeout=0)


class Operations(Generic[Result]):
    """Starts operations; one that was asked for before, by its request id, is found instead. Owns the threads."""

    def __init__(self, limit: int, name: str) -> None:
        """At most `limit` run at once; more wait for their turn."""
        self._executor = NamedPool(limit, name)
        self._lock = threading.Lock()  # guards the operations
        self._by_request: OrderedDict[str, Operation[Result]] = OrderedDict()
        self._unfinished: set[Operation[Result]] = set()

    def start(
        self,
        request_id: str,
        fingerprint: str,
        work: Callable[[Progress], Result],
        admission: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Operation[Result]:
        """The operation of this request id, running or done; a new one when there is none or it failed.

        The caller has joined it and must attend it. InvalidRequest when the id was used for something else. A new one
        holds what `admission` gives until it has ended; what that raises, passes.
        """
        check_request_id(request_id)
        with self._lock:
            known = self._by_request.get(request_id) if request_id else None
            if known and known.fingerprint != fingerprint:
                raise InvalidRequest(f"request id {request_id} was used for {known.fingerprint}; take a new one")
            if known and known.join():
                return known
            if known and not known.ended:
                work = _after(known, work)
            held = ExitStack()
            held.enter_context(admission())
            operation: Operation[Result] = Operation(fingerprint)
            operation.join()
            if request_id:
                self._by_request[request_id] = operation
                self._by_request.move_to_end(request_id)
                while len(self._by_request) > _REMEMBERED:
                    self._by_request.popitem(last=False)
            self._unfinished.add(operation)
            self._executor.submit(self._run, operation, work, held)
            return operation

    def _run(self, operation: Operation[Result], work: Callable[[Progress], Result], held: ExitStack) -> None:
        try:
            with held:
                operation.run(work)
        finally:
            with self._lock:
                self._unfinished.discard(operation)

    def cancel(self) -> None:
        """Cancels what runs; returns at once."""
        with self._lock:
            for operation in self._unfinished:
                operation.progress.cancel()

    def close(self) -> None:
        """Cancels what runs and waits until it has cleaned up."""
        self.cancel()
        self._executor.shutdown(wait=True)


def _after(cancelled: Operation[Result], work: Callable[[Progress], Result]) -> Callable[[Progress], Result]:
    """The work, once an operation that was cancelled has ended; or its result, when the cancelling came too late."""

    def wait_and_work(progress: Progress) -> Result:
        # It was queued before, so it has a thread or has had one.
        while not cancelled.wait(_LOOK_SECONDS):
            progress.check()
        return cancelled.result() if cancelled.usable else work(progress)

    return wait_and_work
