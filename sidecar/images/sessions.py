"""Staging directories that clients fill over several calls: found by id, kept by a lease, dropped when it ends."""

import contextlib
import enum
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from sidecar.errors import (
    DeadlineExceeded,
    ImageAlreadyExists,
    ImagesError,
    InvalidRequest,
    NoSpace,
    StagingLost,
    StagingNotFound,
    StagingPublished,
)
from sidecar.images.committing import StagedDisk, commit
from sidecar.images.ending import end_all
from sidecar.images.image import Image, ImageKey
from sidecar.images.staging import REFUSALS, StagingDirectory
from sidecar.images.store import ImageStore

# The lease of one whose maker was gone before it could be told of it: time to repeat the call.
UNTOLD_SECONDS = 30.0
# How long a commit and an abort wait for the calls that name the staging directory; the end of the sidecar, which has
# cancelled them, waits less.
_CALLS_SECONDS = 30.0
_CANCELLED_CALLS_SECONDS = 2.0
_LOOK_SECONDS = 0.1
_MOST_WAIT_SECONDS = 3600.0  # for a caller without a deadline
# A removal of what is expired that takes longer may have hung.
_SLOW_SECONDS = 5.0
_REMEMBERED = 1_000  # published ones, so that their abort is told so

_log = logging.getLogger(__name__)

Published: TypeAlias = tuple[Image, dict[str, str]]
"""The image, and the new names of the staged files."""


class State(enum.Enum):
    OPEN = enum.auto()
    COMMITTING = enum.auto()  # it is OPEN or ENDING afterwards
    ENDING = enum.auto()  # being removed: who aborts it waits for what comes of that, nobody else finds it
    LEFT = enum.auto()  # could not be removed: the next abort, or the end of its lease, tries again


_GOING = (State.ENDING, State.LEFT)


@dataclass(eq=False)
class StagingSession:
    """A staging directory and who is busy with it. The fields are guarded by the lock of the sessions."""

    staging: StagingDirectory
    request_id: str
    expires: float
    calls: int = 0
    state: State = State.OPEN
    # Of the commit that runs, or ran last; done when the state has changed.
    commit: Future[Published] = field(default_factory=Future)
    # Nobody wants what it commits: what is not published is dropped.
    abandoned: bool = False

    @property
    def id(self) -> str:
        return self.staging.token


class StagingSessions:
    """All staging directories that clients fill. Owns the threads that drop those whose lease is over.

    That is one for each datastore, so that one that hangs keeps nothing on the others.
    """

    def __init__(self, lease_seconds: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.lease_seconds = lease_seconds
        self._monotonic = monotonic
        self._changed = threading.Condition()  # guards what follows, and the sessions' fields
        self._sessions: dict[str, StagingSession] = {}
        self._by_request: dict[str, StagingSession] = {}
        self._published: OrderedDict[str, ImageKey] = OrderedDict()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, stores: Iterable[ImageStore]) -> None:
        for store in stores:
            thread = threading.Thread(target=self._drop_expired, args=(store,), name="staging-leases")
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Drops every staging directory, those of each datastore in a thread of its own; calls were cancelled.

        One whose commit runs is left to that: it is published whole, or dropped by it.
        """
        self._stopping.set()
        with self._changed:
            stores = {session.staging.store for session in self._sessions.values()}
        end_all([*(thread.join for thread in self._threads), *(partial(self._close, store) for store in stores)])

    def create(
        self,
        store: ImageStore,
        image_id: str,
        expected_bytes: int,
        request_id: str,
        wanted: Callable[[], bool] = lambda: True,
    ) -> StagingSession:
        """A new staging directory for an image that is not there.

        For the request id of one that there is, that one, its lease renewed. When it is not `wanted` any more once
        it is made, its lease is short: nobody knows its id, but the same request id finds it.
        """
        with self._changed:
            if known := self._renewed(store, image_id, request_id):
                return known
        if expected_bytes < 0:
            raise InvalidRequest(f"expected_bytes is {expected_bytes}; it cannot be negative")
        store.require_absent(image_id)
        store.require_space(expected_bytes)
        staging = StagingDirectory(store, image_id, "import")
        session = StagingSession(staging, request_id, self._monotonic() + self.lease_seconds)
        with contextlib.ExitStack() as unless_kept:
            # When the same call came twice, at the same time, or the request id was used for another image meanwhile.
            unless_kept.enter_context(staging)
            with self._changed:
                if known := self._renewed(store, image_id, request_id):
                    return known
                if not wanted():
                    session.expires = self._monotonic() + min(self.lease_seconds, UNTOLD_SECONDS)
                self._sessions[session.id] = session
                if request_id:
                    self._by_request[request_id] = session
                unless_kept.pop_all()
        return session

    def renew(self, store: ImageStore, image_id: str, request_id: str) -> StagingSession | None:
        """What `create` would give for the request id of one that there is; None when it would make one.

        Asks nothing of the datastore: also while that hangs, a maker keeps what is staged.
        """
        with self._changed:
            return self._renewed(store, image_id, request_id)

    def store(self, staging_id: str) -> ImageStore | None:
        """Where the staging directory is; None when there is none.

        Whoever asks names it, which renews its lease: should the call that this is for be refused, that is no reason to
        drop it.
        """
        with self._changed:
            session = self._sessions.get(staging_id)
            if session is None:
                return None
            if session.state not in _GOING:
                session.expires = self._monotonic() + self.lease_seconds
            return session.staging.store

    @contextmanager
    def using(self, staging_id: str) -> Iterator[StagingDirectory]:
        """The staging directory, which is neither committed nor dropped before the block ends; StagingNotFound.

        When it has `damage` afterwards it is dropped: StagingLost, or NoSpace where that was the reason.
        """
        session = self._enter(staging_id)
        try:
            yield session.staging
        except FileNotFoundError as error:
            # Taken away by somebody who does not heed the lock: what was staged is lost.
            raise _gone(staging_id) from error
        except ImagesError as error:
            if (damage := session.staging.damage) is not None:
                raise _lost(session, damage) from error
            raise
        finally:
            with self._changed:
                session.calls -= 1
                session.expires = self._monotonic() + self.lease_seconds
                lost = session.staging.damage is not None and session.state is State.OPEN and not session.calls
                if lost:
                    session.state = State.ENDING
                self._changed.notify_all()
            if lost:
                self._drop(session)

    def commit(self, staging_id: str, timeout: float | None = None, *, lock_timeout: float | None = None) -> Published:
        """Publishes; while it is being published by another call, waits for that one and answers the same.

        After an error the staging directory is as it was: it can be mended, and committed again. Gone is it after
        ImageAlreadyExists, when it was aborted meanwhile (StagingNotFound), when it could not be made durable
        (StagingLost, NoSpace), and when its files could not be moved into the image's place. DeadlineExceeded when the
        other call has not ended within `timeout` seconds.
        """
        with self._changed:
            session = self._find(staging_id)
            waiting = session.state is State.COMMITTING
            if not waiting:
                session.state = State.COMMITTING
                session.commit = Future()
            running = session.commit
        if waiting:
            return self._outcome(session, running, timeout)
        try:
            published = self._commit(session, lock_timeout)
        except BaseException as error:
            self._end_commit(session, error)
            running.set_exception(error)
            raise
        running.set_result(published)
        return published

    def abort(self, staging_id: str, timeout: float | None = None) -> None:
        """Drops a staging directory; one that is gone already is no error, one that cannot be removed is.

        One that is being committed is dropped by that, unless it is past the point where it can be: this waits for
        the end of it, as for that of another abort. StagingPublished when it became the image, and DeadlineExceeded
        when that is not known within `timeout` seconds. After what the datastore says, another abort tries again.
        """
        seconds = _MOST_WAIT_SECONDS if timeout is None else min(timeout, _MOST_WAIT_SECONDS)
        until = time.monotonic() + seconds
        while True:
            with self._changed:
                session = self._wait_while_ending(staging_id, until)
                if session is None:
                    if staging_id in self._published:
                        raise _published(staging_id, self._published[staging_id])
                    return
                running = session.commit if session.state is State.COMMITTING else None
                if running is not None:
                    session.abandoned = True
                else:
                    before, session.state = session.state, State.ENDING
                    try:
                        self._wait_for_calls(session)
                    except BaseException:
                        session.state = before
                        self._changed.notify_all()
                        raise
            if running is None:
                self._end(session)
                return
            try:
                image, _ = self._outcome(session, running, until - time.monotonic())
            except DeadlineExceeded:
                raise
            except Exception:
                continue  # the commit dropped it, or it is still there for this to do so
            raise _published(staging_id, image.key)

    def _wait_while_ending(self, staging_id: str, until: float) -> StagingSession | None:
        """The session, which nobody is removing; None when there is none. Call with the lock."""
        session = self._sessions.get(staging_id)
        if session is None:
            return None
        with session.staging.store.admission.stepping_aside() as step:
            while self._sessions.get(staging_id) is session and session.state is State.ENDING:
                left = until - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(
                        f"staging directory {staging_id} is being dropped, and that has not ended yet: ask again later"
                    )
                if not self._changed.wait(min(left, _LOOK_SECONDS)):
                    step()
        return self._sessions.get(staging_id)

    def _commit(self, session: StagingSession, lock_timeout: float | None) -> Published:
        def check() -> None:
            if session.abandoned:
                raise _gone(session.id)

        with self._changed:
            self._wait_for_calls(session)
        check()
        staging = session.staging
        if staging.damage is not None:
            raise _lost(session, staging.damage)
        try:
            staged = StagedDisk(staging)
            image = commit(staging, staged, check, lock_timeout=lock_timeout)
        except FileNotFoundError as error:
            raise _gone(session.id) from error
        except ImagesError as error:
            if staging.damage is not None:
                raise _lost(session, staging.damage) from error
            if not staging.held and isinstance(error, REFUSALS):
                # While its files were moved. Not to be tried again: it is gone, which says less than this.
                raise _lost(session, error) from error
            raise
        with self._changed:
            self._published[session.id] = image.key
            if len(self._published) > _REMEMBERED:
                self._published.popitem(last=False)
        self._end(session)
        return image, staged.renames

    def _end_commit(self, session: StagingSession, error: BaseException) -> None:
        """After a commit that failed: open again, or dropped when there is nothing to be mended, or nobody to do it."""
        with self._changed:
            staging = session.staging
            lost = isinstance(error, ImageAlreadyExists) or staging.damage is not None or not staging.held
            if not lost and (session.calls or not session.abandoned):
                session.state = State.OPEN
                session.abandoned = False
                session.expires = self._monotonic() + self.lease_seconds
                return
            session.state = State.ENDING
        self._drop(session)

    def _outcome(self, session: StagingSession, running: Future[Published], timeout: float | None) -> Published:
        """Of a commit, once it has ended. Whoever waits for it steps aside for other calls."""
        until = time.monotonic() + min(_MOST_WAIT_SECONDS if timeout is None else timeout, _MOST_WAIT_SECONDS)
        with session.staging.store.admission.stepping_aside() as step:
            while not wait((running,), min(max(until - time.monotonic(), 0), _LOOK_SECONDS)).done:
                if time.monotonic() >= until:
                    raise DeadlineExceeded(
                        f"staging directory {session.id} is being committed, and that has not ended yet: "
                        "ask again later"
                    )
                step()
        return running.result()

    def _renewed(self, store: ImageStore, image_id: str, request_id: str) -> StagingSession | None:
        """The session of that request id, its lease renewed; call with the lock."""
        known = self._by_request.get(request_id) if request_id else None
        if known is None or known.state in _GOING or known.staging.damage is not None:
            return None
        if known.staging.store is not store or known.staging.image_id != image_id:
            raise InvalidRequest(f"request id {request_id} was used for another image; take a new one")
        known.expires = self._monotonic() + self.lease_seconds
        return known

    def _enter(self, staging_id: str) -> StagingSession:
        with self._changed:
            session = self._find(staging_id)
            if session.state is State.COMMITTING:
                raise InvalidRequest(f"staging directory {staging_id} is being committed; wait for what comes of that")
            session.calls += 1
            return session

    def _find(self, staging_id: str) -> StagingSession:
        """Call with the lock."""
        session = self._sessions.get(staging_id)
        if session is None or session.state in _GOING:
            raise _gone(staging_id)
        if session.state is State.OPEN and session.staging.damage is not None:
            raise _lost(session, session.staging.damage)
        return session

    def _wait_for_calls(self, session: StagingSession) -> None:
        """Until none that names it runs, now that its state keeps new ones out; call with the lock.

        Steps aside for other calls meanwhile.
        """
        until = time.monotonic() + _CALLS_SECONDS
        with session.staging.store.admission.stepping_aside() as step:
            while not self._changed.wait_for(lambda: session.calls == 0, timeout=_LOOK_SECONDS):
                if time.monotonic() >= until:
                    raise InvalidRequest(f"staging directory {session.id} is being written to; end those calls first")
                step()

    def _close(self, store: ImageStore) -> None:
        """Drops what there is on one datastore, and waits for the commits that run there."""
        with self._changed:
            sessions = [session for session in self._sessions.values() if session.staging.store is store]
            committing = [session.commit for session in sessions if session.state is State.COMMITTING]
            for session in sessions:
                session.abandoned = True
            ending = [session for session in sessions if session.state in (State.OPEN, State.LEFT)]
            for session in ending:
                session.state = State.ENDING
            self._changed.wait_for(lambda: not any(s.calls for s in ending), timeout=_CANCELLED_CALLS_SECONDS)
        for session in ending:
            self._drop(session)
            session.staging.leave()
        wait(committing)  # each is gone with its commit, as it is abandoned

    def _drop(self, session: StagingSession) -> bool:
        """Ends it; what its datastore says against that is logged, so that the others are dropped all the same."""
        try:
            self._end(session)
        except Exception as error:
            _log.warning("staging not dropped id=%s error=%s", session.id, error)
            return False
        return True

    def _end(self, session: StagingSession) -> None:
        """Removes what is ENDING, or lets go of what was published, and forgets it.

        After an error it is LEFT: not forgotten, so that nobody is told that it is gone.
        """
        try:
            session.staging.abort()
        except BaseException:
            with self._changed:
                session.state = State.LEFT
                session.expires = self._monotonic() + min(self.lease_seconds, UNTOLD_SECONDS)
                self._changed.notify_all()
            raise
        with self._changed:
            self._sessions.pop(session.id, None)
            if self._by_request.get(session.request_id) is session:
                del self._by_request[session.request_id]
            self._changed.notify_all()

    def _drop_expired(self, store: ImageStore) -> None:
        silent = False
        while not self._stopping.wait(min(self.lease_seconds / 4, UNTOLD_SECONDS)):
            try:
                silent = self._drop_those_expired(store, silent)
            except Exception:
                # The thread must outlive a defect: without it nothing would be dropped here any more.
                _log.exception("leases not looked at datastore=%s", store.datastore.name)

    def _drop_those_expired(self, store: ImageStore, silent_before: bool) -> bool:
        """Whether the datastore was silent: no lease runs then, as who goes on with an import is refused, or waits."""
        silent = bool(store.admission.silence)
        now = self._monotonic()
        with self._changed:
            if silent_before or silent:
                self._begin_anew(store, now)
            expired = [
                session
                for session in self._sessions.values()
                if session.staging.store is store
                and session.state in (State.OPEN, State.LEFT)
                and session.expires < now
                and not session.calls
            ]
            for session in expired:
                session.state = State.ENDING
        for session in expired:
            if self._drop(session):
                _log.info("staging dropped image=%s", store.key(session.staging.image_id))
        # A removal that hung is silence, too, which nobody has seen from here.
        return silent or self._monotonic() - now > _SLOW_SECONDS

    def _begin_anew(self, store: ImageStore, now: float) -> None:
        """The leases on one datastore; call with the lock."""
        for session in self._sessions.values():
            if session.staging.store is store and session.state is State.OPEN:
                session.expires = max(session.expires, now + self.lease_seconds)


def _gone(staging_id: str) -> StagingNotFound:
    return StagingNotFound(
        f"there is no staging directory {staging_id[:64]!r}: it was published, dropped, or the sidecar was restarted; "
        "begin anew"
    )


def _lost(session: StagingSession, cause: ImagesError) -> ImagesError:
    """That it is dropped, since nobody knows what of it the disk has: an error that no client answers by committing."""
    kind = NoSpace if isinstance(cause, NoSpace) else StagingLost
    return kind(
        f"{session.staging.store.key(session.staging.image_id)} was not published: {cause.message}. What is staged "
        "cannot be relied on, so it is dropped: start the import again"
    )


def _published(staging_id: str, key: ImageKey) -> StagingPublished:
    return StagingPublished(
        f"staging directory {staging_id} cannot be aborted: it was published, as {key}; to undo that, delete the image"
    )
