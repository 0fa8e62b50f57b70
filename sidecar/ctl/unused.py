"""imagectl unused: what a scan found."""

import click

from sidecar import errors
from sidecar.client import Image
from sidecar.ctl.maintenance import optional_datastore_argument
from sidecar.ctl.output import NONE, human_size, table
from sidecar.ctl.session import Session, command
from sidecar.documents import image_document, time_text


@command("unused")
@optional_datastore_argument
@click.pass_obj
def unused(session: Session, datastore: str) -> None:
    """List the images of DATASTORE, or of all datastores, that a scan found unused.

    What was touched since is listed too, with its last use after UNUSED SINCE; a sweep leaves it alone.
    """
    images: list[Image] = []
    faults: list[errors.ImagesError] = []
    with session.client() as sidecar:
        for name in [datastore] if datastore else [each.name for each in sidecar.datastores()]:
            try:
                images += sidecar.maintenance.unused(name)
            except (errors.DatastoreUnavailable, errors.DatastoreDenied) as error:
                faults.append(error)
    columns = ("IMAGE", "ALLOCATED", "LAST USED", "UNUSED SINCE")
    session.answer(table(columns, map(_row, images), right=("ALLOCATED",)), [image_document(image) for image in images])
    if faults:
        raise type(faults[0])(f"not all images are known: {'; '.join(fault.message for fault in faults)}")


def _row(image: Image) -> list[str]:
    return [
        f"{image.ref.datastore}/{image.ref.image_id}",
        human_size(image.allocated_bytes),
        time_text(image.touch_time) if image.HasField("touch_time") else NONE,
        time_text(image.marked_unused_time) if image.HasField("marked_unused_time") else NONE,
    ]
