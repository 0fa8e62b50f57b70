"""A look at datastores of which any may hang: whoever looks is held up for as long as they answer, and no longer."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

from sidecar.images.store import ImageStore

_LOOK_SECONDS = 0.5  # between two looks at whether they answer

Found = TypeVar("Found")


def while_answering(stores: Sequence[ImageStore], look: Callable[[], Found]) -> Found:
    """What `look` returns or raises; DatastoreUnavailable when one of the datastores is known not to answer.

    The look has a thread, which stays in the kernel when one hangs, until that answers: what it does must need nothing
    of its caller, and change nothing.
    """
    outcome: Future[Found] = Future()

    def work() -> None:
        try:
            outcome.set_result(look())
        except BaseException as error:
            outcome.set_exception(error)

    _require_answering(stores)
    # Nobody can join it when it hangs, and the process ends without it.
    threading.Thread(target=work, name="look", daemon=True).start()
    while not wait((outcome,), _LOOK_SECONDS).done:
        _require_answering(stores)
    return outcome.result()


def check_all(stores: Sequence[ImageStore]) -> None:
    """That each can be used: DatastoreUnavailable."""

    def look() -> None:
        for store in stores:
            store.datastore.check()

    while_answering(stores, look)


def _require_answering(stores: Sequence[ImageStore]) -> None:
    for store in stores:
        store.admission.require_answering()
