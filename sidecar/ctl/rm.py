"""imagectl rm: an image is deleted for everyone, and can be restored; or is gone."""

import click

from sidecar.client import ImageRef
from sidecar.ctl.session import Session, command, image_argument, ref_text


@command("rm")
@image_argument("image")
@click.option("--force", is_flag=True, help="Free its space at once; refused while something uses it.")
@click.pass_obj
def rm(session: Session, image: ImageRef, force: bool) -> None:
    """Delete an image. Until it is purged, imagectl restore brings it back; with --force nothing does."""
    with session.client() as sidecar:
        sidecar.delete(image, force=force)
    name = ref_text(image)
    session.answer(
        f"{name} purged" if force else f"{name} deleted; imagectl restore {name} brings it back",
        {"image": name, "deleted": True, "purged": force},
    )
