"""Images and datastores as rows and lines for people, and as documents for programs."""

import io
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC

from google.protobuf.timestamp_pb2 import Timestamp

from sidecar.client import Datastore, FileKind, Image, ImageFile, ImageState
from sidecar.ctl.session import plain

NONE = "-"
# Wider than any table: lines are never cut or folded, so an id is whole wherever the output goes.
WIDTH = 100_000
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

Document = dict[str, object]


def state_name(state: ImageState.ValueType) -> str:
    return ImageState.Name(state).removeprefix("IMAGE_STATE_")


def human_size(count: int) -> str:
    """Bytes for people: three digits or so, and a binary unit."""
    value, unit = float(count), 0
    while abs(value) >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.{1 if value < 100 else 0}f} {UNITS[unit]}"


def exact_size(count: int) -> str:
    """Bytes for people who look closely."""
    return human_size(count) if count < 1000 else f"{human_size(count)} ({count} bytes)"


def time_text(time: Timestamp, timespec: str = "seconds") -> str:
    return time.ToDatetime(tzinfo=UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def image_time(image: Image, name: str) -> str | None:
    """The timestamp field `name` of an image in ISO 8601, UTC; None when it is not set."""
    return time_text(getattr(image, name), "microseconds") if name in _set_fields(image) else None


def image_document(image: Image) -> Document:
    """An image, as lists have it. Times are ISO 8601 in UTC, sizes bytes."""
    return {
        "image": f"{image.ref.datastore}/{image.ref.image_id}",
        "datastore": image.ref.datastore,
        "image_id": image.ref.image_id,
        "state": state_name(image.state),
        "details_known": image.details_known,
        "disk_type": image.disk_type or None,
        "capacity_bytes": image.capacity_bytes,
        "size_bytes": image.size_bytes,
        "allocated_bytes": image.allocated_bytes,
        "create_time": image_time(image, "create_time"),
        "touch_time": image_time(image, "touch_time"),
        "tombstone_time": image_time(image, "tombstone_time"),
        "marked_unused_time": image_time(image, "marked_unused_time"),
        "directory": image.directory,
        "files": [file_document(file) for file in image.files],
        "problems": list(image.problems),
    }


def full_document(image: Image) -> Document:
    """An image, as GetImage has it: with its users, its metadata and its manifest."""
    return {
        **image_document(image),
        "users": list(image.users),
        "metadata": _parsed(image.metadata_json),
        "manifest": _parsed(image.manifest_json),
    }


def file_document(file: ImageFile) -> Document:
    return {
        "name": file.name,
        "kind": kind_name(file.kind),
        "size_bytes": file.size_bytes,
        "allocated_bytes": file.allocated_bytes,
        "modify_time": time_text(file.modify_time, "microseconds") if file.HasField("modify_time") else None,
    }


def kind_name(kind: FileKind.ValueType) -> str:
    return FileKind.Name(kind).removeprefix("FILE_KIND_")


def datastore_document(datastore: Datastore) -> Document:
    checked = datastore.HasField("checked_time")
    return {
        "name": datastore.name,
        "type": datastore.type,
        "layout": datastore.layout,
        "root_path": datastore.root_path,
        "capacity_bytes": datastore.capacity_bytes,
        "free_bytes": datastore.free_bytes,
        "reserve_bytes": datastore.reserve_bytes,
        "shared": datastore.shared,
        "accessible": datastore.accessible,
        "fault": datastore.fault or None,
        "reflink": datastore.reflink,
        "checked_time": time_text(datastore.checked_time, "microseconds") if checked else None,
        "image_count": datastore.image_count,
    }


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Lines of aligned columns under their names; bold names and nothing else where stdout is a terminal."""
    # Late: most commands print no table, and rich takes as long to load as they take to run.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(Text(column), justify="right" if column in right else "left", no_wrap=True, overflow="ignore")
    for row in rows:
        made.add_row(*(Text(plain(cell) or NONE) for cell in row))
    terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    Console(
        file=buffer,
        width=WIDTH,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        no_color=None if terminal else True,
        legacy_windows=False,
    ).print(made, crop=False, no_wrap=True, overflow="ignore")
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _set_fields(image: Image) -> set[str]:
    return {field.name for field, _ in image.ListFields()}


def _parsed(text: str) -> object:
    """The JSON in a companion file; what is not JSON as the text that it is, nothing as None."""
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
