"""What the commands of maintenance share: arguments, and how a run is told."""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from sidecar import errors
from sidecar.ctl.session import ANSWER_SECONDS, CANCEL_SECONDS, Session
from sidecar.documents import Document, time_text

if TYPE_CHECKING:
    from sidecar.client_maintenance import Maintenance, MaintenanceRun

_STOP_SECONDS = 5.0
_MOST_NOTED = 20


def datastore_argument(function: Callable[..., None]) -> Callable[..., None]:
    """An argument that names a datastore."""
    return click.argument("datastore", callback=_datastore)(function)


def optional_datastore_argument(function: Callable[..., None]) -> Callable[..., None]:
    """As `datastore_argument`; empty where all datastores are meant."""
    return click.argument("datastore", required=False, default="", callback=_datastore)(function)


def seconds_option(name: str, description: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, type=click.FloatRange(min=0, max=1e8), metavar="SECONDS", help=description)


def run_options(of_rate: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """How fast, how long, and whether to wait for the end; or to stop the one that runs."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        rate = click.FloatRange(min=0, max=1e6, min_open=True)
        function = click.option("--stop", is_flag=True, help="Start none; stop the one that runs, whosever it is.")(
            function
        )
        function = click.option("--no-wait", "wait", flag_value=False, default=True, help="Start it, and return.")(
            function
        )
        function = seconds_option("--timeout", "After which it ends; by default 7 days.")(function)
        return click.option("--rate", type=rate, default=10.0, metavar="N", help=f"{of_rate} Default: 10.")(function)

    return decorate


def outcome_of(address: str, kind: str, stop: "Callable[[Maintenance], MaintenanceRun]", run_id: str) -> str:
    """After a signal: stops the run on the server, and says what came of that."""
    from sidecar.client import SidecarClient

    time.sleep(CANCEL_SECONDS)  # its start may be on its way
    try:
        with SidecarClient(address, timeout=ANSWER_SECONDS) as sidecar:
            run = _stopped(lambda: stop(sidecar.maintenance), run_id)
    except errors.ImagesError as error:
        return f"interrupted; whether the {kind} goes on is not known: {error.message}"
    if run.run_id != run_id:
        return f"interrupted: no {kind} of this command is running"
    return _stop_text(kind, run) or f"interrupted, but the {kind} had ended before that"


def stop_run(session: Session, kind: str, datastore: str, stop: "Callable[[Maintenance], MaintenanceRun]") -> None:
    """Stops the run of whoever started it, and says what came of that."""
    with session.client() as sidecar:
        first = stop(sidecar.maintenance)
        run = first if _is_over(first) else _stopped(lambda: stop(sidecar.maintenance), first.run_id)
    text = None if run is first else _stop_text(kind, run)
    session.answer(text or f"no {kind} of {datastore} is running", run_document(run))


def _stopped(stop: "Callable[[], MaintenanceRun]", run_id: str) -> "MaintenanceRun":
    """The run when it has ended, or has not for 5 s; another one when it is gone."""
    until = time.monotonic() + _STOP_SECONDS
    while (run := stop()).run_id == run_id and not _is_over(run) and time.monotonic() <= until:
        time.sleep(0.05)
    return run


def _stop_text(kind: str, run: "MaintenanceRun") -> str | None:
    """None when it has not been stopped."""
    from protos.images.v1.maintenance_service_pb2 import RUN_OUTCOME_STOPPED

    if not _is_over(run):
        return f"the {kind} was told to stop, and ends with what it is at: {run.current_item}"
    if run.outcome == RUN_OUTCOME_STOPPED:
        return f"the {kind} was stopped, at {run.done_items} of {run.total_items} items"
    return None


def _is_over(run: "MaintenanceRun") -> bool:
    from protos.images.v1.maintenance_service_pb2 import RUN_STATE_IDLE, RUN_STATE_UNSPECIFIED

    return run.state in (RUN_STATE_IDLE, RUN_STATE_UNSPECIFIED)


def run_document(run: "MaintenanceRun") -> Document:
    """A run: times are ISO 8601 in UTC."""
    from protos.images.v1.maintenance_service_pb2 import RunOutcome, RunState

    return {
        "datastore": run.datastore,
        "run_id": run.run_id,
        "state": RunState.Name(run.state).removeprefix("RUN_STATE_"),
        "outcome": RunOutcome.Name(run.outcome).removeprefix("RUN_OUTCOME_") if run.outcome else None,
        "start_time": time_text(run.start_time, "microseconds") if run.HasField("start_time") else None,
        "end_time": time_text(run.end_time, "microseconds") if run.HasField("end_time") else None,
        "done_items": run.done_items,
        "total_items": run.total_items,
    }


def warn_of(session: Session, what: str, messages: Iterable[str]) -> None:
    """Notes for people, a line each."""
    if session.json:
        return
    told = list(messages)
    for message in told[:_MOST_NOTED]:
        session.note(f"{what}: {message}")
    if len(told) > _MOST_NOTED:
        session.note(f"{what}: {len(told) - _MOST_NOTED} more")


def _datastore(ctx: click.Context, parameter: click.Parameter, value: Any) -> str:
    if "/" in value:
        raise click.BadParameter(f"{value!r} names no datastore", ctx, parameter)
    return str(value)
