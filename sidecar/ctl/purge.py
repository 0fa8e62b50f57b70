"""imagectl purge: a deleted image is gone."""

import click

from sidecar.client import ImageRef
from sidecar.ctl.output import human_size
from sidecar.ctl.session import Session, command, image_argument, ref_text


@command("purge")
@image_argument("image")
@click.pass_obj
def purge(session: Session, image: ImageRef) -> None:
    """Free the space of a deleted image.

    It cannot be restored then. Refused while something uses it.
    """
    with session.client() as sidecar:
        freed = sidecar.purge(image)
    session.answer(
        f"{ref_text(image)} purged: {human_size(freed)} freed", {"image": ref_text(image), "freed_bytes": freed}
    )
