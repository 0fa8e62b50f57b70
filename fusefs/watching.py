"""The thread that keeps the index true: follows the sidecar's watch stream, and finds a sidecar again that was gone."""

import logging
import threading
import time
from collections.abc import Callable

from fusefs.tree import IndexedImage, Key, Tree
from sidecar.client import ImageRef, SidecarClient, WatchCall
from sidecar.errors import ImageNotFound, ImagesError

_log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 2.0


class Watcher:
    """Feeds a tree until it is stopped. While the sidecar is away the tree goes on showing what was known last."""

    def __init__(
        self,
        client: SidecarClient,
        tree: Tree,
        *,
        on_change: Callable[[str, IndexedImage], None] = lambda datastore, image: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`on_change` is called with each image that changed or went, as it was; `clock` is the time of day."""
        self._client = client
        self._tree = tree
        self._on_change = on_change
        self._clock = clock
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards _call
        self._call: WatchCall | None = None
        self._resume_token = ""
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.stale_since: float | None = None  # seconds since the epoch; None while the stream is up

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the stream and the thread."""
        self._stop.set()
        with self._lock:
            if self._call is not None:
                self._call.cancel()
        self._thread.join()

    def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stop.is_set():
            try:
                if self._follow():
                    pause = _FIRST_PAUSE_SECONDS
                self._note_stale("the sidecar ended the stream")
            except ImagesError as error:
                self._note_stale(error.message)
            except Exception:
                _log.exception("watch failed: starting again with everything")
                self._resume_token = ""
            self._stop.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _follow(self) -> bool:
        """Takes in answers until the stream ends; returns whether there were any."""
        call = self._client.watch(resume_token=self._resume_token)
        with self._lock:
            self._call = call
        heard = False
        self._tree.forget_half_snapshot()
        try:
            if self._stop.is_set():
                return False
            for answer in call:
                heard = True
                for key in self._tree.apply(answer):
                    self._resolve(key)
                for datastore, image in self._tree.take_changes():
                    self._on_change(datastore, image)
                if answer.resume_token:  # not in every part of a long answer
                    self._resume_token = answer.resume_token
                if self.stale_since is not None:
                    _log.info("sidecar is back address=%s away_seconds=%.1f", self._client.address, self._away())
                    self.stale_since = None
        except ImagesError:
            if not heard:
                # A token that this sidecar cannot use must not keep us out.
                self._resume_token = ""
            raise
        finally:
            call.cancel()
        return heard

    def _resolve(self, key: Key) -> None:
        """Asks for an image whose event may be older than what this mount did to it."""
        asked_at = self._tree.now()
        try:
            image = self._client.image(ImageRef(datastore=key[0], image_id=key[1]))
        except ImageNotFound:
            self._tree.settle(key, asked_at, None)
        except ImagesError as error:
            _log.warning("image not asked for image=%s/%s cause=%s", *key, error.message)
        else:
            self._tree.settle(key, asked_at, image)

    def _note_stale(self, cause: str) -> None:
        if self.stale_since is None and not self._stop.is_set():
            self.stale_since = self._clock()
            _log.warning("sidecar is away: serving from the index address=%s cause=%s", self._client.address, cause)

    def _away(self) -> float:
        return self._clock() - (self.stale_since or self._clock())
