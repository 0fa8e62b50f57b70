"""The domain's values as messages, and back."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Literal, Protocol

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from protos.images.v1 import datastore_service_pb2 as datastore_pb
from protos.images.v1 import types_pb2 as pb
from sidecar.errors import ImagesError, InvalidRequest
from sidecar.images.discovery import Discovery, fault_of
from sidecar.images.image import FileKind, Image, ImageFile, ImageKey, ImageState
from sidecar.images.locked import Held
from sidecar.images.names import check_image_id

_STATES = {
    ImageState.VALID: pb.IMAGE_STATE_VALID,
    ImageState.INCOMPLETE: pb.IMAGE_STATE_INCOMPLETE,
    ImageState.TOMBSTONED: pb.IMAGE_STATE_TOMBSTONED,
}
_STATES_BACK: dict[int, ImageState] = {message: state for state, message in _STATES.items()}
_KINDS = {
    FileKind.DESCRIPTOR: pb.FILE_KIND_DESCRIPTOR,
    FileKind.EXTENT: pb.FILE_KIND_EXTENT,
    FileKind.COMPANION: pb.FILE_KIND_COMPANION,
}

_LONGEST_SECONDS = 315_576_000_000  # of a Duration, as its definition says: 10,000 years
_MAX_FILES = 10_000  # of one image: 3 MiB of a message at most

_EPOCH = datetime.fromtimestamp(0, UTC)
_LARGEST = (1 << 63) - 1  # of an int64

# The years 1 to 9999.
_EARLIEST_NS, _LATEST_NS = -62_135_596_800 * 10**9, 253_402_300_800 * 10**9 - 1


def image_key(ref: pb.ImageRef) -> ImageKey:
    """InvalidRequest without a datastore, InvalidImageId for what is no image id."""
    if not ref.datastore:
        raise InvalidRequest("the call names no datastore; an image is named by its datastore and its image id")
    check_image_id(ref.image_id)
    return ImageKey(ref.datastore, ref.image_id)


def image_ref(key: ImageKey) -> pb.ImageRef:
    return pb.ImageRef(datastore=key.datastore, image_id=key.image_id)


class TakesLock(Protocol):
    """A request that says how long it waits for an image's lock."""

    @property
    def lock_timeout(self) -> Duration: ...

    def HasField(self, field_name: Literal["lock_timeout"], /) -> bool: ...


def lock_timeout(request: TakesLock) -> float | None:
    """Seconds; None when the caller leaves it to the sidecar. InvalidRequest for what is no length of time."""
    if not request.HasField("lock_timeout"):
        return None
    seconds, nanos = request.lock_timeout.seconds, request.lock_timeout.nanos
    if not (0 <= seconds <= _LONGEST_SECONDS and 0 <= nanos < 10**9):
        raise InvalidRequest(
            f"lock_timeout is {seconds} s and {nanos} ns; it is a google.protobuf.Duration, and not negative"
        )
    return seconds + nanos / 1e9


def image_states(states: Iterable[int]) -> frozenset[ImageState]:
    """Empty: what a listing shows, the valid and the incomplete ones."""
    try:
        return frozenset(_STATES_BACK[state] for state in states) or frozenset(
            (ImageState.VALID, ImageState.INCOMPLETE)
        )
    except KeyError as error:
        raise InvalidRequest(f"{error.args[0]} is no image state") from None


def image_message(image: Image) -> pb.Image:
    message = pb.Image(
        ref=image_ref(image.key),
        state=_STATES[image.state],
        details_known=image.details_known,
        files=[file_message(file) for file in image.files[-_MAX_FILES:]],
        capacity_bytes=image.capacity,
        size_bytes=image.size,
        allocated_bytes=image.allocated,
        disk_type=_text(image.disk_type),
        directory=image.directory,
        problems=[_text(problem) for problem in image.problems],
    )
    if len(image.files) > _MAX_FILES:
        message.problems.append(f"it has more than {_MAX_FILES} files: the others are not told of")
    for field, ns in (
        (message.create_time, image.created_ns),
        (message.touch_time, image.touched_ns),
        (message.tombstone_time, image.tombstoned_ns),
    ):
        if ns is not None:
            field.CopyFrom(timestamp(ns))
    if image.marked_unused_s is not None:
        message.marked_unused_time.FromSeconds(image.marked_unused_s)
    return message


def file_message(file: ImageFile) -> pb.ImageFile:
    return pb.ImageFile(
        name=_text(file.name),
        kind=_KINDS[file.kind],
        size_bytes=file.size,
        allocated_bytes=file.allocated,
        modify_time=timestamp(file.modified_ns),
        inode=file.inode,
    )


def datastore_message(discovery: Discovery) -> pb.Datastore:
    store, status = discovery.store, discovery.status
    message = pb.Datastore(
        name=store.datastore.name,
        type=store.datastore.type,
        layout=store.layout.id,
        root_path=store.datastore.root_path,
        capacity_bytes=status.capacity.capacity,
        free_bytes=status.capacity.free,
        reserve_bytes=store.reserve,
        shared=store.datastore.shared,
        accessible=not status.fault,
        fault=status.fault,
        checked_time=timestamp(status.checked_ns),
        image_count=discovery.image_count,
    )
    if not status.fault:
        try:
            message.reflink = store.datastore.reflink
        except ImagesError as error:
            message.accessible, message.fault = False, fault_of(store.datastore, error)
    return message


def lock_message(datastore: str, held: Held) -> datastore_pb.Lock:
    holder = held.holder
    message = datastore_pb.Lock(
        datastore=datastore,
        path=_text(held.path),
        kind=datastore_pb.LOCK_KIND_STAGING if held.staging else datastore_pb.LOCK_KIND_IMAGE,
        image_id=held.image_id,
        since_time=timestamp((holder.since - _EPOCH) // timedelta(microseconds=1) * 1000),
    )
    if holder.pid:
        message.host, message.pid = holder.host, min(holder.pid, _LARGEST)
        message.process, message.operation = holder.process, holder.operation
    return message


def timestamp(ns: int) -> Timestamp:
    """The time; the nearest that a message can hold, as some file systems take any time that they are given."""
    message = Timestamp()
    message.FromNanoseconds(min(max(ns, _EARLIEST_NS), _LATEST_NS))
    return message


def _text(name: str) -> str:
    """A name that is not UTF-8 as one that a message can carry; nobody can ask for that file by it."""
    return name.encode("utf-8", "backslashreplace").decode()
