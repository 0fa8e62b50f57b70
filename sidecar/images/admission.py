"""How much of the sidecar one datastore may hold: a call to one that hangs does not come back, and keeps its thread."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from sidecar.errors import DatastoreUnavailable, OperationCancelled, TooManyCalls

PATIENCE_SECONDS = 5.0
# Places beyond those of other calls, for what gives back what others hold.
RESERVED = 2
_LOOK_SECONDS = 0.5  # between two looks at whether the caller is there


class Slots:
    """A bound on what holds a thread for long. Taking one never waits: a full pool is an answer."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind = kind
        self.size = size
        self._free = threading.BoundedSemaphore(size)

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Holds a slot. Raises TooManyCalls when all are taken."""
        if not self._free.acquire(blocking=False):
            raise TooManyCalls(
                f"{self.size} {self.kind} are running, which is the limit of this sidecar: try again later"
            )
        try:
            yield
        finally:
            self._free.release()


class Admission:
    """The places of one datastore. Safe for use by several threads.

    Copies and transfers take a slot or are refused; other calls wait in line for as long as the line moves. A place
    is held until its thread is back, not until its caller has gone. Copies between two datastores have slots of their
    own: they hang with either, and must not use up those of copies inside the other.

    A call that waits for an image's lock does not hang: it steps aside, and its place is another's meanwhile. So the
    calls hold at most `most_threads(calls)` threads: those in a place, and as many that stepped aside.
    """

    def __init__(
        self,
        datastore: str,
        *,
        calls: int = 16,
        copies: int = 16,
        transfers: int = 32,
        patience: float = PATIENCE_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`patience`: seconds in which none of the calls comes back, after which others are refused."""
        self._datastore = datastore
        self._copies_inside = Slots(f"copies inside datastore {datastore}", copies)
        self._copies_across = Slots(f"copies between datastore {datastore} and others", copies)
        self._transfers = Slots(f"transfers from or to datastore {datastore}", transfers)
        self._silence: Callable[[], str] = lambda: ""
        self._calls = calls
        self._patience = patience
        self._monotonic = monotonic
        self._changed = threading.Condition()  # guards what follows
        self._busy = 0
        self._aside = 0
        self._moved = monotonic()  # when a call last came or went
        self._thread = threading.local()  # has `inside` in the thread of a call that has a place

    @property
    def silence(self) -> str:
        """That the datastore is not answering, in words; empty when it does, or nobody knows."""
        return self._silence()

    def ask(self, silence: Callable[[], str]) -> None:
        """Sets who knows whether the datastore is not answering, and says so in words; once, before it is used."""
        self._silence = silence

    @contextlib.contextmanager
    def call(self, wanted: Callable[[], bool] = lambda: True, *, frees: bool = False) -> Iterator[None]:
        """A place for a call, while its caller wants it; DatastoreUnavailable when the datastore seems to hang.

        `frees`: for one that gives back what others hold; it does not wait behind all of them.
        """
        self._require_answering()
        places = self._calls + RESERVED if frees else self._calls
        with self._changed:
            while self._busy >= places:
                left = self._moved + self._patience - self._monotonic()
                if left <= 0:
                    raise DatastoreUnavailable(
                        f"datastore {self._datastore}: {self._busy} calls are busy with it, and none came back in the "
                        f"last {self._patience:g} s: it hangs; look at it, and try again later"
                    )
                self._changed.wait(min(left, _LOOK_SECONDS))
                if not wanted():
                    raise OperationCancelled(f"nobody waits for datastore {self._datastore} any more")
            self._count(busy=1)
        with self._inside():
            yield

    @contextlib.contextmanager
    def call_with(self, other: "Admission", wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Places here and there, which may be here, as `call`; neither is held while the other is waited for."""
        if other is self:
            with self.call(wanted):
                yield
            return
        first, second = self, other
        while True:
            with first.call(wanted):
                second._require_answering()
                with second._changed:
                    free = second._busy < second._calls
                    if free:
                        second._count(busy=1)
                if free:
                    with second._inside():
                        yield
                    return
            first, second = second, first

    @contextlib.contextmanager
    def stepping_aside(self) -> Iterator[Callable[[], None]]:
        """For the block, in which a call may wait for a lock: what is to be called again and again while it does.

        It gives the call's place to others. When as many wait for locks as there are places, the call keeps its own
        for a moment, and is refused after that: TooManyCalls. Does nothing in a thread that has no place.
        """
        aside = False
        until: float | None = None

        def step() -> None:
            nonlocal aside, until
            if aside or not getattr(self._thread, "inside", False):
                return
            with self._changed:
                if self._aside < self._calls:
                    self._count(busy=-1, aside=1)
                    aside = True
                    return
            now = self._monotonic()
            # Before those in line take it for a datastore that hangs.
            until = now + self._patience / 2 if until is None else until
            if now >= until:
                raise TooManyCalls(
                    f"{self._calls} calls wait for locks of images on datastore {self._datastore}, which is the limit "
                    "of this sidecar: try again later"
                )

        try:
            yield step
        finally:
            if aside:
                # Without waiting for a place: this call may hold the lock now that others wait for in theirs.
                with self._changed:
                    self._count(busy=1, aside=-1)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """A place that was taken, given back at the end."""
        self._thread.inside = True
        try:
            yield
        finally:
            self._thread.inside = False
            with self._changed:
                self._count(busy=-1)

    def _count(self, *, busy: int, aside: int = 0) -> None:
        """Calls that came or went; under `_changed`."""
        self._busy += busy
        self._aside += aside
        self._moved = self._monotonic()
        self._changed.notify_all()

    @contextlib.contextmanager
    def copy_to(self, destination: "Admission") -> Iterator[None]:
        """The slots of a copy from here to there, which may be here; TooManyCalls, DatastoreUnavailable."""
        self._require_answering()
        if destination is self:
            with self._copies_inside.take():
                yield
            return
        destination._require_answering()
        with self._copies_across.take(), destination._copies_across.take():
            yield

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """A slot for a stream of data; TooManyCalls, DatastoreUnavailable."""
        self._require_answering()
        with self._transfers.take():
            yield

    def _require_answering(self) -> None:
        if silence := self._silence():
            raise DatastoreUnavailable(f"datastore {self._datastore}: {silence}; try again when it answers")


def most_threads(calls: int) -> int:
    """How many threads the calls of one datastore may hold, when it has that many places for them."""
    return 2 * calls + RESERVED


def most_copies(datastores: int, each: int) -> int:
    """How many copies there can be, when each datastore has `each` slots for those inside it and for those across."""
    return datastores * each + (datastores * each // 2 if datastores > 1 else 0)
