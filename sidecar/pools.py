"""Pools of threads that the system shows under a name, as in `top -H`: which of a sidecar's threads are a pool's?"""

import contextlib
from concurrent.futures import ThreadPoolExecutor

PREFIX = "pool-"


class NamedPool(ThreadPoolExecutor):
    """Keeps its threads once it needed them: as many as there was to do at once, at most `threads`."""

    def __init__(self, threads: int, name: str) -> None:
        """The kernel keeps 10 bytes of `name`."""
        super().__init__(threads, thread_name_prefix=name, initializer=_show, initargs=(name,))


def _show(name: str) -> None:
    with contextlib.suppress(OSError), open("/proc/thread-self/comm", "w", encoding="utf-8") as file:
        file.write(PREFIX + name)
