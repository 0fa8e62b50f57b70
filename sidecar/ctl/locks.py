"""imagectl locks: who is changing images now."""

from datetime import UTC, datetime

import click

from sidecar import errors
from sidecar.client import Lock
from sidecar.ctl.output import human_time, table
from sidecar.ctl.session import Session, command
from sidecar.documents import lock_document, lock_kind_name, time_text


@command("locks")
@click.argument("datastore", required=False, default="")
@click.pass_obj
def locks(session: Session, datastore: str) -> None:
    """List the locks of DATASTORE, or of all datastores, that somebody holds now.

    The lock of an IMAGE is held while it is changed, that of STAGING for as long as a copy or an import is being made.
    A process that ends lets go of its locks. AGE goes by the clocks of this host and the holder's.
    """
    found: list[Lock] = []
    unknown: list[str] = []
    with session.client() as sidecar:
        for name in [datastore] if datastore else [each.name for each in sidecar.datastores()]:
            try:
                found += sidecar.locks(name)
            except errors.DatastoreUnavailable as error:
                if datastore:
                    raise
                unknown.append(error.message)
    session.answer(_table(found), [lock_document(lock) for lock in found])
    if unknown:
        # Not "there are none": nobody knows.
        raise errors.DatastoreUnavailable(f"not all locks are known: {'; '.join(unknown)}")


def _table(found: list[Lock]) -> str:
    now = datetime.now(UTC)
    columns = ("LOCK", "PATH", "HOST", "PID", "PROCESS", "OPERATION", "SINCE", "AGE")
    return table(columns, (_row(lock, now) for lock in found), right=("PID", "AGE"))


def _row(lock: Lock, now: datetime) -> list[str]:
    return [
        lock_kind_name(lock.kind),
        f"{lock.datastore}/{lock.path}",
        lock.host,
        str(lock.pid or ""),
        lock.process,
        lock.operation,
        time_text(lock.since_time),
        human_time((now - lock.since_time.ToDatetime(tzinfo=UTC)).total_seconds()),
    ]
