"""Long work on a server: begun, followed until it has ended, and cancelled when nobody wants it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from pyVmomi import vim

from sidecar.errors import DatastoreUnavailable, ImagesError
from sidecar.vsphere import properties
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.faults import ServerUnreachable, error_of

_FIRST_LOOK_SECONDS = 0.02
_MOST_BETWEEN_LOOKS = 0.5
STALLED_SECONDS = 3600.0  # without a percent more; one of a large disk on a slow datastore takes many minutes
_CANCEL_SECONDS = 20.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Look:
    ended: bool
    percent: int
    fault: Exception | None


def run_task(
    connection: Connection,
    what: str,
    start: Callable[[vim.ServiceInstanceContent], vim.Task],
    follow: Callable[[int], None],
) -> None:
    """Runs a task to its end; its fault is the error, as after a call. `what` as for `Connection.call`.

    `follow` is told how far it is, in percent, some times a second: what that raises cancels the task, and passes when
    it has ended. DatastoreUnavailable when the server does not answer for longer than its timeout, has lost the task
    or makes no progress for an hour; it may go on with the task all the same.
    """
    task = connection.call(what, start)
    pause = _FIRST_LOOK_SECONDS
    answered = moved = time.monotonic()
    percent = 0
    while True:
        try:
            look = _look_at(connection, what, task)
        except ServerUnreachable:
            if time.monotonic() - answered > connection.server.timeout:
                raise
        else:
            answered = time.monotonic()
            if look.ended:
                if look.fault is not None:
                    raise error_of(look.fault, connection.server.name, what)
                return
            if look.percent > percent:
                percent, moved = look.percent, answered
        try:
            follow(percent)
            if time.monotonic() - moved > STALLED_SECONDS:
                raise DatastoreUnavailable(
                    f"server {connection.server.name}: cannot {what}: no progress in {STALLED_SECONDS:g} s, "
                    f"at {percent} %; look at the task there"
                )
        except BaseException:
            _cancel(connection, what, task)
            raise
        time.sleep(pause)
        pause = min(2 * pause, _MOST_BETWEEN_LOOKS)


def _look_at(connection: Connection, what: str, task: vim.Task) -> _Look:
    names = ("info.state", "info.progress", "info.error")
    found = connection.call(what, lambda content: properties.read(content, task, names), repeatable=True)
    state = found.get("info.state")
    fault = found.get("info.error") if state == "error" else None
    return _Look(state in ("success", "error"), found.get("info.progress") or 0, fault)


def _cancel(connection: Connection, what: str, task: vim.Task) -> None:
    """Cancels it and waits until it has ended, so that it writes no more; a server that does not do so is logged."""
    until = time.monotonic() + _CANCEL_SECONDS
    try:
        connection.call(f"cancel: {what}", lambda content: task.CancelTask(), repeatable=True)
        while not _look_at(connection, what, task).ended:
            if time.monotonic() > until:
                raise DatastoreUnavailable(f"it runs {_CANCEL_SECONDS:g} s after it was cancelled")
            time.sleep(_FIRST_LOOK_SECONDS)
    except (ImagesError, OSError) as error:
        _log.warning("task not cancelled server=%s task=%r error=%s", connection.server.name, what, error)
