"""imagectl restore: a deleted image is back."""

import click

from sidecar.client import ImageRef
from sidecar.ctl.session import Session, command, image_argument, ref_text
from sidecar.documents import image_document, state_name


@command("restore")
@image_argument("image")
@click.pass_obj
def restore(session: Session, image: ImageRef) -> None:
    """Bring back a deleted image.

    As long as it was not purged.
    """
    with session.client() as sidecar:
        restored = sidecar.restore(image)
    session.answer(f"{ref_text(image)} restored: {state_name(restored.state)}", image_document(restored))
