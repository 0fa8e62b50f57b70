"""imagectl reap: what processes left behind that died is freed."""

import click

from sidecar import errors
from sidecar.ctl.maintenance import datastore_argument, seconds_option, warn_of
from sidecar.ctl.output import human_size
from sidecar.ctl.session import Session, command


@command("reap")
@datastore_argument
@seconds_option("--grace", "Leave alone what was written to within this time; by default as the sidecar is configured.")
@seconds_option("--purge-after", "Also purge images that were deleted longer ago than this, unless they are in use.")
@click.pass_obj
def reap(session: Session, datastore: str, grace: float | None, purge_after: float | None) -> None:
    """Free the trash of DATASTORE, and abandoned staging directories.

    What a live process makes is never touched, however old it is. The sidecar does this by itself as well.
    """
    with session.client() as sidecar:
        answer = sidecar.maintenance.reap(datastore, grace=grace, purge_grace=purge_after)
    purged = f", {len(answer.purged_images)} deleted images" if purge_after is not None else ""
    recovered = f"; {len(answer.recovered_images)} images recovered" if answer.recovered_images else ""
    session.answer(
        f"{datastore} reaped: {len(answer.staging_directories)} staging directories, {len(answer.trash)} in the "
        f"trash{purged}: {human_size(answer.freed_bytes)} freed{recovered}",
        {
            "datastore": datastore,
            "staging_directories": list(answer.staging_directories),
            "trash": list(answer.trash),
            "purged_images": list(answer.purged_images),
            "recovered_images": list(answer.recovered_images),
            "freed_bytes": answer.freed_bytes,
            "kept": list(answer.kept),
            "faults": list(answer.faults),
        },
    )
    warn_of(session, "stays", answer.kept)
    if answer.faults:
        raise errors.DatastoreUnavailable(f"not everything could be freed: {'; '.join(answer.faults)}")
