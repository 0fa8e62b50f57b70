"""The Python client of a sidecar: what imagectl, the mount and other programs use.

    with SidecarClient() as sidecar:
        for image in sidecar.images("one"):
            print(image.ref.image_id, image.allocated_bytes)
        sidecar.copy("one/debian-12", "two/debian-12").wait()

Answers are the messages of `protos.images.v1`. Images are named by ImageRef or by "DATASTORE/IMAGE". Errors are the
classes of `sidecar.errors`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from protos.images.v1 import datastore_service_pb2 as datastore_wire
from protos.images.v1 import image_service_pb2 as wire
from protos.images.v1.datastore_service_pb2 import Lock, LockKind
from protos.images.v1.image_service_pb2 import CopyImageResponse, ValidateImageResponse, WatchImagesResponse
from protos.images.v1.staging_service_pb2 import (
    CloneDiskResponse,
    CloneRangeResponse,
    CommitStagingResponse,
    ReadFileResponse,
    WriteFileResponse,
)
from protos.images.v1.types_pb2 import Datastore, FileKind, Image, ImageFile, ImageRef, ImageState
from sidecar import errors
from sidecar.client_calls import AnswerStream, Caller, default_address, new_request_id
from sidecar.client_holding import Holder
from sidecar.client_maintenance import DeletedImage, Maintenance, ReapResponse, Scan, Sweep, SweepResult
from sidecar.client_staging import Hole, Part, Staging, as_duration, as_ref, parse_ref, read_file

__all__ = [
    "MAX_COMPANION_BYTES",
    "CloneDiskResponse",
    "CloneRangeResponse",
    "CommitStagingResponse",
    "CopyCall",
    "CopyImageResponse",
    "Datastore",
    "DeletedImage",
    "FileKind",
    "Holder",
    "Hole",
    "Image",
    "ImageFile",
    "ImageRef",
    "ImageState",
    "Lock",
    "LockKind",
    "Part",
    "ReadFileResponse",
    "ReapResponse",
    "Scan",
    "SidecarClient",
    "Staging",
    "Sweep",
    "SweepResult",
    "ValidateImageResponse",
    "WatchCall",
    "WatchImagesResponse",
    "WriteFileResponse",
    "default_address",
    "errors",
    "parse_ref",
]

# The most that `update_metadata` takes of one file; what is staged with an image may be larger.
MAX_COMPANION_BYTES = 1 << 20
# A change waits up to 30 s for its image's lock; its deadline leaves the sidecar the time to say who holds it.
LOCK_SECONDS = 45.0
# Purging frees the bytes before it answers; file systems need their time for large files of many extents.
PURGE_SECONDS = 300.0


class CopyCall(AnswerStream[CopyImageResponse]):
    """A copy that runs: iterate it for its progress, or `wait` for its end. `cancel` ends it with nothing made."""

    def wait(self, progress: Callable[[CopyImageResponse], None] | None = None) -> Image:
        """The image when it is published; `progress` is called with every answer until then.

        Raises the error of the copy, OperationCancelled when it was cancelled. What `progress` raises cancels it.
        """
        image: Image | None = None
        with self:
            try:
                for answer in self:
                    if progress is not None:
                        progress(answer)
                    if answer.HasField("image"):
                        image = answer.image
            except errors.ImagesError:
                if image is None:
                    raise
        # Read to its end: a call that is left at its last answer is cancelled, and the sidecar would log it as that.
        if image is not None:
            return image
        raise errors.InternalError("the sidecar ended the copy without saying what it made: see its log")


class WatchCall(AnswerStream[WatchImagesResponse]):
    """Every image, then every change, until `cancel`, which ends the iteration without an error.

    The other errors are raised; the caller goes on with another `watch` and the last answer's resume token.
    """

    def __next__(self) -> WatchImagesResponse:
        try:
            return super().__next__()
        except errors.ImagesError:
            if self.cancelled:
                raise StopIteration from None
            raise


class SidecarClient:
    """A connection to a sidecar; safe to share between threads, and closed at the end of its `with`.

    `address`: unix:PATH or HOST:PORT; `default_address()` when None. Nothing is connected before the first call.
    `timeout`: seconds that one call may take, retries included. Calls that wait for a lock or for a disk may take
    longer: they have their own, and at least this one. Streams have none.

    Changes take a `lock_timeout`: how many seconds they may wait for the lock of an image that another process is
    changing, before LockTimeout; as long as the sidecar is configured to when None, and never longer.
    """

    def __init__(self, address: str | None = None, *, timeout: float = 30.0) -> None:
        self._caller = Caller(address or default_address(), timeout)

    @property
    def address(self) -> str:
        """Where the sidecar is, as it is connected to."""
        return self._caller.address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call that runs, and the connection."""
        self._caller.close()

    def cancel_calls(self) -> None:
        """Ends every call that runs, and each that begins from now on, with OperationCancelled; from any thread.

        Staging directories can still be aborted. For who is to stop, and waits in a call.
        """
        self._caller.cancel_calls()

    def wait_ready(self, timeout: float) -> None:
        """Returns when the sidecar serves; raises SidecarUnavailable when it does not within `timeout` seconds."""
        self._caller.wait_ready(timeout)

    def datastores(self) -> list[Datastore]:
        """Every datastore of the sidecar."""
        answer = self._caller.unary(self._caller.datastores.ListDatastores, datastore_wire.ListDatastoresRequest())
        return list(answer.datastores)

    def datastore(self, name: str) -> Datastore:
        """One datastore, by name; raises DatastoreNotFound."""
        answer = self._caller.unary(self._caller.datastores.GetDatastore, datastore_wire.GetDatastoreRequest(name=name))
        return answer.datastore

    def locks(self, datastore: str) -> list[Lock]:
        """The locks of one datastore that somebody holds now, by path, each with its holder."""
        request = datastore_wire.ListLocksRequest(datastore=datastore)
        return list(self._caller.unary(self._caller.datastores.ListLocks, request).locks)

    def images(
        self,
        datastore: str = "",
        *,
        states: Iterable[ImageState.ValueType] = (),
        image_id: str = "",
        page_size: int = 0,
    ) -> Iterator[Image]:
        """Images, by datastore and id. Without `states`: the valid and the incomplete ones.

        Pages are fetched as they are needed. `image_pages` has what this leaves out: which datastores are not whole.
        """
        for page in self.image_pages(datastore, states=states, image_id=image_id, page_size=page_size):
            yield from page.images

    def image_pages(
        self,
        datastore: str = "",
        *,
        states: Iterable[ImageState.ValueType] = (),
        image_id: str = "",
        page_size: int = 0,
    ) -> Iterator[wire.ListImagesResponse]:
        """The pages of `images`, with the number of all and the datastores whose images are not all known."""
        request = wire.ListImagesRequest(datastore=datastore, states=states, image_id=image_id, page_size=page_size)
        while True:
            page = self._caller.unary(self._caller.images.ListImages, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def image(self, ref: ImageRef | str, *, with_vms: bool = False) -> Image:
        """One image, read from its datastore, with its metadata and its users; raises ImageNotFound.

        `with_vms`: the users are also the VMs that need it, running or not, for which all VMs are read.
        """
        request = wire.GetImageRequest(ref=as_ref(ref), with_vms=with_vms)
        return self._caller.unary(self._caller.images.GetImage, request).image

    def validate(
        self, ref: ImageRef | str, *, repair: bool = False, lock_timeout: float | None = None
    ) -> ValidateImageResponse:
        """Checks that the image is whole; raises ImageIncomplete with what is missing.

        `repair`: an image that only lost its timestamp file gets a new one.
        """
        request = wire.ValidateImageRequest(
            ref=as_ref(ref), repair=repair, request_id=new_request_id(), lock_timeout=as_duration(lock_timeout)
        )
        return self._caller.unary(self._caller.images.ValidateImage, request, timeout=self._at_least(LOCK_SECONDS))

    def touch(self, ref: ImageRef | str, *, lock_timeout: float | None = None) -> datetime:
        """Notes that the image is in use now; returns the time that was noted, in UTC."""
        request = wire.TouchImageRequest(
            ref=as_ref(ref), request_id=new_request_id(), lock_timeout=as_duration(lock_timeout)
        )
        answer = self._caller.unary(self._caller.images.TouchImage, request, timeout=self._at_least(LOCK_SECONDS))
        return answer.touch_time.ToDatetime(tzinfo=UTC)

    def copy(
        self,
        source: ImageRef | str,
        destination: ImageRef | str,
        *,
        request_id: str | None = None,
        lock_timeout: float | None = None,
    ) -> CopyCall:
        """Starts a copy. A second one of the same `request_id` finds the first instead of starting another."""
        request = wire.CopyImageRequest(
            source=as_ref(source),
            destination=as_ref(destination),
            request_id=request_id or new_request_id(),
            lock_timeout=as_duration(lock_timeout),
        )
        return CopyCall(self._caller, self._caller.start(self._caller.images.CopyImage, request))

    def delete(self, ref: ImageRef | str, *, force: bool = False, lock_timeout: float | None = None) -> None:
        """Tombstones the image; with `force`, purges it at once, or raises ImageInUse with what uses it."""
        request = wire.DeleteImageRequest(
            ref=as_ref(ref), force=force, request_id=new_request_id(), lock_timeout=as_duration(lock_timeout)
        )
        timeout = self._at_least(PURGE_SECONDS if force else LOCK_SECONDS)
        self._caller.unary(self._caller.images.DeleteImage, request, timeout=timeout)

    def restore(self, ref: ImageRef | str, *, lock_timeout: float | None = None) -> Image:
        """Takes the tombstone away; returns the image as it is then."""
        request = wire.RestoreImageRequest(
            ref=as_ref(ref), request_id=new_request_id(), lock_timeout=as_duration(lock_timeout)
        )
        return self._caller.unary(self._caller.images.RestoreImage, request, timeout=self._at_least(LOCK_SECONDS)).image

    def purge(self, ref: ImageRef | str, *, lock_timeout: float | None = None) -> int:
        """Frees a tombstoned image; returns the bytes that its files had allocated."""
        request = wire.PurgeImageRequest(
            ref=as_ref(ref), request_id=new_request_id(), lock_timeout=as_duration(lock_timeout)
        )
        return self._caller.unary(
            self._caller.images.PurgeImage, request, timeout=self._at_least(PURGE_SECONDS)
        ).freed_bytes

    def update_metadata(
        self,
        ref: ImageRef | str,
        *,
        files: Mapping[str, bytes] | None = None,
        remove: Iterable[str] = (),
        lock_timeout: float | None = None,
    ) -> Image:
        """Writes and removes companion files of an image, by name; returns the image as it is then."""
        request = wire.UpdateMetadataRequest(
            ref=as_ref(ref),
            files=files or {},
            remove_files=remove,
            request_id=new_request_id(),
            lock_timeout=as_duration(lock_timeout),
        )
        return self._caller.unary(
            self._caller.images.UpdateMetadata, request, timeout=self._at_least(LOCK_SECONDS)
        ).image

    def watch(self, datastore: str = "", *, resume_token: str = "") -> WatchCall:
        """Every image, then every change; from the answer of `resume_token` on, where the sidecar still can."""
        request = wire.WatchImagesRequest(datastore=datastore, resume_token=resume_token)
        return WatchCall(self._caller, self._caller.start(self._caller.images.WatchImages, request))

    @property
    def maintenance(self) -> Maintenance:
        """Scans and sweeps of datastores, and what is reaped there."""
        return Maintenance(self._caller)

    def create_staging(self, ref: ImageRef | str, *, expected_bytes: int = 0, request_id: str | None = None) -> Staging:
        """A staging directory for the image to be; raises ImageAlreadyExists, or NoSpace for `expected_bytes`."""
        return Staging(self._caller, as_ref(ref), expected_bytes, request_id)

    def read_file(
        self,
        source: ImageRef | str | Staging,
        name: str,
        offset: int = 0,
        length: int = 0,
        *,
        expected: ImageFile | None = None,
    ) -> Iterator[ReadFileResponse]:
        """Data and holes of a file, in order; `length` 0 is to the end. Closing the iterator ends the call.

        FileChanged when the file is another one than the `expected` one, which only an image's file can be.
        """
        return read_file(self._caller, source, name, offset, length, expected)

    def open_holder(self) -> Holder:
        """What keeps files of images in use while somebody reads them: `with client.open_holder() as holder:`."""
        return Holder(self._caller)

    def _at_least(self, seconds: float) -> float:
        return max(seconds, self._caller.timeout)
