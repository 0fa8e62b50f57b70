"""Long work on a server: begun, followed until it has ended, and cancelled when nobody wants it."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pyVmomi import vim, vmodl

from sidecar.errors import DatastoreUnavailable, ImagesError
from sidecar.vsphere import properties
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.faults import NoConnectionError, ServerUnreachable, error_of

_FIRST_LOOK_SECONDS = 0.02
_MOST_BETWEEN_LOOKS = 0.5
# Without a percent more; and for as long as a percent takes at so many bytes a second, as on a slow NFS server.
STALLED_SECONDS = 3600.0
_SLOWEST = 1 << 20
# In the server's queue, where nothing goes on: it lets few tasks run at a time, and each may take hours.
QUEUED_SECONDS = 86_400.0
CANCEL_SECONDS = 20.0
# For an answer, where the server was just given up: it may only have been slow.
_LAST_WORD_SECONDS = 2.0
# Answers to the request for a task which leave open whether there is one now.
_UNCLEAR = (vmodl.fault.SystemError, vmodl.fault.HostCommunication)
# What a task ends with before it does anything. Not what is a kind of these: a datastore may go away in its midst.
_REFUSED = (vim.fault.InvalidDatastore, vim.fault.InvalidDatastorePath, vim.fault.NoPermission)

Start: TypeAlias = Callable[[vim.ServiceInstanceContent], vim.Task]
Follow: TypeAlias = Callable[[int], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Look:
    ended: bool
    percent: int = 0
    queued: bool = False
    fault: Exception | None = None
    result: Any = None


class ServerTask:
    """One task, from before the server has it. `what` as for `Connection.call`; `size`: bytes that it has to move.

    `begun`: the server may have done some of it, or may do so still, also when it was given up.
    """

    def __init__(self, connection: Connection, what: str, start: Start, size: int = 0) -> None:
        self.begun = False
        self._connection, self._what, self._start = connection, what, start
        self._stalled_seconds = STALLED_SECONDS + size / 100 / _SLOWEST

    def run(self, follow: Follow) -> Any:
        """To its end, and what it gives; its fault is the error, as after a call.

        `follow` is told how far it is, in percent, some times a second: what that raises cancels the task, and passes
        when it has ended. DatastoreUnavailable when the server does not answer for longer than its timeout, has lost
        the task, does not begin with it in a day, or makes no progress for more than an hour.
        """
        connection, what = self._connection, self._what
        task = connection.call(what, self._ask)
        self.begun = True
        try:
            ended = self._wait_for_end(task, follow)
        except ServerUnreachable:
            _cancel_unreachable(connection, what, task)
            raise
        except BaseException:
            self._cancel(task)
            raise
        if ended.fault is not None:
            self.begun = type(ended.fault) not in _REFUSED
            raise error_of(ended.fault, connection.server.name, what)
        return ended.result

    def _ask(self, content: vim.ServiceInstanceContent) -> vim.Task:
        try:
            return self._start(content)
        except (ImagesError, vmodl.MethodFault, NoConnectionError) as error:
            self.begun = isinstance(error, _UNCLEAR)
            raise
        except BaseException:
            self.begun = True  # the answer may be what was lost
            raise

    def _wait_for_end(self, task: vim.Task, follow: Follow) -> _Look:
        """The last look. A server that cannot tell is asked again, until its timeout."""
        pause = _FIRST_LOOK_SECONDS
        answered = moved = time.monotonic()
        percent, queued = 0, True
        while True:
            try:
                look = self._look_at(task)
            except DatastoreUnavailable:
                if time.monotonic() - answered > self._connection.server.timeout:
                    raise
            else:
                answered = time.monotonic()
                if look.ended:
                    return look
                if look.percent > percent or (queued and not look.queued):
                    moved = answered
                percent, queued = max(percent, look.percent), queued and look.queued
            follow(percent)
            limit = QUEUED_SECONDS if queued else self._stalled_seconds
            if time.monotonic() - moved > limit:
                raise DatastoreUnavailable(
                    f"server {self._connection.server.name}: cannot {self._what}: no progress in {limit:g} s, "
                    f"{'in its queue' if queued else f'at {percent} %'}; look at the task there"
                )
            time.sleep(pause)
            pause = min(2 * pause, _MOST_BETWEEN_LOOKS)

    def _look_at(self, task: vim.Task) -> _Look:
        def read(content: vim.ServiceInstanceContent) -> _Look:
            try:
                found = properties.read(content, task, ("info.state", "info.progress", "info.error", "info.result"))
            except vmodl.fault.ManagedObjectNotFound as lost:
                return _Look(True, fault=lost)
            match found.get("info.state"):
                case "success":
                    return _Look(True, 100, result=found.get("info.result"))
                case "error":
                    untold = vmodl.fault.SystemError(msg="the task failed, and the server tells no reason")
                    return _Look(True, fault=found.get("info.error") or untold)
            return _Look(False, found.get("info.progress") or 0, queued=found.get("info.state") == "queued")

        return self._connection.call(self._what, read, repeatable=True)

    def _cancel(self, task: vim.Task) -> None:
        """Cancels it and waits until it has ended, so that it writes no more; one that does not is logged."""
        until = time.monotonic() + CANCEL_SECONDS

        def require_time_left(percent: int) -> None:
            if time.monotonic() > until:
                raise DatastoreUnavailable(f"it runs {CANCEL_SECONDS:g} s after it was to be cancelled")

        # Also one that the server does not cancel, or whose answer was lost, comes to an end.
        _request_cancel(self._connection, self._what, task)
        try:
            require_time_left(0)
            self._wait_for_end(task, require_time_left)
        except (ImagesError, OSError) as error:
            server = self._connection.server.name
            _log.warning("task not ended server=%s task=%r error=%s", server, self._what, error)


def run_task(connection: Connection, what: str, start: Start, follow: Follow = lambda percent: None) -> Any:
    """`ServerTask.run` of a task that moves few bytes."""
    return ServerTask(connection, what, start).run(follow)


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
