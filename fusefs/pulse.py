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
    """`clock` is monotonic. Safe to share between threads."""

    def __init__(self, client: SidecarClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._lock = threading.Lock()  # guards _silent_until
        self._silent_until = 0.0

    def require(self, seconds: float = ANSWER_SECONDS) -> None:
        """Returns when the sidecar answers; SidecarUnavailable when it does not within so many seconds, or less."""
        with self._lock:
            known_silent = self._clock() < self._silent_until
        try:
            self._client.wait_ready(_SECOND_LOOK_SECONDS if known_silent else seconds)
        except SidecarUnavailable:
            if not known_silent:
                with self._lock:
                    self._silent_until = self._clock() + _REMEMBERED_SECONDS
            raise
