"""ImageService: what the contract says, in terms of the domain."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeAlias, TypeVar

import grpc

from protos.images.v1 import image_service_pb2 as pb
from protos.images.v1 import image_service_pb2_grpc as pb_grpc
from protos.images.v1 import types_pb2
from sidecar.errors import ImagesError, InvalidMetadata, InvalidRequest
from sidecar.images.checking import touch_image, validate_image
from sidecar.images.deletion import delete_image, purge_image, restore_image
from sidecar.images.image import Image, ImageKey
from sidecar.images.library import Library
from sidecar.images.metadata import read_metadata, update_companions
from sidecar.images.names import manifest_name, metadata_name
from sidecar.images.store import ImageStore
from sidecar.images.usage import uses_of_image
from sidecar.images.watching import Watches
from sidecar.services.messages import (
    datastore_message,
    image_key,
    image_message,
    image_ref,
    image_states,
    lock_timeout,
    timestamp,
)
from sidecar.services.requests import Requests, fingerprint, wanted_by

PROGRESS_SECONDS = 0.25
DEFAULT_PAGE, LARGEST_PAGE = 500, 5_000
FIRST_LISTING_SECONDS = 10.0
IMAGES_A_MESSAGE = 500
BYTES_A_MESSAGE = 4 << 20  # of images: half of what a message has at most

Answer = TypeVar("Answer")
Change: TypeAlias = (
    pb.ValidateImageRequest
    | pb.TouchImageRequest
    | pb.DeleteImageRequest
    | pb.RestoreImageRequest
    | pb.PurgeImageRequest
    | pb.UpdateMetadataRequest
)


class ImageServicer(pb_grpc.ImageServiceServicer):
    """Translates; the domain decides."""

    def __init__(self, library: Library, requests: Requests, watches: Watches) -> None:
        self._library = library
        self._requests = requests
        self._watches = watches

    def ListImages(self, request: pb.ListImagesRequest, context: grpc.ServicerContext) -> pb.ListImagesResponse:
        if not 0 <= request.page_size <= LARGEST_PAGE:
            raise InvalidRequest(f"page_size is {request.page_size}; it is at most {LARGEST_PAGE}, 0 for the default")
        discoveries = (
            [self._library.discovery(request.datastore)]
            if request.datastore
            else list(self._library.discoveries.values())
        )
        # Only the first listing after the start ever waits here.
        wait = min(context.time_remaining() or FIRST_LISTING_SECONDS, FIRST_LISTING_SECONDS) * 0.9
        until = time.monotonic() + wait
        for discovery in discoveries:
            discovery.wait_first_scan(max(until - time.monotonic(), 0))
        unknown = [d for d in discoveries if not d.complete or d.status.fault]
        page = self._library.catalog.page(
            [discovery.store.datastore.name for discovery in discoveries],
            image_states(request.states),
            request.image_id,
            request.page_token,
            request.page_size or DEFAULT_PAGE,
        )
        images = next(_batches(page.images, LARGEST_PAGE))
        cut = len(images) < len(page.images)
        return pb.ListImagesResponse(
            images=images,
            next_page_token=str(page.images[len(images) - 1].key) if cut else page.after or "",
            total_size=page.total,
            incomplete_datastores=[
                f"{d.store.datastore.name}: {d.status.fault or 'its images are still being read'}" for d in unknown
            ],
        )

    def GetImage(self, request: pb.GetImageRequest, context: grpc.ServicerContext) -> pb.GetImageResponse:
        key = image_key(request.ref)
        with self._library.using(key.datastore, context.is_active) as store:
            discovery = self._library.discovery(key.datastore)
            image = discovery.read(key.image_id)
            message = image_message(image)
            for field, name in (("metadata_json", metadata_name), ("manifest_json", manifest_name)):
                try:
                    setattr(message, field, read_metadata(store.datastore, image, name(key.image_id)))
                except InvalidMetadata as error:
                    message.problems.append(error.message)
                except FileNotFoundError:
                    # Removed just now: the file, or the image, which is an error then.
                    discovery.read(key.image_id)
            with suppress(FileNotFoundError):  # deleted just now
                paths = [image.path(file.name) for file in image.files]
                message.users.extend(store.datastore.users(paths, key.image_id))
            if request.with_vms:
                message.users.extend(_vms_using(store, key, wanted_by(context)))
        return pb.GetImageResponse(image=message)

    def ValidateImage(
        self, request: pb.ValidateImageRequest, context: grpc.ServicerContext
    ) -> pb.ValidateImageResponse:
        key, timeout = image_key(request.ref), lock_timeout(request)

        def work(store: ImageStore) -> pb.ValidateImageResponse:
            image, repaired = validate_image(store, key.image_id, repair=request.repair, lock_timeout=timeout)
            return pb.ValidateImageResponse(image=image_message(image), repaired=repaired)

        if request.repair:
            return self._once("ValidateImage", request, context, work)
        with self._library.using(key.datastore, context.is_active) as store:
            return work(store)

    def TouchImage(self, request: pb.TouchImageRequest, context: grpc.ServicerContext) -> pb.TouchImageResponse:
        key, timeout = image_key(request.ref), lock_timeout(request)

        def work(store: ImageStore) -> pb.TouchImageResponse:
            return pb.TouchImageResponse(touch_time=timestamp(touch_image(store, key.image_id, lock_timeout=timeout)))

        return self._once("TouchImage", request, context, work)

    def CopyImage(self, request: pb.CopyImageRequest, context: grpc.ServicerContext) -> Iterator[pb.CopyImageResponse]:
        operation = self._library.start_copy(
            image_key(request.source),
            image_key(request.destination),
            request.request_id,
            lock_timeout=lock_timeout(request),
        )
        with operation.attend() as leave:
            if not context.add_callback(leave):
                return
            for amount in operation.amounts(PROGRESS_SECONDS):
                if not context.is_active():
                    return
                yield pb.CopyImageResponse(done_bytes=amount.done, total_bytes=amount.total, cloned_bytes=amount.cloned)
            image = operation.result()
            amount = operation.progress.amount
            yield pb.CopyImageResponse(
                done_bytes=amount.done,
                total_bytes=amount.total,
                cloned_bytes=amount.cloned,
                image=image_message(image),
            )

    def DeleteImage(self, request: pb.DeleteImageRequest, context: grpc.ServicerContext) -> pb.DeleteImageResponse:
        key, timeout = image_key(request.ref), lock_timeout(request)

        def work(store: ImageStore) -> pb.DeleteImageResponse:
            if request.force:
                purge_image(store, key.image_id, force=True, lock_timeout=timeout, check=wanted_by(context))
            else:
                delete_image(store, key.image_id, lock_timeout=timeout)
            return pb.DeleteImageResponse()

        return self._once("DeleteImage", request, context, work, long=request.force)

    def RestoreImage(self, request: pb.RestoreImageRequest, context: grpc.ServicerContext) -> pb.RestoreImageResponse:
        key, timeout = image_key(request.ref), lock_timeout(request)

        def work(store: ImageStore) -> pb.RestoreImageResponse:
            return pb.RestoreImageResponse(
                image=image_message(restore_image(store, key.image_id, lock_timeout=timeout))
            )

        return self._once("RestoreImage", request, context, work)

    def PurgeImage(self, request: pb.PurgeImageRequest, context: grpc.ServicerContext) -> pb.PurgeImageResponse:
        key, timeout = image_key(request.ref), lock_timeout(request)

        def work(store: ImageStore) -> pb.PurgeImageResponse:
            freed = purge_image(store, key.image_id, lock_timeout=timeout, check=wanted_by(context))
            return pb.PurgeImageResponse(freed_bytes=freed)

        return self._once("PurgeImage", request, context, work, long=True)

    def UpdateMetadata(
        self, request: pb.UpdateMetadataRequest, context: grpc.ServicerContext
    ) -> pb.UpdateMetadataResponse:
        key, timeout = image_key(request.ref), lock_timeout(request)

        def work(store: ImageStore) -> pb.UpdateMetadataResponse:
            image: Image = update_companions(
                store, key.image_id, request.files, request.remove_files, lock_timeout=timeout
            )
            return pb.UpdateMetadataResponse(image=image_message(image))

        return self._once("UpdateMetadata", request, context, work)

    def WatchImages(
        self, request: pb.WatchImagesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchImagesResponse]:
        if request.datastore:
            self._library.discovery(request.datastore)
        context.add_callback(self._library.catalog.wake)
        for event in self._watches.follow(request.datastore, request.resume_token, context.is_active):
            datastores = [datastore_message(discovery) for discovery in event.datastores]
            told = 0
            for images in _batches(event.images, IMAGES_A_MESSAGE):
                first, last = told == 0, told + len(images) == len(event.images)
                told += len(images)
                yield pb.WatchImagesResponse(
                    snapshot_start=event.everything and first,
                    snapshot_complete=event.everything and last,
                    images=images,
                    removed=[image_ref(key) for key in event.removed] if last else [],
                    resume_token=event.resume_token if last else "",
                    datastores=datastores if first else [],
                    incomplete_datastores=event.incomplete if event.everything else [],
                )

    def _once(
        self,
        method: str,
        request: Change,
        context: grpc.ServicerContext,
        work: Callable[[ImageStore], Answer],
        *,
        long: bool = False,
    ) -> Answer:
        """One change of one image. Whoever waits for a call of the same request id steps aside for others.

        `long`: one that frees the bytes of an image, which on some file systems takes as long as there are many.
        """
        with self._library.using(request.ref.datastore, context.is_active, long=long) as store:
            return self._requests.run(
                request.request_id,
                fingerprint(method, request),
                lambda: work(store),
                context.time_remaining(),
                store.admission.stepping_aside,
            )


def _vms_using(store: ImageStore, key: ImageKey, check: Callable[[], None]) -> list[str]:
    """In words. When that cannot be known, so it says: no answer here would read as "nobody"."""
    try:
        return list(uses_of_image(store.stores, key, check=check))
    except ImagesError as error:
        return [f"unknown, {error.message}"]


def _batches(images: Sequence[Image], most: int) -> Iterator[list[types_pb2.Image]]:
    """The images as messages, as many at once as one answer carries; at least one batch, which may be empty."""
    batch: list[types_pb2.Image] = []
    size = 0
    for image in images:
        message = image_message(image)
        length = message.ByteSize()
        if batch and (len(batch) == most or size + length > BYTES_A_MESSAGE):
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += length
    yield batch
