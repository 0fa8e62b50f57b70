"""How much of the sidecar one datastore may hold: a call to one that hangs does not come back, and keeps its thread."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from sidecar.errors import DatastoreUnavailable, OperationCancelled, TooManyCalls

PATIENCE_SECONDS = 5.0
# Places beyond those of other calls, for what gives back what others hold.
RESERVED = 2
# Calls of one kind that may wait for a place, each in a thread: a burst of small ones, not all that clients can send.
LINE = 64
_LOOK_SECONDS = 0.5  # between two looks at whether the caller is there
_LIMIT = "which is the limit of this sidecar: try again later"


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
            raise TooManyCalls(f"{self.size} {self.kind} are running, {_LIMIT}")
        try:
            yield
        finally:
            self._free.release()


class _Places:
    """The places of one kind of calls, and the line before them. Safe for use by several threads.

    A call in a place may step aside while it waits for what others do, and comes back without waiting. So these calls
    hold at most `most` threads: those in a place, as many that stepped aside, and those in line.
    """

    def __init__(
        self,
        kind: str,
        datastore: str,
        size: int,
        *,
        reserved: int,
        patience: float | None,
        require_answering: Callable[[], None],
        monotonic: Callable[[], float],
    ) -> None:
        """`reserved`: places beyond `size`, and in line, for those that free what others need.

        `patience`: seconds in which none comes back, after which those in line are refused; None: they may take long.
        `require_answering` raises what they are refused with when the datastore is known not to answer.
        """
        self.kind = kind
        self._datastore = datastore
        self.size = size
        self._reserved = reserved
        self._patience = patience
        self._require_answering = require_answering
        self._monotonic = monotonic
        self._changed = threading.Condition()  # guards what follows
        self._busy = 0
        self._aside = 0
        self._line = 0
        self._moved = monotonic()  # when a call last came or went

    @staticmethod
    def most(size: int, reserved: int) -> int:
        """How many threads they hold at most."""
        return 2 * size + LINE + 2 * reserved

    def enter(self, wanted: Callable[[], bool], *, frees: bool) -> None:
        """Takes a place, after those in line; `leave` gives it back."""
        more = self._reserved if frees else 0
        with self._changed:
            if self._busy >= self.size + more:
                if self._line >= LINE + more:
                    raise TooManyCalls(
                        f"{self._line} {self.kind} wait in line for datastore {self._datastore}, {_LIMIT}"
                    )
                self._line += 1
                try:
                    self._wait_in_line(wanted, self.size + more)
                finally:
                    self._line -= 1
            self._count(busy=1)

    def _wait_in_line(self, wanted: Callable[[], bool], places: int) -> None:
        while self._busy >= places:
            left = _LOOK_SECONDS
            if self._patience is not None:
                left = self._moved + self._patience - self._monotonic()
                if left <= 0:
                    raise DatastoreUnavailable(
                        f"datastore {self._datastore}: {self._busy} {self.kind} are busy with it, and none came back "
                        f"in the last {self._patience:g} s: it hangs; look at it, and try again later"
                    )
            self._changed.wait(min(left, _LOOK_SECONDS))
            if not wanted():
                raise OperationCancelled(f"nobody waits for datastore {self._datastore} any more")
            self._require_answering()

    def enter_if_free(self) -> bool:
        """Takes a place when there is one."""
        with self._changed:
            if self._busy >= self.size:
                return False
            self._count(busy=1)
            return True

    def leave(self) -> None:
        with self._changed:
            self._count(busy=-1)

    def step_aside(self) -> bool:
        """Gives the place to others, unless as many are aside as there are places."""
        with self._changed:
            if self._aside >= self.size:
                return False
            self._count(busy=-1, aside=1)
            return True

    def come_back(self) -> None:
        """Without waiting for a place: this call may hold the lock now that others wait for in theirs."""
        with self._changed:
            self._count(busy=1, aside=-1)

    def _count(self, *, busy: int, aside: int = 0) -> None:
        """Calls that came or went; under `_changed`."""
        self._busy += busy
        self._aside += aside
        self._moved = self._monotonic()
        self._changed.notify_all()


class Admission:
    """The places of one datastore. Safe for use by several threads.

    Copies and transfers take a slot or are refused; other calls wait in line, which is bounded. A place is held until
    its thread is back, not until its caller has gone. Copies between two datastores have slots of their own: they hang
    with either, and must not use up those of copies inside the other.

    Calls that take as long as there are bytes to be written or freed have places of their own: to wait for those is no
    sign that the datastore hangs, which it is for the small ones when their line does not move.

    A call that waits for an image's lock, or for what another call does, does not hang: it steps aside, and its place
    is another's meanwhile. `most_threads` says how many threads the calls hold at most.
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
        """`patience`: seconds in which none of the small calls comes back, after which others are refused."""
        self._datastore = datastore
        self._copies_inside = Slots(f"copies inside datastore {datastore}", copies)
        self._copies_across = Slots(f"copies between datastore {datastore} and others", copies)
        self._transfers = Slots(f"transfers from or to datastore {datastore}", transfers)
        self._silence: Callable[[], str] = lambda: ""
        self._small = _Places(
            "calls",
            datastore,
            calls,
            reserved=0,
            patience=patience,
            require_answering=self.require_answering,
            monotonic=monotonic,
        )
        self._long = _Places(
            "commits, aborts and purges",
            datastore,
            calls,
            reserved=RESERVED,
            patience=None,
            require_answering=self.require_answering,
            monotonic=monotonic,
        )
        self._fault: Callable[[], str] = lambda: ""
        self._patience = patience
        self._monotonic = monotonic
        self._thread = threading.local()  # has `places` in the thread of a call that has one: of which it is

    @property
    def silence(self) -> str:
        """That the datastore is not answering, in words; empty when it does, or nobody knows."""
        return self._silence()

    def ask(self, silence: Callable[[], str], fault: Callable[[], str] = lambda: "") -> None:
        """Sets who knows whether the datastore is not answering, and says so in words; once, before it is used.

        `fault`: why it cannot be used although it answers, as far as that is known.
        """
        self._silence, self._fault = silence, fault

    @contextlib.contextmanager
    def call(self, wanted: Callable[[], bool] = lambda: True, *, looks: bool = False) -> Iterator[None]:
        """A place for a small call, while its caller wants it.

        DatastoreUnavailable when the datastore cannot be used, or seems to hang, TooManyCalls when too many are in
        line. `looks`: for a call that finds out whether the datastore is well, or only lets go of something there: a
        known fault does not keep it out.
        """
        self.require_answering() if looks else self._require_well()
        self._small.enter(wanted, frees=False)
        with self._inside(self._small):
            yield

    @contextlib.contextmanager
    def long_call(self, wanted: Callable[[], bool] = lambda: True, *, frees: bool = False) -> Iterator[None]:
        """A place for a call that may take long, while its caller wants it; DatastoreUnavailable, TooManyCalls.

        `frees`: for one that gives back what others hold; it does not wait behind all of them, and a known fault does
        not keep it out.
        """
        self.require_answering() if frees else self._require_well()
        self._long.enter(wanted, frees=frees)
        with self._inside(self._long):
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
                second._require_well()
                if second._small.enter_if_free():
                    with second._inside(second._small):
                        yield
                    return
            first, second = second, first

    @contextlib.contextmanager
    def stepping_aside(self) -> Iterator[Callable[[], None]]:
        """For the block, in which a call may wait for others: what is to be called again and again while it does.

        It gives the call's place away. When as many are aside as there are places, the call keeps its own for a moment,
        and is refused after that: TooManyCalls. Does nothing in a thread that has no place.
        """
        places: _Places | None = getattr(self._thread, "places", None)
        aside = False
        until: float | None = None

        def step() -> None:
            nonlocal aside, until
            if aside or places is None:
                return
            if places.step_aside():
                aside = True
                return
            now = self._monotonic()
            # Before those in line take it for a datastore that hangs.
            until = now + self._patience / 2 if until is None else until
            if now >= until:
                raise TooManyCalls(
                    f"{places.size} {places.kind} wait for locks of images on datastore {self._datastore}, or for what "
                    f"others do there, {_LIMIT}"
                )

        try:
            # A block inside of this one steps aside no more.
            self._thread.places = None
            yield step
        finally:
            self._thread.places = places
            if aside and places is not None:
                places.come_back()

    @contextlib.contextmanager
    def _inside(self, places: _Places) -> Iterator[None]:
        """A place that was taken, given back at the end."""
        self._thread.places = places
        try:
            yield
        finally:
            self._thread.places = None
            places.leave()

    @contextlib.contextmanager
    def copy_to(self, destination: "Admission") -> Iterator[None]:
        """The slots of a copy from here to there, which may be here; TooManyCalls, DatastoreUnavailable."""
        self._require_well()
        if destination is self:
            with self._copies_inside.take():
                yield
            return
        destination._require_well()
        with self._copies_across.take(), destination._copies_across.take():
            yield

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """A slot for a stream of data; TooManyCalls, DatastoreUnavailable."""
        self._require_well()
        with self._transfers.take():
            yield

    def require_answering(self) -> None:
        """DatastoreUnavailable when the datastore is known not to answer: who asked it would hang, too."""
        if silence := self._silence():
            raise DatastoreUnavailable(f"datastore {self._datastore}: {silence}; try again when it answers")

    def _require_well(self) -> None:
        """DatastoreUnavailable when it does not answer, or has a known fault."""
        self.require_answering()
        if fault := self._fault():
            raise DatastoreUnavailable(f"datastore {self._datastore}: {fault}")


def most_threads(calls: int) -> int:
    """How many threads the calls of one datastore may hold, when it has that many places for them."""
    return _Places.most(calls, 0) + _Places.most(calls, RESERVED)


def most_copies(datastores: int, each: int) -> int:
    """How many copies there can be, when each datastore has `each` slots for those inside it and for those across."""
    return datastores * each + (datastores * each // 2 if datastores > 1 else 0)
