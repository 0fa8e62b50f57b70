"""Files of images that are read elsewhere, as through a mount that has no path to them: open here, and so in use."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sidecar.datastores.interface import ReadableFile
from sidecar.errors import HolderNotFound, InvalidRequest, OperationCancelled, SidecarUnavailable, TooManyCalls
from sidecar.images.ending import end_all

# Each may be an open file of this process.
MOST_FILES = 4096

_log = logging.getLogger(__name__)


class Admit(Protocol):
    """A place for a call to a datastore, as `Admission.call`."""

    def __call__(self, wanted: Callable[[], bool], *, looks: bool = False) -> AbstractContextManager[None]: ...


def _at_once(wanted: Callable[[], bool], *, looks: bool = False) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(slots=True, eq=False)
class _Place:
    """Of one file, which is None while it is being opened."""

    admit: Admit
    file: ReadableFile | None = None


class Holder:
    """The files that one client holds, by the numbers that it has for them. Safe for use by several threads."""

    def __init__(self, most: int = MOST_FILES) -> None:
        self.id = uuid.uuid4().hex
        self._most = most
        self._over = threading.Event()
        self._lock = threading.Lock()  # guards the places
        self._places: dict[int, _Place] | None = {}  # by number; None: the holder is closed

    def hold(
        self,
        number: int,
        open_file: Callable[[], ReadableFile],
        wanted: Callable[[], bool],
        admit: Admit = _at_once,
    ) -> None:
        """Holds what `open_file` opens, which may take long, until it is released. Both are done where `admit` lets in.

        OperationCancelled when it was released meanwhile, or is not `wanted` any more. Nothing is held after an error.
        """
        place = self._reserve(number, admit)
        try:
            with admit(wanted):
                file = open_file()
                with self._lock:
                    if self._has(number, place) and wanted():
                        place.file = file
                        return
                file.close()
                raise OperationCancelled("the file is not to be held any more")
        except BaseException:
            self._take(number, place)
            raise

    def _reserve(self, number: int, admit: Admit) -> _Place:
        with self._lock:
            if self._places is None:
                raise _not_found(self.id)
            if number in self._places:
                raise InvalidRequest(f"number {number} is used already: use another one for each file that is held")
            if len(self._places) >= self._most:
                raise TooManyCalls(
                    f"{self._most} files are held already, the most that one holder may have: release some, or make "
                    "another holder"
                )
            return self._places.setdefault(number, _Place(admit))

    def _has(self, number: int, place: _Place) -> bool:
        """Whether it is still that one; under `_lock`."""
        return self._places is not None and self._places.get(number) is place

    def _take(self, number: int, place: _Place) -> bool:
        """Takes it away, if it is still that one."""
        with self._lock:
            if self._places is None or self._places.get(number) is not place:
                return False
            del self._places[number]
            return True

    def release(self, number: int, wanted: Callable[[], bool] = lambda: True) -> None:
        """Closes the file; one that is being opened is closed when it is open.

        Where it is not let in, as to a datastore that hangs, the file is held still: release it again.
        """
        with self._lock:
            place = self._places.get(number) if self._places is not None else None
            if place is None:
                return
            if place.file is None and self._places is not None:
                del self._places[number]
                return
        with place.admit(wanted, looks=True):
            if self._take(number, place) and place.file is not None:
                place.file.close()

    def leave(self) -> None:
        """Ends `wait`."""
        self._over.set()

    def wait(self) -> None:
        """Until `leave`."""
        self._over.wait()

    def close(self) -> None:
        """Closes the files, and holds no more; what cannot be closed is logged."""
        with self._lock:
            places, self._places = self._places or {}, None
        # By datastore: one that hangs keeps no other one's in use.
        files: dict[Admit, list[ReadableFile]] = {}
        for place in places.values():
            if place.file is not None:
                files.setdefault(place.admit, []).append(place.file)
        end_all(partial(_close, each) for each in files.values())


def _close(files: list[ReadableFile]) -> None:
    for file in files:
        try:
            file.close()
        except Exception as error:
            # The others would be in use until this process ends.
            _log.warning("held file not closed cause=%s", error)


class Holders:
    """All holders of a sidecar, by their ids. Safe for use by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._holders: dict[str, Holder] = {}
        self._ended = False

    @contextmanager
    def opened(self) -> Iterator[Holder]:
        """A holder, with all that it holds, for the time of the block; SidecarUnavailable when the sidecar ends.

        Then its files stay open until `close`: a purge that still runs must not take them away from their readers, who
        hold them again by the next sidecar.
        """
        holder = Holder()
        with self._lock:
            if self._ended:
                raise _ending()
            self._holders[holder.id] = holder
        try:
            yield holder
            if self._ended:
                raise _ending()
        finally:
            with self._lock:
                keep = self._ended
                if not keep:
                    del self._holders[holder.id]
            if not keep:
                holder.close()

    def get(self, holder_id: str) -> Holder:
        """HolderNotFound when there is none, any more."""
        with self._lock:
            holder = self._holders.get(holder_id)
        if holder is None:
            raise _not_found(holder_id)
        return holder

    def end(self) -> None:
        """Ends every wait; the files stay open until `close`."""
        with self._lock:
            self._ended = True
            holders = list(self._holders.values())
        for holder in holders:
            holder.leave()

    def close(self) -> None:
        """Closes all files; what cannot be closed is logged."""
        self.end()
        with self._lock:
            holders, self._holders = list(self._holders.values()), {}
        for holder in holders:
            holder.close()


def _not_found(holder_id: str) -> HolderNotFound:
    return HolderNotFound(f"there is no holder {holder_id[:128]!r}: the call that made it has ended; make another one")


def _ending() -> SidecarUnavailable:
    return SidecarUnavailable("the sidecar is shutting down; hold again when it is back")
