"""imagectl validate: whether an image is whole."""

import click

from sidecar import errors
from sidecar.client import ImageRef, ImageState
from sidecar.ctl.session import Session, command, image_argument, ref_text
from sidecar.documents import image_document


@command("validate")
@image_argument("image")
@click.option("--repair", is_flag=True, help="Give an image that only lost its timestamp file a new one.")
@click.pass_obj
def validate(session: Session, image: ImageRef, repair: bool) -> None:
    """Check that an image is whole.

    Its descriptor, its extents and their sizes, its timestamp file, its metadata. Exit code 5: it is not.
    """
    with session.client() as sidecar:
        answer = sidecar.validate(image, repair=repair)
    name = ref_text(image)
    whole = answer.image.state == ImageState.IMAGE_STATE_VALID and not answer.image.problems
    if whole or session.json:
        session.answer(
            f"{name} is valid" + (", and has a timestamp file again" if answer.repaired else ""),
            {"valid": whole, "repaired": answer.repaired, "image": image_document(answer.image)},
        )
    if not whole:
        raise errors.ImageIncomplete(f"{name} is not whole: {'; '.join(answer.image.problems) or 'see imagectl show'}")
