"""imagectl show: everything that is known about one image."""

import json

import click

from sidecar.client import Image, ImageRef
from sidecar.ctl.output import NONE, exact_size, human_size, table
from sidecar.ctl.session import Session, command, image_argument, plain, ref_text
from sidecar.documents import full_document, image_time, kind_name, state_name, time_text
from sidecar.strict_json import parse_json


@command("show")
@image_argument("image")
@click.pass_obj
def show(session: Session, image: ImageRef) -> None:
    """Show all that is known about one image.

    Its state, sizes, times, users, problems, files, metadata and manifest. Users are those who have it open, and the
    VMs that need it, running or not.
    """
    with session.client() as sidecar:
        found = sidecar.image(image, with_vms=True)
    session.answer(_text(found), full_document(found))


def _text(image: Image) -> str:
    fields = [
        ("image", ref_text(image.ref)),
        ("state", state_name(image.state)),
        ("disk type", image.disk_type),
        ("capacity", exact_size(image.capacity_bytes)),
        ("size", exact_size(image.size_bytes)),
        ("allocated", exact_size(image.allocated_bytes)),
        *((name, image_time(image, field) or "") for name, field in _TIMES),
        ("directory", image.directory),
    ]
    lines = [f"{name + ':':<15}{plain(value) or NONE}" for name, value in fields]
    for name, values in (("users:", image.users), ("problems:", image.problems)):
        lines += [f"{name if index == 0 else '':<15}{plain(value)}" for index, value in enumerate(values or [NONE])]
    if image.files:
        rows = (
            (
                file.name,
                kind_name(file.kind).lower(),
                human_size(file.size_bytes),
                human_size(file.allocated_bytes),
                time_text(file.modify_time) if file.HasField("modify_time") else "",
            )
            for file in image.files
        )
        lines += ["", table(("FILE", "KIND", "SIZE", "ALLOCATED", "MODIFIED"), rows, right=("SIZE", "ALLOCATED"))]
    for name, text in (("metadata", image.metadata_json), ("manifest", image.manifest_json)):
        if text:
            lines += ["", f"{name}:", *(f"  {plain(line)}" for line in _pretty(text))]
    return "\n".join(lines)


_TIMES = (
    ("created", "create_time"),
    ("last used", "touch_time"),
    ("deleted", "tombstone_time"),
    ("found unused", "marked_unused_time"),
)


def _pretty(text: str) -> list[str]:
    try:
        return json.dumps(parse_json(text), indent=2, ensure_ascii=False).splitlines()
    except ValueError:
        return text.splitlines()
