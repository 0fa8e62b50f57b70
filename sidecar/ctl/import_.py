"""imagectl import: a VMDK of this machine becomes an image."""

import click

from sidecar import errors
from sidecar.client import MAX_COMPANION_BYTES, ImageRef, SidecarClient, Staging
from sidecar.ctl.disk_source import SourceDisk, open_disk, unreadable
from sidecar.ctl.output import human_size
from sidecar.ctl.progress import Advance, progress_bar
from sidecar.ctl.session import Session, command, image_argument, ref_text, what_came_of_it
from sidecar.documents import image_document
from sidecar.strict_json import parse_json


@command("import")
@click.argument("file", type=click.Path(exists=True))
@image_argument("image")
@click.option("--metadata", type=click.Path(exists=True), help="JSON, to be the image's metadata (its .ecv file).")
@click.option("--manifest", type=click.Path(exists=True), help="JSON, to be the image's manifest.")
@click.pass_obj
def import_image(session: Session, file: str, image: ImageRef, metadata: str | None, manifest: str | None) -> None:
    """Make an image from a VMDK.

    FILE is a descriptor with its extents beside it, or a single file; any of them may be gzipped. It stays as it is.
    The image appears complete or not at all; Ctrl-C cancels.
    """
    disk = open_disk(file)
    # A companion named after the disk is renamed with it.
    companions = {
        f"{disk.stem}{suffix}": _companion(path)
        for suffix, path in ((".ecv", metadata), (".manifest", manifest))
        if path is not None
    }
    publishing = False
    with session.client() as sidecar:

        def outcome() -> str:
            return what_came_of_it(sidecar.address, image, publishing=publishing)

        with (
            session.taking_back(sidecar, outcome),
            progress_bar(ref_text(image)) as advance,
            sidecar.create_staging(image, expected_bytes=_expected_bytes(sidecar, image, disk)) as staging,
        ):
            _send(staging, disk, companions, advance)
            publishing = True
            made = staging.commit().image
    session.answer(
        f"{file} imported as {ref_text(image)}: {human_size(made.capacity_bytes)} disk, "
        f"{human_size(made.allocated_bytes)} allocated",
        image_document(made),
    )


def _expected_bytes(sidecar: SidecarClient, image: ImageRef, disk: SourceDisk) -> int:
    """Of gzipped files this may be less than it will be: what does not fit is then refused later."""
    # Without a path to its datastore, the sidecar sends holes as zeroes.
    fills_holes = any(each.name == image.datastore and not each.root_path for each in sidecar.datastores())
    return disk.known_bytes if fills_holes else disk.source_bytes


def _send(staging: Staging, disk: SourceDisk, companions: dict[str, bytes], advance: Advance) -> None:
    done, total = 0, disk.source_bytes

    def count(read: int) -> None:
        nonlocal done
        done += read
        advance(done, total)

    for name, content in companions.items():
        staging.write_file(name, [(0, content)], size=len(content))
    for file in disk.files:
        staging.write_file(file.name, file.parts(count), size=file.size)
        if file.compressed:
            staging.write_file(file.name, (), size=file.size)


def _companion(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_COMPANION_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(content) > MAX_COMPANION_BYTES:
        raise errors.InvalidRequest(f"{path} is larger than {human_size(MAX_COMPANION_BYTES)}")
    try:
        parse_json(content)
    except ValueError as error:
        raise errors.InvalidRequest(f"{path} is not JSON: {error}") from None
    return content
