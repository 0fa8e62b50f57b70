"""imagectl touch: an image is in use now."""

import click

from sidecar.client import ImageRef
from sidecar.ctl.session import Session, command, image_argument, ref_text


@command("touch")
@image_argument("image")
@click.pass_obj
def touch(session: Session, image: ImageRef) -> None:
    """Note that an image is in use now.

    A sweep leaves it alone then.
    """
    with session.client() as sidecar:
        time = sidecar.touch(image)
    text = time.isoformat(timespec="seconds").replace("+00:00", "Z")
    exact = time.isoformat(timespec="microseconds").replace("+00:00", "Z")
    session.answer(f"{ref_text(image)} last used {text}", {"image": ref_text(image), "touch_time": exact})
