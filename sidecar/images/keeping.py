"""What is done again and again without being asked for: a thread that does its tasks when they are due."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidecar.errors import ImagesError, OperationCancelled
from sidecar.images.runs import Clock

# After a task that failed: not before long, also where it is done once a week.
RETRY_SECONDS = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """`work` is due `first` seconds after the start, and then `interval` seconds after its end. It gets what to call
    again and again meanwhile: that raises OperationCancelled when it has to end."""

    name: str
    interval: float
    work: Callable[[Callable[[], None]], object]
    first: float = 0.0


class Keeper:
    """The tasks of one datastore, one after the other. Owns the thread: a datastore that hangs keeps no other's."""

    def __init__(self, datastore: str, tasks: Sequence[Task], clock: Clock) -> None:
        self._datastore = datastore
        self._clock = clock
        self._stop = threading.Event()
        self._due = {task: clock.monotonic() + task.first for task in tasks}
        self._thread = threading.Thread(target=self._run, name=f"keeper-{datastore}")

    def start(self) -> None:
        if self._due:
            self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            task = min(self._due, key=lambda each: self._due[each])
            left = self._due[task] - self._clock.monotonic()
            if left > 0:
                self._clock.wait(self._stop, left)
                continue
            interval = task.interval
            try:
                task.work(self._check)
            except OperationCancelled:
                return
            except ImagesError as error:
                _log.warning("%s failed datastore=%s error=%s", task.name, self._datastore, error)
                interval = min(interval, RETRY_SECONDS)
            except Exception:
                # The thread must outlive a defect: without it nothing would be freed any more, and nobody would know.
                _log.exception("%s failed datastore=%s", task.name, self._datastore)
            self._due[task] = self._clock.monotonic() + interval

    def _check(self) -> None:
        if self._stop.is_set():
            raise OperationCancelled("the sidecar is shutting down")
