"""The threads that look after staged images: one renews their leases, one publishes or drops them when it is time."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from fusefs.deleting import Deletions
from fusefs.errors import is_transient
from fusefs.rules import Rules
from fusefs.staged import StagedDirectory, State
from fusefs.staging import StagingArea
from sidecar.errors import ImageAlreadyExists, ImagesError, StagingNotFound

_log = logging.getLogger(__name__)

# A staged image that nobody goes on with is dropped; its lease alone would keep it for ever.
ABANDONED_SECONDS = 600.0
_RETRY_SECONDS = 5.0
_RESOLVE_SECONDS = 1.0


class Publisher:
    """Owns both threads: `start`, then `stop`, which joins them."""

    def __init__(
        self,
        area: StagingArea,
        rules: Rules,
        deletions: Deletions,
        settle_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._area = area
        self._rules = rules
        self._deletions = deletions
        self._settle_seconds = settle_seconds
        self._clock = clock
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._publish_loop, name="publish", daemon=True),
            threading.Thread(target=self._renew_loop, name="lease", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._area.serving_ended(self._settle_seconds)
        self._stop.set()
        self._area.wake()
        for thread in self._threads:
            thread.join()

    def wait_settled(self, seconds: float) -> None:
        """Returns when no staged image waits to be published for being left alone; at the latest after `seconds`."""
        until = self._clock() + seconds
        while any(map(self._is_settling, self._area.directories)) and self._clock() < until:
            if self._stop.wait(0.05):
                return

    def _is_settling(self, directory: StagedDirectory) -> bool:
        if directory.state is not State.OPEN or directory.writers or directory.tried_version == directory.version:
            return False
        return not self._rules.held_back(directory)

    def _publish_loop(self) -> None:
        while not self._stop.is_set():
            try:
                self._deletions.run_due()
                for directory in self._area.directories:
                    self.look_at(directory)
            except Exception:
                _log.exception("publisher failed: going on with the next round")
            with self._area.work:
                if not self._stop.is_set():
                    self._area.work.wait(self._pause())

    def _pause(self) -> float | None:
        """Until something may be due; None while there is nothing to look after, so that an idle mount sleeps.

        Asked with `work` held: whoever changes something notifies afterwards, and so never between this and the wait.
        """
        now = self._clock()
        pauses = [
            self._pause_for(directory, now)
            for directory in self._area.directories
            if not directory.writers or directory.state is State.UNCERTAIN
        ]
        if (due := self._deletions.next_due()) is not None:
            pauses.append(due - now)
        return max(min(pauses), 0.05) if pauses else None

    def _pause_for(self, directory: StagedDirectory, now: float) -> float:
        if directory.state is State.UNCERTAIN:
            return directory.retry_at - now
        if directory.version != directory.tried_version or directory.maker_was_killed:
            return max(self._settle_seconds - directory.quiet_seconds, 0.25)
        if directory.retry_at:
            return directory.retry_at - now
        return ABANDONED_SECONDS - directory.quiet_seconds + 1

    def look_at(self, directory: StagedDirectory) -> None:
        """Publishes a staged image that is complete and was left alone for the settle time, or drops a given up one."""
        quiet = directory.quiet_seconds
        if directory.state is State.UNCERTAIN:
            if directory.retry_at <= self._clock():
                self._resolve(directory)
            return
        if directory.state is not State.OPEN or directory.writers or quiet < self._settle_seconds:
            return
        if any(file.given_up for file in directory.files) and directory.maker_was_killed:
            # Whoever made the directory was killed while writing into it: an interrupted cp -r leaves nothing.
            self._drop(directory, "its maker was interrupted")
        elif directory.version != directory.tried_version or 0 < directory.retry_at <= self._clock():
            self._try(directory)
        if directory.state is State.OPEN and quiet > ABANDONED_SECONDS:
            self._drop(directory, f"abandoned: {directory.reason}")

    def _try(self, directory: StagedDirectory) -> None:
        directory.retry_at = 0.0
        version = directory.version
        if held := self._rules.held_back(directory):
            directory.reason = held.reason
            directory.tried_version = version
            if held.undecided:
                directory.retry_at = self._clock()
            else:
                _log.info("not published yet image=%s reason=%s", directory, held.reason)
            return
        try:
            self._area.publish(directory)
        except ImagesError as error:
            if is_transient(error):
                directory.retry_at = self._clock() + _RETRY_SECONDS
            _log.warning("not published image=%s reason=%s cause=%s", directory, error.reason, error.message)
        except OSError as error:
            _log.info("not published image=%s cause=%s", directory, error)

    def _resolve(self, directory: StagedDirectory) -> None:
        directory.retry_at = self._clock() + _RESOLVE_SECONDS
        try:
            self._area.resolve(directory)
        except ImagesError as error:
            _log.info("not resolved image=%s reason=%s cause=%s", directory, error.reason, error.message)

    def _drop(self, directory: StagedDirectory, reason: str) -> None:
        with contextlib.suppress(OSError):  # somebody opened a file of it just now
            self._area.abort(directory, reason)

    def _renew_loop(self) -> None:
        while not self._stop.wait(self._renewal_pause()):
            for directory in self._area.directories:
                try:
                    directory.staging.renew()
                except (StagingNotFound, ImageAlreadyExists) as error:
                    self._area.lost(directory, error.message)
                except ImagesError as error:
                    _log.warning("lease not renewed image=%s cause=%s", directory, error.message)

    def _renewal_pause(self) -> float:
        """A third of the shortest lease: two renewals may fail."""
        return min((directory.staging.lease_seconds / 3 for directory in self._area.directories), default=5.0)
