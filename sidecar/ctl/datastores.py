"""imagectl datastores: where images live."""

import click

from sidecar.client import Datastore
from sidecar.ctl.output import NONE, human_size, table
from sidecar.ctl.session import Session, command
from sidecar.documents import datastore_document


@command("datastores")
@click.pass_obj
def datastores(session: Session) -> None:
    """List the datastores.

    Their type, layout, space and number of images, and whether they can be reached. RESERVE of the free space is
    never given to a new image.
    """
    with session.client() as sidecar:
        found = sidecar.datastores()
    columns = ("NAME", "TYPE", "LAYOUT", "CAPACITY", "FREE", "RESERVE", "IMAGES", "ROOT", "STATUS")
    session.answer(
        table(columns, (_row(datastore) for datastore in found), right=("CAPACITY", "FREE", "RESERVE", "IMAGES")),
        [datastore_document(datastore) for datastore in found],
    )


def _row(datastore: Datastore) -> list[str]:
    known = datastore.accessible
    return [
        datastore.name,
        datastore.type,
        datastore.layout,
        human_size(datastore.capacity_bytes) if known else NONE,
        human_size(datastore.free_bytes) if known else NONE,
        human_size(datastore.reserve_bytes),
        str(datastore.image_count) if known else NONE,
        datastore.root_path,
        "ok" if known else f"unavailable: {datastore.fault}",
    ]
