"""The threads that keep the index true.

One follows the sidecar's watch stream, and finds a sidecar again that was gone; the other asks for the images of which
the stream may have told something old.
"""

import logging
import threading
import time
from collections.abc import Callable

from fusefs.doubts import Key
from fusefs.tree import Tree
from sidecar.client import Image, ImageRef, SidecarClient, WatchCall
from sidecar.errors import DatastoreNotFound, ImageNotFound, ImagesError

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
        on_lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`on_lost` is called when the stream ends, before it is tried again. `clock` is the time of day."""
        self._client = client
        self._tree = tree
        self._on_lost = on_lost
        self._clock = clock
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards _call
        self._call: WatchCall | None = None
        self._resume_token = ""
        self._threads = [
            threading.Thread(target=self._run, name="watch", daemon=True),
            threading.Thread(target=self._ask, name="ask", daemon=True),
        ]
        self.stale_since: float | None = None  # seconds since the epoch; None while the stream is up

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the stream and the threads."""
        self._stop.set()
        self._tree.end()
        with self._lock:
            if self._call is not None:
                self._call.cancel()
        for thread in self._threads:
            thread.join()

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
                self._tree.apply(answer)
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

    def _ask(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while (key := self._tree.next_doubted()) is not None:
            try:
                self._tree.settle(key, self._image(key))
                pause = _FIRST_PAUSE_SECONDS
                continue
            except ImagesError as error:
                _log.warning("image not asked for, trying again image=%s/%s cause=%s", *key, error.message)
            except Exception:
                _log.exception("image not asked for, trying again image=%s/%s", *key)
            self._tree.doubt(key)
            self._stop.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _image(self, key: Key) -> Image | None:
        try:
            return self._client.image(ImageRef(datastore=key[0], image_id=key[1]))
        except (ImageNotFound, DatastoreNotFound):
            return None

    def _note_stale(self, cause: str) -> None:
        self._on_lost()
        if self.stale_since is None and not self._stop.is_set():
            self.stale_since = self._clock()
            _log.warning("sidecar is away: serving from the index address=%s cause=%s", self._client.address, cause)

    def _away(self) -> float:
        return self._clock() - (self.stale_since or self._clock())
