"""Ending parts side by side: one that hangs with its datastore keeps no other from its clean end."""

import logging
import threading
from collections.abc import Callable, Iterable

_log = logging.getLogger(__name__)


def end_all(ends: Iterable[Callable[[], object]]) -> None:
    """Calls each in a thread of its own, and returns when all have ended; what one raises is logged."""
    threads = [threading.Thread(target=_end, args=(end,), name="end") for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _end(end: Callable[[], object]) -> None:
    try:
        end()
    except Exception:
        # The others are ended all the same.
        _log.exception("not closed")
