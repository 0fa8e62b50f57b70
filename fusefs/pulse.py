"""Does the sidecar answer? Asked before every change, so that one that hangs is told from one that is busy.

The deadlines of changes do not tell: a commit or a purge may wait long for the disk. And a sidecar that hangs does what
it was sent when it wakes, long after the tool was told that nothing was done: so nothing is sent to it.
"""

import threading
import time
from collections.abc import Callable

from sidecar.client import SidecarClient
from sidecar.errors import SidecarUnavailable

ANSWER_SECONDS = 3.0
# One that did not answer is not waited for at every further file of the same rm -r: it answers at once when it is back.
_REMEMBERED_SECONDS = 3.0
_SECOND_LOOK_SECONDS = 0.2


class Pulse:
    """`clock` is monotonic, `wall_clock` the time of day. Safe to share between threads."""

    def __init__(
        self,
        client: SidecarClient,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()  # guards what follows
        self._silent_until = 0.0
        self.silent_since: float | None = None  # seconds since the epoch; None when it answered the last time

    def require(self, seconds: float = ANSWER_SECONDS) -> None:
        """Returns when the sidecar answers; SidecarUnavailable when it does not within so many seconds, or less."""
        with self._lock:
            known_silent = self._clock() < self._silent_until
        try:
            self._client.wait_ready(_SECOND_LOOK_SECONDS if known_silent else seconds)
        except SidecarUnavailable:
            with self._lock:
                if not known_silent:
                    self._silent_until = self._clock() + _REMEMBERED_SECONDS
                if self.silent_since is None:
                    self.silent_since = self._wall_clock()
            raise
        with self._lock:
            self.silent_since = None
