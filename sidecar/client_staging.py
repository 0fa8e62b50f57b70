"""Images in the making, from the client's side: a staging directory, and the data and holes that go into it."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from google.protobuf.duration_pb2 import Duration

from protos.images.v1 import staging_service_pb2 as wire
from protos.images.v1.types_pb2 import ImageFile, ImageRef
from sidecar import errors
from sidecar.client_calls import UNDO_SECONDS, Answer, AnswerStream, Caller, CallFuture, Outgoing, new_request_id

# What one message carries at most; the contract's limit.
MAX_DATA_BYTES = 1 << 20
# Publishing makes every file durable, which takes as long as the datastore needs to write what it has cached.
COMMIT_SECONDS = 1800.0
ABORT_SECONDS = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hole:
    """A range of a file that reads as zeroes and takes no space."""

    offset: int
    length: int


Part = tuple[int, bytes] | Hole


class Staging:
    """A staging directory that this client made: becomes an image by `commit`, or nothing.

    As a context manager it is aborted at the end unless it was committed. Every call on it renews its lease; who
    pauses for longer than `lease_seconds` calls `renew`. Safe to share between threads.
    """

    def __init__(self, caller: Caller, ref: ImageRef, expected_bytes: int, request_id: str | None) -> None:
        self.ref = ref
        self._caller = caller
        self._request = wire.CreateStagingRequest(
            ref=ref, expected_bytes=expected_bytes, request_id=request_id or new_request_id()
        )
        answer = caller.unary(
            caller.staging.CreateStaging, self._request, undo=lambda unwanted: self._abort(unwanted.staging_id)
        )
        self.id = answer.staging_id
        self.directory = answer.directory
        self.lease_seconds = answer.lease_seconds
        self._finished = False

    def renew(self) -> None:
        """Keeps the staging directory for another `lease_seconds`; raises StagingNotFound when it is gone."""
        answer = self._caller.unary(self._caller.staging.CreateStaging, self._request)
        if answer.staging_id != self.id:
            # The sidecar forgot the request and made another directory, which nobody needs.
            self._abort(answer.staging_id)
            raise errors.StagingNotFound(
                f"the staging directory {self.id} for {_text(self.ref)} is gone: the sidecar dropped it or was "
                "restarted; start again"
            )

    def write_file(self, name: str, parts: Iterable[Part], *, size: int | None = None) -> wire.WriteFileResponse:
        """Writes data and holes into the staged file `name`, which is made when it is not there.

        `parts` are (offset, data) and holes, in any order; data of any size. They are taken in another thread; what
        they raise is raised here, with the call cancelled. `size`: the file's size afterwards, in bytes; else as the
        writes leave it. Raises DeadlineExceeded when the sidecar takes none of them for minutes.
        """
        outgoing = Outgoing(_requests(self.id, name, parts, size))
        call: CallFuture[wire.WriteFileResponse] = self._caller.begin(
            lambda: self._caller.staging.WriteFile.future(outgoing)
        )
        outgoing.bind(call.cancel)
        try:
            return outgoing.result(self._caller, call)
        except errors.ImagesError:
            if outgoing.failure is not None:
                raise outgoing.failure from None
            raise
        finally:
            call.cancel()

    def rename_file(self, name: str, new_name: str) -> None:
        """Gives a staged file another name, in place of one that has it; FileNotInImage.

        Also after it was done, and the answer lost. Not to be called while somebody writes to it.
        """
        self._caller.unary(
            self._caller.staging.RenameFile,
            wire.RenameFileRequest(staging_id=self.id, name=name, new_name=new_name),
        )

    def remove_file(self, name: str) -> None:
        """Removes a staged file; FileNotInImage, also after it was done, and the answer lost."""
        self._caller.unary(self._caller.staging.RemoveFile, wire.RemoveFileRequest(staging_id=self.id, name=name))

    def clone_range(
        self,
        source_ref: ImageRef | str,
        source_name: str,
        source_offset: int,
        name: str,
        offset: int,
        length: int,
        expected: ImageFile | None = None,
    ) -> wire.CloneRangeResponse:
        """Copies up to `length` bytes of an image's file into the staged file `name`; the answer says how many.

        One call moves what about a second allows: call again for the rest. 0 bytes only at the end of the source.
        FileChanged when the source is another file than the `expected` one.
        """
        request = wire.CloneRangeRequest(
            source=as_ref(source_ref),
            source_name=source_name,
            source_offset=source_offset,
            staging_id=self.id,
            name=name,
            offset=offset,
            length=length,
            expected_source=expected,
        )
        return self._caller.unary(self._caller.staging.CloneRange, request)

    def clone_disk(self, source_ref: ImageRef | str) -> Iterator[wire.CloneDiskResponse]:
        """Copies the whole disk of an image into the staging directory; yields its progress, at least once.

        Not iterating to the end, and closing the iterator, cancels it.
        """
        request = wire.CloneDiskRequest(source=as_ref(source_ref), staging_id=self.id)
        return closing(AnswerStream(self._caller, self._caller.start(self._caller.staging.CloneDisk, request)))

    def commit(
        self,
        *,
        copied_from: ImageRef | str | None = None,
        request_id: str | None = None,
        lock_timeout: float | None = None,
    ) -> wire.CommitStagingResponse:
        """Checks the disk and publishes it as the image; afterwards the image is there, durable and complete.

        A second call of the same `request_id` has the answer of the first one, which may have been lost.
        `lock_timeout`: as of the changes of SidecarClient.

        After an error the staging directory is as it was, to be mended and committed again, or aborted. Gone is it
        after ImageAlreadyExists, and when the disk did not take what was staged: StagingLost, or NoSpace that says so.
        """
        request = wire.CommitStagingRequest(
            staging_id=self.id,
            copied_from=as_ref(copied_from) if copied_from is not None else None,
            request_id=request_id or new_request_id(),
            lock_timeout=as_duration(lock_timeout),
        )
        answer = self._caller.unary(
            self._caller.staging.CommitStaging, request, timeout=max(COMMIT_SECONDS, self._caller.timeout)
        )
        self._finished = True
        return answer

    def abort(self) -> None:
        """Drops the staging directory; nothing happens when it was committed or dropped already.

        When it returns, the directory is not an image and never will be. StagingPublished: a commit whose answer was
        lost made it the image. DeadlineExceeded: such a commit still runs; it is stopped if that is possible.
        """
        if not self._finished:
            self._abort(self.id)
            self._finished = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.abort()
        except errors.StagingPublished as failure:
            # A commit that failed here, as its answer was lost: that error is what the caller sees.
            self._finished = True
            _log.info("staging not aborted staging=%s ref=%s reason=%s", self.id, _text(self.ref), failure)
        except errors.ImagesError as failure:
            # What went wrong before is what the caller must see; the lease drops the directory in any case.
            _log.warning("staging not aborted staging=%s ref=%s error=%s", self.id, _text(self.ref), failure)

    def _abort(self, staging_id: str) -> None:
        request = wire.AbortStagingRequest(staging_id=staging_id)
        # Who was interrupted does not wait long: the sidecar has the request then, and goes on by itself.
        timeout = UNDO_SECONDS if self._caller.cancelled else max(ABORT_SECONDS, self._caller.timeout)
        with contextlib.suppress(errors.StagingNotFound):
            self._caller.unary(self._caller.staging.AbortStaging, request, timeout=timeout, takes_back=True)


def read_file(
    caller: Caller,
    source: ImageRef | str | Staging,
    name: str,
    offset: int,
    length: int,
    expected: ImageFile | None,
) -> Iterator[wire.ReadFileResponse]:
    """The data and holes of a file of an image or a staging directory, in order of their offsets."""
    request = wire.ReadFileRequest(name=name, offset=offset, length=length, expected=expected)
    if isinstance(source, Staging):
        request.staging_id = source.id
    else:
        request.ref.CopyFrom(as_ref(source))
    return closing(AnswerStream(caller, caller.start(caller.staging.ReadFile, request)))


def closing(stream: AnswerStream[Answer]) -> Iterator[Answer]:
    """The answers; the call ends when the iterator is closed."""
    with stream:
        yield from stream


def as_ref(ref: ImageRef | str) -> ImageRef:
    """The ref itself, or what "DATASTORE/IMAGE" names."""
    return parse_ref(ref) if isinstance(ref, str) else ref


def as_duration(seconds: float | None) -> Duration | None:
    """As a message; raises InvalidRequest for what is no length of time."""
    if seconds is None:
        return None
    duration = Duration()
    try:
        duration.FromNanoseconds(round(seconds * 1e9))
    except (OverflowError, ValueError):
        raise errors.InvalidRequest(f"{seconds} s cannot be waited") from None
    return duration


def parse_ref(text: str) -> ImageRef:
    """The image that "DATASTORE/IMAGE" names; raises InvalidRequest when the text is not of that form."""
    datastore, slash, image_id = text.partition("/")
    if not (datastore and slash and image_id) or "/" in image_id or not text.isprintable():
        raise errors.InvalidRequest(f"{text!a} does not name an image: write DATASTORE/IMAGE, such as one/debian-12")
    return ImageRef(datastore=datastore, image_id=image_id)


def _requests(staging_id: str, name: str, parts: Iterable[Part], size: int | None) -> Iterator[wire.WriteFileRequest]:
    # The first message names the file, and its size when it is known: a file of no parts is made too.
    yield wire.WriteFileRequest(staging_id=staging_id, name=name, size_bytes=size)
    for part in parts:
        if isinstance(part, Hole):
            if part.length:
                yield wire.WriteFileRequest(offset=part.offset, hole_bytes=part.length)
            continue
        offset, data = part
        if len(data) <= MAX_DATA_BYTES:
            if data:
                yield wire.WriteFileRequest(offset=offset, data=data)
            continue
        view = memoryview(data)
        for start in range(0, len(data), MAX_DATA_BYTES):
            yield wire.WriteFileRequest(offset=offset + start, data=bytes(view[start : start + MAX_DATA_BYTES]))


def _text(ref: ImageRef) -> str:
    return f"{ref.datastore}/{ref.image_id}"
