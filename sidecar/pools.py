"""Pools of threads that the system shows under a name, as in `top -H`: which of a sidecar's threads are a pool's?"""

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

PREFIX = "pool-"


class NamedPool(ThreadPoolExecutor):
    """Keeps its threads once it needed them: as many as there was to do at once, at most `threads`.

    Each has a name of its own, since the kernel gives a new thread that of the one that starts it.
    """

    def __init__(self, threads: int, name: str) -> None:
        """The kernel keeps 15 bytes, with the prefix and a number."""
        super().__init__(threads, thread_name_prefix=name, initializer=_show, initargs=(name, itertools.count()))


def _show(name: str, numbers: Iterator[int]) -> None:
    with contextlib.suppress(OSError), open("/proc/thread-self/comm", "w", encoding="utf-8") as file:
        file.write(f"{PREFIX}{name}-{next(numbers)}")
