"""Long work on a server: begun, followed until it has ended, and cancelled when nobody wants it."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from pyVmomi import vim, vmodl

from sidecar.errors import DatastoreUnavailable, ImagesError
from sidecar.vsphere import properties
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.faults import ServerUnreachable, error_of

_FIRST_LOOK_SECONDS = 0.02
_MOST_BETWEEN_LOOKS = 0.5
STALLED_SECONDS = 3600.0  # without a percent more; one of a large disk on a slow datastore takes many minutes
CANCEL_SECONDS = 20.0
# For an answer, where the server was just given up: it may only have been slow.
_LAST_WORD_SECONDS = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Look:
    ended: bool
    percent: int
    fault: Exception | None
    result: Any = None


def run_task(
    connection: Connection,
    what: str,
    start: Callable[[vim.ServiceInstanceContent], vim.Task],
    follow: Callable[[int], None] = lambda percent: None,
) -> Any:
    """Runs a task to its end, and gives its result; its fault is the error, as after a call. `what` as for
    `Connection.call`.

    `follow` is told how far it is, in percent, some times a second: what that raises cancels the task, and passes when
    it has ended. DatastoreUnavailable when the server does not answer for longer than its timeout, has lost the task
    or makes no progress for an hour; it may go on with the task all the same.
    """
    task = connection.call(what, start)
    try:
        end = _wait_for_end(connection, what, task, follow)
    except ServerUnreachable:
        _cancel_unreachable(connection, what, task)
        raise
    except BaseException:
        _cancel(connection, what, task)
        raise
    if end.fault is not None:
        raise error_of(end.fault, connection.server.name, what)
    return end.result


def _wait_for_end(connection: Connection, what: str, task: vim.Task, follow: Callable[[int], None]) -> _Look:
    """How it ended. A server that cannot tell is asked again, until its timeout."""
    pause = _FIRST_LOOK_SECONDS
    answered = moved = time.monotonic()
    percent = 0
    while True:
        try:
            look = _look_at(connection, what, task)
        except DatastoreUnavailable:
            if time.monotonic() - answered > connection.server.timeout:
                raise
        else:
            answered = time.monotonic()
            if look.ended:
                return look
            if look.percent > percent:
                percent, moved = look.percent, answered
        follow(percent)
        if time.monotonic() - moved > STALLED_SECONDS:
            raise DatastoreUnavailable(
                f"server {connection.server.name}: cannot {what}: no progress in {STALLED_SECONDS:g} s, "
                f"at {percent} %; look at the task there"
            )
        time.sleep(pause)
        pause = min(2 * pause, _MOST_BETWEEN_LOOKS)


def _look_at(connection: Connection, what: str, task: vim.Task) -> _Look:
    def read(content: vim.ServiceInstanceContent) -> _Look:
        try:
            found = properties.read(content, task, ("info.state", "info.progress", "info.error", "info.result"))
        except vmodl.fault.ManagedObjectNotFound as lost:
            return _Look(True, 0, lost)
        match found.get("info.state"):
            case "success":
                return _Look(True, 100, None, found.get("info.result"))
            case "error":
                untold = vmodl.fault.SystemError(msg="the task failed, and the server tells no reason")
                return _Look(True, 0, found.get("info.error") or untold)
        return _Look(False, found.get("info.progress") or 0, None)

    return connection.call(what, read, repeatable=True)


def _cancel(connection: Connection, what: str, task: vim.Task) -> None:
    """Cancels it and waits until it has ended, so that it writes no more; a server that does not do so is logged."""
    until = time.monotonic() + CANCEL_SECONDS

    def require_time_left(percent: int) -> None:
        if time.monotonic() > until:
            raise DatastoreUnavailable(f"it runs {CANCEL_SECONDS:g} s after it was to be cancelled")

    # Also one that the server does not cancel, or whose answer was lost, comes to an end.
    _request_cancel(connection, what, task)
    try:
        require_time_left(0)
        _wait_for_end(connection, what, task, require_time_left)
    except (ImagesError, OSError) as error:
        _log.warning("task not ended server=%s task=%r error=%s", connection.server.name, what, error)


def _cancel_unreachable(connection: Connection, what: str, task: vim.Task) -> None:
    """One try, by a session of its own: the connection's calls have the long timeout."""
    server = connection.server
    with closing(Connection(replace(server, timeout=min(server.timeout, _LAST_WORD_SECONDS)))) as impatient:
        _request_cancel(impatient, what, task)


def _request_cancel(connection: Connection, what: str, task: vim.Task) -> None:
    def cancel(content: vim.ServiceInstanceContent) -> None:
        vim.Task(task._GetMoId(), content.propertyCollector._GetStub()).CancelTask()

    try:
        connection.call(f"cancel: {what}", cancel, repeatable=True)
    except (ImagesError, OSError) as error:
        _log.warning("task not cancelled server=%s task=%r error=%s", connection.server.name, what, error)
