"""StagingService: what the contract says, in terms of the domain."""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress

import grpc

from protos.images.v1 import staging_service_pb2 as pb
from protos.images.v1 import staging_service_pb2_grpc as pb_grpc
from protos.images.v1.types_pb2 import ImageFile
from sidecar.datastores.interface import Datastore, ReadableFile
from sidecar.errors import FileChanged, FileNotInImage, InvalidRequest, OperationCancelled
from sidecar.images.copying import OpenImage, clone_files, require_space_for_copy
from sidecar.images.image import Image, ImageKey
from sidecar.images.library import Library
from sidecar.images.names import check_file_name
from sidecar.images.operations import Operation
from sidecar.images.progress import Progress
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from sidecar.services.image_service import PROGRESS_SECONDS
from sidecar.services.messages import image_key, image_message, lock_timeout, timestamp
from sidecar.services.requests import Requests, fingerprint

MESSAGE_DATA_BYTES = 1 << 20
CLONE_SECONDS = 1.0
CLONE_PIECE = 8 << 20  # bytes between two looks at the clock: no call is much longer on a slow datastore
LARGEST_FILE = 64 << 40
SPACE_CHECK_BYTES = 256 << 20  # written between two looks at the reserve

_log = logging.getLogger(__name__)


class StagingServicer(pb_grpc.StagingServiceServicer):
    """Translates; the domain decides."""

    def __init__(self, library: Library, requests: Requests) -> None:
        self._library = library
        self._requests = requests

    def CreateStaging(
        self, request: pb.CreateStagingRequest, context: grpc.ServicerContext
    ) -> pb.CreateStagingResponse:
        key = image_key(request.ref)
        sessions = self._library.sessions
        # A renewal needs no disk, and no place.
        session = sessions.renew(self._library.store(key.datastore), key.image_id, request.request_id)
        if session is None:
            with self._library.using(key.datastore, context.is_active) as store:
                session = sessions.create(
                    store, key.image_id, request.expected_bytes, request.request_id, context.is_active
                )
        return pb.CreateStagingResponse(
            staging_id=session.id,
            directory=session.staging.directory,
            lease_seconds=int(sessions.lease_seconds),
        )

    def WriteFile(
        self, request_iterator: Iterator[pb.WriteFileRequest], context: grpc.ServicerContext
    ) -> pb.WriteFileResponse:
        first = next(request_iterator, None)
        if first is None:
            raise InvalidRequest(
                "the stream ended before its first message, which names the staging directory and file"
            )
        check_file_name(first.name)
        written = checked = 0
        size: int | None = None
        with (
            self._transfer(first.staging_id),
            self._library.sessions.using(first.staging_id) as staging,
            closing(staging.open_writable(first.name)) as target,
        ):
            for message in _with_first(first, request_iterator):
                _check_range(message.offset, len(message.data) + message.hole_bytes)
                if message.data:
                    if written >= checked + SPACE_CHECK_BYTES:
                        staging.store.require_space(staging.store.datastore.unsent(staging.directory))
                        checked = written
                    target.write(message.offset, message.data)
                    written += len(message.data)
                if message.hole_bytes:
                    target.make_hole(message.offset + len(message.data), message.hole_bytes)
                if message.HasField("size_bytes"):
                    _check_range(0, message.size_bytes)
                    size = message.size_bytes
            if not context.is_active():
                raise OperationCancelled("the stream was cancelled before its end")
            if size is not None:
                target.resize(size)
            return pb.WriteFileResponse(written_bytes=written, size_bytes=target.size())

    def RenameFile(self, request: pb.RenameFileRequest, context: grpc.ServicerContext) -> pb.RenameFileResponse:
        check_file_name(request.name)
        check_file_name(request.new_name)
        with self._changing(request.staging_id, request.name, context) as staging:
            staging.rename_file(request.name, request.new_name)
        return pb.RenameFileResponse()

    def RemoveFile(self, request: pb.RemoveFileRequest, context: grpc.ServicerContext) -> pb.RemoveFileResponse:
        check_file_name(request.name)
        with self._changing(request.staging_id, request.name, context) as staging:
            staging.remove_file(request.name)
        return pb.RemoveFileResponse()

    def ReadFile(self, request: pb.ReadFileRequest, context: grpc.ServicerContext) -> Iterator[pb.ReadFileResponse]:
        check_file_name(request.name)
        _check_range(request.offset, request.length)
        with self._open_for_reading(request) as file:
            end = min(request.offset + request.length, file.size) if request.length else file.size
            yield pb.ReadFileResponse(offset=request.offset, size_bytes=file.size)
            position = request.offset
            for start, length in file.data_ranges(position, max(end - position, 0)):
                if start > position:
                    yield pb.ReadFileResponse(offset=position, hole_bytes=start - position)
                position = start
                while position < start + length:
                    data = file.read(position, min(MESSAGE_DATA_BYTES, start + length - position))
                    if not data:  # it was cut off
                        file.require_same()
                        return
                    yield pb.ReadFileResponse(offset=position, data=data)
                    position += len(data)
            if position < end:
                yield pb.ReadFileResponse(offset=position, hole_bytes=end - position)
            file.require_same()

    def OpenHolder(
        self, request: pb.OpenHolderRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.OpenHolderResponse]:
        with self._library.holders.opened() as holder:
            if not context.add_callback(holder.leave):
                return
            yield pb.OpenHolderResponse(holder_id=holder.id)
            holder.wait()

    def HoldFile(self, request: pb.HoldFileRequest, context: grpc.ServicerContext) -> pb.HoldFileResponse:
        key = image_key(request.ref)
        store = self._library.store(key.datastore)
        check_file_name(request.name)
        holder = self._library.holders.get(request.holder_id)

        def open_file() -> ReadableFile:
            file = self._open_known(store, key, request.name)
            try:
                if request.HasField("expected"):
                    _require_same(file, request.expected, f"{request.name} of {key}")
            except BaseException:
                file.close()
                raise
            return file

        holder.hold(request.number, open_file, context.is_active, store.admission.call)
        return pb.HoldFileResponse()

    def ReleaseFile(self, request: pb.ReleaseFileRequest, context: grpc.ServicerContext) -> pb.ReleaseFileResponse:
        self._library.holders.get(request.holder_id).release(request.number, context.is_active)
        return pb.ReleaseFileResponse()

    def CloneRange(self, request: pb.CloneRangeRequest, context: grpc.ServicerContext) -> pb.CloneRangeResponse:
        key = image_key(request.source)
        store = self._library.store(key.datastore)
        check_file_name(request.source_name)
        check_file_name(request.name)
        _check_range(request.source_offset, request.length)
        _check_range(request.offset, request.length)
        until = time.monotonic() + CLONE_SECONDS
        progress = Progress()
        destination = self._library.sessions.store(request.staging_id) or store
        with (
            store.admission.call_with(destination.admission, context.is_active),
            self._library.sessions.using(request.staging_id) as staging,
            ExitStack() as stack,
        ):
            image = store.read_valid(key.image_id)
            source = stack.enter_context(closing(_open_file(store.datastore, image, request.source_name)))
            store.read_valid(key.image_id)  # again, now that it cannot be purged any more
            if request.HasField("expected_source"):
                _require_same(source, request.expected_source, f"{request.source_name} of {key}")
            whole = request.source_offset == 0 and request.length >= source.size
            if whole and not staging.store.datastore.shares_extents_with(store.datastore):
                staging.store.require_space(_needed(image, request.source_name, staging.store.datastore))
            target = stack.enter_context(closing(staging.open_writable(request.name)))
            done = 0
            while done < request.length and (not done or time.monotonic() < until) and context.is_active():
                piece = min(CLONE_PIECE, request.length - done)
                moved = target.clone(source, request.source_offset + done, request.offset + done, piece, progress)
                if not moved:
                    break
                done += moved
            source.require_same()
        return pb.CloneRangeResponse(done_bytes=done, cloned_bytes=progress.amount.cloned)

    def CloneDisk(self, request: pb.CloneDiskRequest, context: grpc.ServicerContext) -> Iterator[pb.CloneDiskResponse]:
        key = image_key(request.source)
        store = self._library.store(key.datastore)

        def clone(progress: Progress) -> None:
            with self._library.sessions.using(request.staging_id) as staging, OpenImage(store, key.image_id) as opened:
                require_space_for_copy(opened, staging.store)
                clone_files(opened, staging, progress, disk_only=True)

        destination = self._library.sessions.store(request.staging_id) or store
        operation: Operation[None] = self._library.clones.start(
            "", f"clone {key}", clone, lambda: store.admission.copy_to(destination.admission)
        )
        with operation.attend() as leave:
            if not context.add_callback(leave):
                return
            for amount in operation.amounts(PROGRESS_SECONDS):
                if not context.is_active():
                    return
                yield pb.CloneDiskResponse(done_bytes=amount.done, total_bytes=amount.total, cloned_bytes=amount.cloned)
            operation.result()
            amount = operation.progress.amount
            yield pb.CloneDiskResponse(done_bytes=amount.done, total_bytes=amount.total, cloned_bytes=amount.cloned)

    def CommitStaging(
        self, request: pb.CommitStagingRequest, context: grpc.ServicerContext
    ) -> pb.CommitStagingResponse:
        wait = lock_timeout(request)
        copied_from = image_key(request.copied_from) if request.HasField("copied_from") else "-"

        def work() -> pb.CommitStagingResponse:
            image, renames = self._library.sessions.commit(
                request.staging_id, context.time_remaining(), lock_timeout=wait
            )
            _log.info("published image=%s copied_from=%s", image.key, copied_from)
            return pb.CommitStagingResponse(
                image=image_message(image), renamed_files=renames, publish_time=timestamp(image.touched_ns or 0)
            )

        store = self._library.sessions.store(request.staging_id)
        with self._call(store, context):
            return self._requests.run(
                request.request_id,
                fingerprint("CommitStaging", request),
                work,
                context.time_remaining(),
                store.admission.stepping_aside if store else None,
            )

    def AbortStaging(self, request: pb.AbortStagingRequest, context: grpc.ServicerContext) -> pb.AbortStagingResponse:
        with self._call(self._library.sessions.store(request.staging_id), context, frees=True):
            self._library.sessions.abort(request.staging_id, context.time_remaining())
        return pb.AbortStagingResponse()

    def _call(
        self, store: ImageStore | None, context: grpc.ServicerContext, *, frees: bool = False
    ) -> AbstractContextManager[None]:
        """A place for a long call on the datastore of a staging directory, if there is one."""
        return store.admission.long_call(context.is_active, frees=frees) if store else nullcontext()

    @contextmanager
    def _changing(self, staging_id: str, name: str, context: grpc.ServicerContext) -> Iterator[StagingDirectory]:
        """For a short change of the file of that name; FileNotInImage when there is none."""
        store = self._library.sessions.store(staging_id)
        with (
            store.admission.call(context.is_active) if store else nullcontext(),
            self._library.sessions.using(staging_id) as staging,
        ):
            try:
                yield staging
            except FileNotFoundError:
                raise _not_staged(name) from None

    def _transfer(self, staging_id: str) -> AbstractContextManager[None]:
        store = self._library.sessions.store(staging_id)
        return store.admission.transfer() if store else nullcontext()

    def _open_known(self, store: ImageStore, key: ImageKey, name: str) -> ReadableFile:
        """An image's file where the catalogue has it: who holds each file that is read is not to read each image."""
        if known := self._library.catalog.get(key):
            with suppress(FileNotInImage):
                return _open_file(store.datastore, known, name)
        return _open_file(store.datastore, store.read(key.image_id), name)

    @contextmanager
    def _open_for_reading(self, request: pb.ReadFileRequest) -> Iterator[ReadableFile]:
        if request.WhichOneof("from") == "staging_id":
            with (
                self._transfer(request.staging_id),
                self._library.sessions.using(request.staging_id) as staging,
                closing(_open_staged(staging, request.name)) as file,
            ):
                yield file
            return
        key = image_key(request.ref)
        store = self._library.store(key.datastore)
        with store.admission.transfer():
            image = store.read(key.image_id)
            with closing(_open_file(store.datastore, image, request.name)) as file:
                if request.HasField("expected"):
                    _require_same(file, request.expected, f"{request.name} of {key}")
                yield file


def _open_staged(staging: StagingDirectory, name: str) -> ReadableFile:
    with suppress(FileNotFoundError):
        return staging.open_readable(name)
    raise _not_staged(name)


def _not_staged(name: str) -> FileNotInImage:
    return FileNotInImage(f"the staging directory has no file {name!r}")


def _open_file(datastore: Datastore, image: Image, name: str) -> ReadableFile:
    if any(file.name == name for file in image.files):
        with suppress(FileNotFoundError):
            return datastore.open_readable(image.path(name))
    raise FileNotInImage(f"{image.key} has no file {name!r}")


def _require_same(file: ReadableFile, expected: ImageFile, what: str) -> None:
    """Asked of the open file: what has its name may be replaced at any time."""
    known = (expected.inode, expected.modify_time.ToNanoseconds(), expected.size_bytes)
    if (file.inode, file.modified_ns, file.size) != known:
        raise FileChanged(f"{what} is not the file that the caller expects: look at the image again")


def _needed(image: Image, name: str, destination: Datastore) -> int:
    """The space that a copy of one file takes."""
    [file] = [file for file in image.files if file.name == name]
    return max(file.allocated, file.size) if destination.fills_holes else file.allocated


def _with_first(first: pb.WriteFileRequest, rest: Iterator[pb.WriteFileRequest]) -> Iterator[pb.WriteFileRequest]:
    yield first
    yield from rest


def _check_range(offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > LARGEST_FILE:
        raise InvalidRequest(f"offset {offset} and length {length} are not in a file of at most {LARGEST_FILE} bytes")
