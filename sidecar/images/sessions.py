"""Staging directories that clients fill over several calls: found by id, kept by a lease, dropped when it ends."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sidecar.errors import ImageAlreadyExists, InvalidRequest, StagingNotFound
from sidecar.images.committing import StagedDisk, commit
from sidecar.images.image import Image
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore

_log = logging.getLogger(__name__)


@dataclass
class StagingSession:
    """A staging directory and who is busy with it. The fields are guarded by the lock of the sessions."""

    staging: StagingDirectory
    request_id: str
    expires: float
    calls: int = 0
    closing: bool = False

    @property
    def id(self) -> str:
        return self.staging.token


class StagingSessions:
    """All staging directories that clients fill. Owns the thread that drops the abandoned ones."""

    def __init__(self, lease_seconds: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.lease_seconds = lease_seconds
        self._monotonic = monotonic
        self._changed = threading.Condition()  # guards what follows, and the sessions' fields
        self._sessions: dict[str, StagingSession] = {}
        self._by_request: dict[str, StagingSession] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._drop_abandoned, name="staging-leases")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Drops every staging directory; calls must have ended."""
        self._stopping.set()
        if self._thread.ident:
            self._thread.join()
        with self._changed:
            sessions = list(self._sessions.values())
        for session in sessions:
            self._drop(session)

    def create(self, store: ImageStore, image_id: str, expected_bytes: int, request_id: str) -> StagingSession:
        """A new staging directory for an image that is not there.

        For the request id of one that there is, that one, its lease renewed.
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
        with self._changed:
            known = self._renewed(store, image_id, request_id)
            if known is None:
                self._sessions[session.id] = session
                if request_id:
                    self._by_request[request_id] = session
                return session
        staging.abort()  # the same call came twice, at the same time
        return known

    def store(self, staging_id: str) -> ImageStore | None:
        """Where the staging directory is; None when there is none."""
        with self._changed:
            session = self._sessions.get(staging_id)
            return session.staging.store if session else None

    @contextmanager
    def using(self, staging_id: str) -> Iterator[StagingDirectory]:
        """The staging directory, which is neither committed nor dropped before the block ends; StagingNotFound."""
        session = self._enter(staging_id)
        try:
            yield session.staging
        except FileNotFoundError as error:
            # Taken away by somebody who does not heed the lock: what was staged is lost.
            raise _gone(staging_id) from error
        finally:
            with self._changed:
                session.calls -= 1
                session.expires = self._monotonic() + self.lease_seconds
                self._changed.notify_all()

    def commit(self, staging_id: str) -> tuple[Image, dict[str, str]]:
        """Publishes; returns the image and the new names of the staged files.

        After an error the staging directory is as it was: it can be mended, and committed again. Gone is it after
        ImageAlreadyExists, and when its files could not be moved into the image's place.
        """
        session = self._close_session(staging_id)
        try:
            staged = StagedDisk(session.staging)
            image = commit(session.staging, staged)
        except BaseException as error:
            if isinstance(error, ImageAlreadyExists) or not session.staging.held:
                self._drop(session)
            else:
                self._reopen(session)
            if isinstance(error, FileNotFoundError):
                raise _gone(staging_id) from error
            raise
        self._end(session)
        return image, staged.renames

    def abort(self, staging_id: str) -> None:
        """Drops a staging directory; one that is gone already is no error."""
        try:
            session = self._close_session(staging_id)
        except StagingNotFound:
            return
        self._end(session)

    def _renewed(self, store: ImageStore, image_id: str, request_id: str) -> StagingSession | None:
        """The session of that request id, its lease renewed; call with the lock."""
        known = self._by_request.get(request_id) if request_id else None
        if known is None or known.closing:
            return None
        if known.staging.store is not store or known.staging.image_id != image_id:
            raise InvalidRequest(f"request id {request_id} was used for another image; take a new one")
        known.expires = self._monotonic() + self.lease_seconds
        return known

    def _enter(self, staging_id: str) -> StagingSession:
        with self._changed:
            session = self._sessions.get(staging_id)
            if session is None or session.closing:
                raise _gone(staging_id)
            session.calls += 1
            return session

    def _close_session(self, staging_id: str) -> StagingSession:
        """Keeps new calls out, and waits for those that run."""
        with self._changed:
            session = self._sessions.get(staging_id)
            if session is None or session.closing:
                raise _gone(staging_id)
            session.closing = True
            if not self._changed.wait_for(lambda: session.calls == 0, timeout=30):
                session.closing = False
                raise InvalidRequest(f"staging directory {staging_id} is being written to; end those calls first")
            return session

    def _reopen(self, session: StagingSession) -> None:
        with self._changed:
            session.closing = False
            session.expires = self._monotonic() + self.lease_seconds

    def _drop(self, session: StagingSession) -> None:
        """Ends it; what its datastore says against that is logged, so that the others are dropped all the same."""
        try:
            self._end(session)
        except Exception as error:
            _log.warning("staging not dropped id=%s error=%s", session.id, error)

    def _end(self, session: StagingSession) -> None:
        with self._changed:
            self._sessions.pop(session.id, None)
            if self._by_request.get(session.request_id) is session:
                del self._by_request[session.request_id]
        session.staging.abort()

    def _drop_abandoned(self) -> None:
        while not self._stopping.wait(min(self.lease_seconds / 4, 30.0)):
            now = self._monotonic()
            with self._changed:
                abandoned = [s for s in self._sessions.values() if s.expires < now and not s.calls and not s.closing]
                for session in abandoned:
                    session.closing = True
            for session in abandoned:
                _log.info("staging dropped image=%s/%s", session.staging.store.datastore.name, session.staging.image_id)
                self._drop(session)


def _gone(staging_id: str) -> StagingNotFound:
    return StagingNotFound(
        f"there is no staging directory {staging_id[:64]!r}: it was published, dropped, or the sidecar was restarted; "
        "begin anew"
    )
