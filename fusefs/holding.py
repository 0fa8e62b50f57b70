"""Files that are read by way of the sidecar are in use for as long as they are open: it holds them for this mount.

It does so until a stream to it ends, of which there is one. When the sidecar was restarted, what is open is held again.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from fusefs.pulse import Pulse
from sidecar.client import Holder, ImageFile, ImageRef, SidecarClient
from sidecar.errors import (
    CallUnknown,
    DatastoreNotFound,
    FileChanged,
    FileNotInImage,
    HolderNotFound,
    ImageNotFound,
    ImagesError,
    OperationCancelled,
    SidecarUnavailable,
)

_log = logging.getLogger(__name__)

# How long an open waits: for the stream after a restart, and for the datastore of the file.
_STREAM_SECONDS = 5.0
_OPEN_SECONDS = 30.0
# How long a file that was open before a restart may take, and the end of the mount wait for it. Each is a look of a
# server, and all are to be held before the sidecar purges anything by itself, 10 s after its start.
_AGAIN_SECONDS = 10.0
_THREADS = 8
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 1.0
# Between two looks whether an older sidecar has been replaced, by one that purges nothing for twice as long.
_UNKNOWN_PAUSE_SECONDS = 5.0
# Its image is gone, or is another one: reading fails, too.
_GONE = (ImageNotFound, FileNotInImage, FileChanged, DatastoreNotFound)

_Item = TypeVar("_Item")


@dataclass(slots=True, eq=False)
class Hold:
    """A file that is open, and who holds it, under which number."""

    ref: ImageRef
    name: str
    expected: ImageFile
    holder: Holder | None = None
    number: int = 0
    gone: bool = False
    failed: bool = False  # it was said that it could not be held again, so far

    def __str__(self) -> str:
        return f"{self.ref.datastore}/{self.ref.image_id}/{self.name}"


class Holding:
    """Holds files until it is stopped. Safe to share between threads. `clock` is monotonic."""

    def __init__(self, client: SidecarClient, pulse: Pulse, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._pulse = pulse
        self._clock = clock
        self._numbers = itertools.count(1)
        self._stop = threading.Event()
        self._changed = threading.Condition()  # guards what follows
        self._stream: Holder | None = None  # that is there, or is being made
        self._holder: Holder | None = None  # that holds
        self._unknown = False  # the sidecar is too old to hold
        self._failure: ImagesError | None = None  # of the last stream
        self._open: set[Hold] = set()
        self._unheld = False  # some of them may not be held
        self._closed: dict[int, tuple[Holder, str]] = {}  # to be released: the holder and the datastore, by number
        self._threads = [
            threading.Thread(target=self._follow, name="hold", daemon=True),
            # Of their own: what hangs in one keeps the other from nothing.
            threading.Thread(
                target=self._work, args=(lambda: bool(self._closed), self._release_closed), name="release", daemon=True
            ),
            threading.Thread(
                target=self._work, args=(lambda: self._unheld, self._hold_again), name="hold-again", daemon=True
            ),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the stream, and with it all that is held, and the threads."""
        self._stop.set()
        with self._changed:
            if self._stream is not None:
                self._stream.cancel()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def hold(self, ref: ImageRef, name: str, expected: ImageFile) -> Hold:
        """The file is in use until `release`. Raises what `Holder.hold` does; SidecarUnavailable in some seconds.

        By a sidecar that is too old to hold files it is not in use.
        """
        self._pulse.require()
        hold = Hold(ref, name, expected)
        until = self._clock() + _OPEN_SECONDS
        before: Holder | None = None
        while (holder := self._next_holder(before, until)) is not None:
            try:
                self._hold_by(holder, hold, max(until - self._clock(), 0.1))
                break
            except (HolderNotFound, SidecarUnavailable):
                if self._clock() >= until:
                    raise
                before = holder  # it has ended, and this may be known here in a moment only
        with self._changed:
            self._open.add(hold)
            if hold.holder is not self._holder:  # by now
                self._note_unheld()
        return hold

    def release(self, hold: Hold) -> None:
        """Lets go of it, soon; does nothing when it was released."""
        with self._changed:
            if hold in self._open:
                self._open.remove(hold)
                self._release_later(hold.holder, hold.number, hold.ref.datastore)

    def _next_holder(self, before: Holder | None, until: float) -> Holder | None:
        """Another one than the one before; None of a sidecar that is too old. Waits no longer than `until`."""

        def there() -> bool:
            return self._unknown or self._holder not in (None, before) or self._stop.is_set()

        with self._changed:
            self._changed.wait_for(there, max(min(_STREAM_SECONDS, until - self._clock()), 0.0))
            if self._stop.is_set():
                raise OperationCancelled("the mount ends")
            if not there():
                raise self._failure or SidecarUnavailable(
                    f"the sidecar at {self._client.address} holds no files for this mount: see its log"
                )
            return self._holder

    def _hold_by(self, holder: Holder, hold: Hold, seconds: float) -> None:
        number = next(self._numbers)
        try:
            holder.hold(number, hold.ref, hold.name, expected=hold.expected, timeout=seconds)
        except ImagesError:
            with self._changed:
                self._release_later(holder, number, hold.ref.datastore)  # its answer may have been lost
            raise
        with self._changed:
            hold.holder, hold.number = holder, number

    def _release_later(self, holder: Holder | None, number: int, datastore: str) -> None:
        if holder is not None and holder is self._holder:
            self._closed[number] = holder, datastore
            self._changed.notify_all()

    def _note_unheld(self) -> None:
        self._unheld = True
        self._changed.notify_all()

    def _follow(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stop.is_set():
            try:
                stream = self._client.open_holder()
                with self._changed:
                    self._stream = stream
                    if self._stop.is_set():
                        stream.cancel()
                with stream:
                    self._begin(stream)
                    pause = _FIRST_PAUSE_SECONDS
                    stream.wait()
                self._end(None)
            except CallUnknown as error:
                self._note_unknown(error)
                pause = _UNKNOWN_PAUSE_SECONDS
            except ImagesError as error:
                self._end(error)
            except Exception:
                # The thread must outlive a defect: without it nothing would be held, and nobody would know.
                _log.exception("files not held: trying again")
                self._end(None)
            self._stop.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _begin(self, holder: Holder) -> None:
        with self._changed:
            self._holder = holder
            self._unknown, self._failure = False, None
            self._closed.clear()  # of the one before
            self._note_unheld()

    def _end(self, error: ImagesError | None) -> None:
        with self._changed:
            lost = self._holder is not None
            self._holder, self._failure = None, error
            count = len(self._open)
        if lost and error is not None and not isinstance(error, OperationCancelled):
            _log.warning("files not held for now files=%d cause=%s", count, error.message)

    def _note_unknown(self, error: CallUnknown) -> None:
        with self._changed:
            known, self._unknown, self._holder = self._unknown, True, None
            self._changed.notify_all()
        if not known:
            _log.warning("the sidecar is too old to hold files: what is read is not in use cause=%s", error.message)

    def _work(self, is_there: Callable[[], bool], work: Callable[[], bool]) -> None:
        """Does it when it is there to be done, and again when it says that something is left."""
        while self._wait_for_work(is_there):
            try:
                done = work()
            except Exception:
                # As in `_follow`: without this thread what is open would not be held after a restart, or for ever.
                _log.exception("files not held again or released: trying again")
                done = False
            if not done:
                self._stop.wait(_LONGEST_PAUSE_SECONDS)

    def _wait_for_work(self, is_there: Callable[[], bool]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or (self._holder is not None and is_there()))
        return not self._stop.is_set()

    def _release_closed(self) -> bool:
        """False: try again."""
        with self._changed:
            closed = [(datastore, (number, holder)) for number, (holder, datastore) in self._closed.items()]
        return _each(closed, self._release_one)

    def _release_one(self, closed: tuple[int, Holder]) -> bool:
        number, holder = closed
        if self._stop.is_set():
            return False
        try:
            holder.release(number)
        except HolderNotFound:
            pass
        except ImagesError as error:
            _log.debug("file not released cause=%s", error.message)
            return False
        with self._changed:
            self._closed.pop(number, None)
        return True

    def _hold_again(self) -> bool:
        """False: try again."""
        with self._changed:
            holder = self._holder
            if holder is None:
                return True
            self._unheld = False
            left = [hold for hold in self._open if hold.holder is not holder and not hold.gone]
        left.sort(key=lambda hold: hold.failed)  # one that fails again and again is no other one's failure
        done = False
        try:
            done = _each(((hold.ref.datastore, hold) for hold in left), lambda hold: self._hold_one_again(holder, hold))
        finally:
            if not done:
                with self._changed:
                    self._note_unheld()
        return done

    def _hold_one_again(self, holder: Holder, hold: Hold) -> bool:
        if self._stop.is_set():
            return False
        with self._changed:
            if hold not in self._open:
                return True
        try:
            self._hold_by(holder, hold, _AGAIN_SECONDS)
        except _GONE as error:
            hold.gone = True
            _log.warning("open file not held any more: it is gone file=%s cause=%s", hold, error.message)
            return True
        except ImagesError as error:
            level = logging.DEBUG if hold.failed else logging.WARNING
            hold.failed = True
            _log.log(level, "open file not held, trying again file=%s cause=%s", hold, error.message)
            return False
        _log.info("file held again file=%s", hold)
        with self._changed:
            if hold not in self._open:  # it was closed meanwhile
                self._release_later(holder, hold.number, hold.ref.datastore)
        return True


def _each(items: Iterable[tuple[str, _Item]], work: Callable[[_Item], bool]) -> bool:
    """Whether `work` did all, each of the datastore named with it; after a failure what is left of that is not done.

    In some threads, which have ended then. Each datastore has one before any has two: one that hangs keeps no other
    one waiting, where there are not more of them than threads.
    """
    waiting: dict[str, deque[_Item]] = {}
    for datastore, item in items:
        waiting.setdefault(datastore, deque()).append(item)

    def run(left: deque[_Item]) -> bool:
        while True:
            try:
                item = left.popleft()
            except IndexError:
                return True
            if not work(item):
                left.clear()
                return False

    lanes = [left for place in range(_THREADS) for left in waiting.values() if place < len(left)]
    if len(lanes) <= 1:
        return all(map(run, lanes))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hold") as pool:
        return all(list(pool.map(run, lanes)))
