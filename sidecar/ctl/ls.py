"""imagectl ls: images, by datastore."""

import click

from sidecar import errors
from sidecar.client import Image, ImageState
from sidecar.ctl.output import NONE, human_size, table
from sidecar.ctl.session import Session, command
from sidecar.documents import image_document, state_name, time_text

ALL_STATES = (
    ImageState.IMAGE_STATE_VALID,
    ImageState.IMAGE_STATE_INCOMPLETE,
    ImageState.IMAGE_STATE_TOMBSTONED,
)


@command("ls")
@click.argument("datastore", required=False, default="")
@click.option("--deleted", is_flag=True, help="Only those that are deleted and can be restored.")
@click.option("--all", "everything", is_flag=True, help="Deleted ones too.")
@click.pass_obj
def ls(session: Session, datastore: str, deleted: bool, everything: bool) -> None:
    """List the images of DATASTORE, or of all datastores.

    Where the state has problems beside it, imagectl show says which, and imagectl validate looks again.
    """
    if "/" in datastore:
        raise click.UsageError(f"{datastore!r} names no datastore; for one image there is imagectl show")
    if deleted and everything:
        raise click.UsageError("--deleted and --all exclude each other")
    states = ALL_STATES if everything else (ImageState.IMAGE_STATE_TOMBSTONED,) if deleted else ()
    images: list[Image] = []
    incomplete: dict[str, None] = {}
    with session.client() as sidecar:
        for page in sidecar.image_pages(datastore, states=states, page_size=5000):
            images += page.images
            incomplete.update(dict.fromkeys(page.incomplete_datastores))
    session.answer(_table(images, deleted or everything), [image_document(image) for image in images])
    if incomplete:
        # Not "there are none": nobody knows.
        raise errors.DatastoreUnavailable(f"not all images are known: {'; '.join(incomplete)}")


def _table(images: list[Image], deleted: bool) -> str:
    columns = ["IMAGE", "STATE", "CAPACITY", "ALLOCATED", "LAST USED"] + (["DELETED"] if deleted else [])
    return table(columns, (_row(image)[: len(columns)] for image in images), right=("CAPACITY", "ALLOCATED"))


def _row(image: Image) -> list[str]:
    known = image.details_known
    return [
        f"{image.ref.datastore}/{image.ref.image_id}",
        _state(image),
        human_size(image.capacity_bytes) if known and image.capacity_bytes else NONE,
        human_size(image.allocated_bytes) if known else NONE,
        time_text(image.touch_time) if image.HasField("touch_time") else NONE,
        time_text(image.tombstone_time) if image.HasField("tombstone_time") else NONE,
    ]


def _state(image: Image) -> str:
    count = len(image.problems)
    return state_name(image.state) + (f", {count} problem{'s' if count > 1 else ''}" if count else "")
