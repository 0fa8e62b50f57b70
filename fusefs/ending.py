"""The end of a mount does not wait for a sidecar that hangs, whatever was asked of it before."""

import contextlib
import logging
import threading

from sidecar.client import SidecarClient
from sidecar.errors import ImagesError, SidecarUnavailable

_log = logging.getLogger(__name__)

# A sidecar that is being restarted is there again by then.
SILENT_SECONDS = 5.0
_PAUSE_SECONDS = 0.5


class Ending:
    """Owns a thread: `begin`, then `end`, which joins it. Calls have deadlines for a busy sidecar: minutes, some."""

    def __init__(self, client: SidecarClient) -> None:
        self._client = client
        self._over = threading.Event()
        self._lock = threading.Lock()  # guards the thread
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """From here on a sidecar that does not answer ends every call, and is not called any more."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="ending", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """Nothing is asked of the sidecar any more."""
        self._over.set()
        self._client.cancel_calls()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(ImagesError):  # cancelled by the end
            while not self._over.is_set():
                try:
                    self._client.wait_ready(SILENT_SECONDS)
                except SidecarUnavailable as error:
                    _log.warning("ending without the sidecar cause=%s", error.message)
                    self._client.cancel_calls()
                    return
                self._over.wait(_PAUSE_SECONDS)
