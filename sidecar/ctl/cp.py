"""imagectl cp: a copy of an image, made by the sidecar."""

import click

from sidecar.client import CopyImageResponse, ImageRef
from sidecar.ctl.output import human_size
from sidecar.ctl.progress import progress_bar
from sidecar.ctl.session import Session, command, image_argument, ref_text, what_came_of_it
from sidecar.documents import image_document


@command("cp")
@image_argument("source")
@image_argument("destination")
@click.pass_obj
def cp(session: Session, source: ImageRef, destination: ImageRef) -> None:
    """Copy an image.

    SOURCE and DESTINATION are written DATASTORE/IMAGE. The destination appears complete or not at all; Ctrl-C cancels.
    """
    last = CopyImageResponse()
    with session.client() as sidecar:

        def outcome() -> str:
            return what_came_of_it(sidecar.address, destination)

        with session.taking_back(sidecar, outcome), progress_bar(ref_text(destination)) as advance:

            def progress(answer: CopyImageResponse) -> None:
                last.CopyFrom(answer)
                advance(answer.done_bytes, answer.total_bytes)

            image = sidecar.copy(source, destination).wait(progress)
    shared = f", {human_size(last.cloned_bytes)} of it shared" if last.cloned_bytes else ""
    session.answer(
        f"{ref_text(source)} copied to {ref_text(destination)}: {human_size(last.done_bytes)}{shared}",
        {"copied_bytes": last.done_bytes, "cloned_bytes": last.cloned_bytes, "image": image_document(image)},
    )
