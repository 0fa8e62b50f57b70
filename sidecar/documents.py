"""Images and datastores as documents for programs: what imagectl prints as JSON, and what the mount shows."""

from datetime import UTC

from google.protobuf.timestamp_pb2 import Timestamp

from sidecar.client import Datastore, FileKind, Image, ImageFile, ImageState, Lock, LockKind
from sidecar.strict_json import parse_json

Document = dict[str, object]


def state_name(state: ImageState.ValueType) -> str:
    return ImageState.Name(state).removeprefix("IMAGE_STATE_")


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


def lock_document(lock: Lock) -> Document:
    """A lock that is held; of a holder that left no name, only since when."""
    return {
        "datastore": lock.datastore,
        "path": lock.path,
        "kind": lock_kind_name(lock.kind),
        "image_id": lock.image_id or None,
        "host": lock.host or None,
        "pid": lock.pid or None,
        "process": lock.process or None,
        "operation": lock.operation or None,
        "since_time": time_text(lock.since_time, "microseconds"),
    }


def lock_kind_name(kind: LockKind.ValueType) -> str:
    return LockKind.Name(kind).removeprefix("LOCK_KIND_")


def ns_text(time_ns: int) -> str | None:
    """A time in ns since the epoch in ISO 8601, UTC; None for 0, which is not known."""
    time = Timestamp()
    time.FromNanoseconds(time_ns)
    return time_text(time, "microseconds") if time_ns else None


def _set_fields(image: Image) -> set[str]:
    return {field.name for field, _ in image.ListFields()}


def _parsed(text: str) -> object:
    """The JSON in a companion file; what is not JSON as the text that it is, nothing as None."""
    if not text:
        return None
    try:
        return parse_json(text)
    except ValueError:
        return text
