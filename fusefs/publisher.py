"""Looks after staged images: renews their leases, and publishes or drops them when it is time.

One thread finds out what is due, another when leases are; what asks the sidecar is done by workers of each datastore,
since a disk that hangs may take half a minute of one of them.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from fusefs.deleting import Deletions
from fusefs.rules import Rules
from fusefs.staged import StagedDirectory, State
from fusefs.staging import StagingArea
from fusefs.workers import Workers
from sidecar.errors import ImagesError

_log = logging.getLogger(__name__)

# A staged image that nobody goes on with is dropped; its lease alone would keep it for ever.
ABANDONED_SECONDS = 600.0
# How often somebody looks whether it can still become an image. Until then it hides the one that has its name.
_LOOK_SECONDS = 2.0
# Between two questions what became of a publish: at first, and at most. Each of them may have it published.
_RESOLVE_SECONDS = 1.0
_MOST_RESOLVE_SECONDS = 30.0
_DELETIONS = "deletions"


class Publisher:
    """Owns its threads: `start`, then `stop`, which joins them."""

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
        self._workers = Workers(area.wake)
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
        self._workers.stop()

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
                if self._deletions_due(self._clock()):
                    self._workers.begin(_DELETIONS, _DELETIONS, self._deletions.run_due)
                for directory in self._area.directories:
                    if (action := self.due(directory)) is not None:
                        self._workers.begin(directory.ref.datastore, directory, action)
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
            if not self._workers.is_running(directory)  # which notifies in the end
            and (not directory.writers or directory.state is State.UNCERTAIN)
        ]
        due = self._deletions.next_due()
        if due is not None and not self._workers.is_running(_DELETIONS):
            pauses.append(due - now)
        return max(min(pauses), 0.05) if pauses else None

    def _pause_for(self, directory: StagedDirectory, now: float) -> float:
        if directory.state is State.UNCERTAIN:
            return directory.retry_at - now
        if directory.version != directory.tried_version or directory.maker_was_killed:
            return max(self._settle_seconds - directory.quiet_seconds, 0.25)
        if directory.retry_at:
            return directory.retry_at - now
        return min(ABANDONED_SECONDS - directory.quiet_seconds + 1, _LOOK_SECONDS)

    def _deletions_due(self, now: float) -> bool:
        due = self._deletions.next_due()
        return due is not None and due <= now

    def due(self, directory: StagedDirectory) -> Callable[[], object] | None:
        """What is to be done about a staged image now, which may take long; None for nothing.

        One that is complete and was left alone for the settle time is published, a given up one dropped.
        """
        now, quiet = self._clock(), directory.quiet_seconds
        if directory.state is State.UNCERTAIN:
            return partial(self._resolve, directory) if directory.retry_at <= now else None
        if directory.state is not State.OPEN or directory.writers or quiet < self._settle_seconds:
            return None
        if directory.spoiled:
            return partial(self._drop, directory, directory.spoiled)
        if self._area.is_taken(directory):
            return partial(self._give_up, directory, "there is another image of its name by now")
        if any(file.given_up for file in directory.files) and directory.maker_was_killed:
            # Whoever made the directory was killed while writing into it: an interrupted cp -r leaves nothing.
            return partial(self._drop, directory, "its maker was interrupted")
        if directory.version != directory.tried_version or 0 < directory.retry_at <= now:
            return partial(self._try, directory)
        if quiet > ABANDONED_SECONDS:
            why = f"nobody went on with it for {ABANDONED_SECONDS:g} s: {directory.reason}"
            return partial(self._give_up, directory, why)
        return None

    def _try(self, directory: StagedDirectory) -> None:
        directory.retry_at = 0.0
        version = directory.version
        if held := self._rules.held_back(directory):
            directory.reason = held.reason
            directory.tried_version = version
            if held.undecided:
                directory.retry_at = self._clock()
            else:
                if directory.version == version:
                    directory.let_go()
                _log.info("not published yet image=%s reason=%s", directory, held.reason)
            return
        try:
            self._area.publish(directory)
        except ImagesError as error:
            _log.warning("not published image=%s reason=%s cause=%s", directory, error.reason, error.message)
        except OSError as error:
            _log.info("not published image=%s cause=%s", directory, error)

    def _resolve(self, directory: StagedDirectory) -> None:
        try:
            self._area.resolve(directory)
        except ImagesError as error:
            _log.info("not resolved image=%s reason=%s cause=%s", directory, error.reason, error.message)
        if directory.state is State.UNCERTAIN:
            pause = max(2 * directory.resolve_pause, _RESOLVE_SECONDS)
            directory.resolve_pause = min(pause, _MOST_RESOLVE_SECONDS)
            directory.retry_at = self._clock() + directory.resolve_pause

    def _give_up(self, directory: StagedDirectory, why: str) -> None:
        """Drops what somebody may still wait for."""
        if self._drop(directory, why):
            _log.warning("dropped image=%s reason=%s", directory, why)

    def _drop(self, directory: StagedDirectory, reason: str) -> bool:
        """Whether it is gone; not when somebody opened a file of it just now."""
        try:
            self._area.abort(directory, reason)
        except OSError as error:
            _log.info("not dropped image=%s cause=%s", directory, error)
        return directory.state is State.GONE

    def _renew_loop(self) -> None:
        while not self._stop.wait(self._renewal_pause()):
            for datastore in {directory.ref.datastore for directory in self._area.directories}:
                key = ("leases", datastore)
                self._workers.begin(key, key, partial(self._renew, datastore))

    def _renew(self, datastore: str) -> None:
        for directory in self._area.directories:
            if directory.ref.datastore == datastore and not self._stop.is_set():
                try:
                    self._area.renew(directory)
                except ImagesError as error:
                    _log.warning("lease not renewed image=%s cause=%s", directory, error.message)

    def _renewal_pause(self) -> float:
        """A third of the shortest lease: two renewals may fail."""
        return min((directory.staging.lease_seconds / 3 for directory in self._area.directories), default=5.0)
