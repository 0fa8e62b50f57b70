"""A look at the VMs of all datastores, where any read may hang: whoever looks waits for a while, and not for ever.

Of a datastore that hangs it is known after some seconds that it does not answer. A disk of a VM may be anywhere, as on
a file server that is gone and no datastore: nobody watches that, so there is a limit of time, too.
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Self, TypeVar

from sidecar.errors import DatastoreUnavailable, UseUnknown
from sidecar.images.store import ImageStore

# For how long all of it may take while an image's lock is held, as whoever makes a VM of that waits for it; else each
# step.
LIMIT_SECONDS = 300.0

HUNG_SECONDS = 10.0  # since when a step that was left hangs: a younger one may be about to end
_PAUSE_SECONDS = 0.5  # between two looks at whether to go on waiting

Found = TypeVar("Found")


class VmLook:
    """A thread that does one step after the other, for its owner, who waits for each. For a `with` of one thread.

    A step that hangs keeps the thread, which its owner leaves then: so a step must need nothing of its owner, and
    change nothing that lasts: a file that it makes for a moment may be left, as by a crash. While one is left no other
    look begins there, or each would leave one more.
    """

    def __init__(self, stores: Sequence[ImageStore], check: Callable[[], None], *, locked: bool) -> None:
        """What `check` raises ends it. `locked`: an image's lock is held meanwhile."""
        self._stores, self._check = stores, check
        self._until = monotonic() + LIMIT_SECONDS if locked else math.inf
        self._steps: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def __enter__(self) -> Self:
        """DatastoreUnavailable when an earlier look hangs still."""
        self._require_answering()
        left = {step: (store, what) for store in self._stores for step, what in store.steps_left.copy().items()}
        while pending := wait(left, _PAUSE_SECONDS).not_done:
            for store, (what, began) in map(left.__getitem__, pending):
                self._require_young(store, what, began)
            self._require_answering()
            self._check()
        # A daemon, as nobody can join it while it hangs: the interpreter does not wait for it at its end.
        threading.Thread(target=self._work, name="look", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._steps.put(None)

    def at(self, store: ImageStore, what: str, step: Callable[[], Found]) -> Found:
        """What the step returns or raises, which looks at that of a datastore.

        DatastoreUnavailable when one of the datastores is known not to answer, UseUnknown when it takes too long.
        """
        outcome: Future[Found] = Future()

        def work() -> None:
            try:
                outcome.set_result(step())
            except BaseException as error:
                outcome.set_exception(error)

        self._go_on(store, what, self._until)
        began = monotonic()
        until = min(self._until, began + LIMIT_SECONDS)
        self._steps.put(work)
        try:
            while not wait((outcome,), _PAUSE_SECONDS).done:
                self._go_on(store, what, until)
        except BaseException:
            store.steps_left[outcome] = what, began
            outcome.add_done_callback(store.steps_left.pop)
            raise
        return outcome.result()

    def _go_on(self, store: ImageStore, what: str, until: float) -> None:
        self._require_answering()
        self._check()
        if monotonic() >= until:
            all_of_it = ", nor all VMs, and an image's lock is held no longer for that" if until == self._until else ""
            raise UseUnknown(
                f"datastore {store.datastore.name}: {what} was not read within {LIMIT_SECONDS:g} s{all_of_it}: it is "
                "not known which images are in use, so none can be purged; look what is slow, or hangs, and try again"
            )

    @staticmethod
    def _require_young(store: ImageStore, what: str, began: float) -> None:
        if monotonic() - began >= HUNG_SECONDS:
            raise DatastoreUnavailable(
                f"datastore {store.datastore.name}: an earlier look at {what} hangs still, and it is not known "
                "which images are in use; look which file server or device does not answer there, and try again"
            )

    def _require_answering(self) -> None:
        for store in self._stores:
            store.admission.require_answering()

    def _work(self) -> None:
        while step := self._steps.get():
            step()
