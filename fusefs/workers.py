"""Threads for work that may wait long for one datastore, so that no other one's waits for it."""

import logging
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

_log = logging.getLogger(__name__)

# Of one group: so many images may have a lock or a disk that is waited for before others of their datastore wait, too.
_MOST_THREADS = 4
# A piece of work that fails unexpectedly is begun again by whoever sees it undone: not at once, for ever.
_FAILURE_SECONDS = 5.0


class Workers:
    """Owns the threads of all groups; `stop` joins them. Safe to share between threads."""

    def __init__(self, ended: Callable[[], None]) -> None:
        """`ended` is called after each piece of work."""
        self._ended = ended
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards what follows
        self._pools: dict[Hashable, ThreadPoolExecutor] = {}
        self._running: set[Hashable] = set()

    def is_running(self, key: Hashable) -> bool:
        """Whether the work of that key has begun, or waits for a thread, and has not ended."""
        return key in self._running

    def begin(self, group: Hashable, key: Hashable, work: Callable[[], object]) -> None:
        """Has the work done by a thread of the group, unless that of the same key is running; not after `stop`."""
        with self._lock:
            if self._stop.is_set() or key in self._running:
                return
            pool = self._pools.get(group)
            if pool is None:
                pool = self._pools[group] = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="publish")
            self._running.add(key)
            pool.submit(self._do, key, work)

    def stop(self) -> None:
        """What has begun is done to its end, what waits for a thread is not done."""
        with self._lock:
            self._stop.set()
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def _do(self, key: Hashable, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:
            _log.exception("work failed: it is begun again")
            self._stop.wait(_FAILURE_SECONDS)
        finally:
            with self._lock:
                self._running.discard(key)
            self._ended()
