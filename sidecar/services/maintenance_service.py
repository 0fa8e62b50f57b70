"""MaintenanceService: what the contract says, in terms of the domain."""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from protos.images.v1 import maintenance_service_pb2 as pb
from protos.images.v1 import maintenance_service_pb2_grpc as pb_grpc
from sidecar.errors import InvalidRequest
from sidecar.images.image import Image, ImageState
from sidecar.images.library import Library
from sidecar.images.maintenance import RATE, SWEEP_GRACE_SECONDS, TIMEOUT_SECONDS, Maintenance
from sidecar.images.runs import Outcome, RunState, RunStatus
from sidecar.services.messages import image_message, timestamp
from sidecar.services.requests import Requests, fingerprint, wanted_by

DEFAULT_PAGE, LARGEST_PAGE = 500, 5_000
RESULTS_A_MESSAGE = 5_000
_MOST_TOLD = 1_000  # of what may be many, and is told in words

_STATES = {
    RunState.IDLE: pb.RUN_STATE_IDLE,
    RunState.INIT: pb.RUN_STATE_INIT,
    RunState.VM_SCAN: pb.RUN_STATE_VM_SCAN,
    RunState.IMAGE_MARK: pb.RUN_STATE_IMAGE_MARK,
    RunState.IMAGE_SWEEP: pb.RUN_STATE_IMAGE_SWEEP,
}
_OUTCOMES = {
    Outcome.DONE: pb.RUN_OUTCOME_DONE,
    Outcome.STOPPED: pb.RUN_OUTCOME_STOPPED,
    Outcome.FAILED: pb.RUN_OUTCOME_FAILED,
    Outcome.TIMED_OUT: pb.RUN_OUTCOME_TIMED_OUT,
}

Answer = TypeVar("Answer")
Change: TypeAlias = pb.StartScanRequest | pb.StartSweepRequest | pb.ReapRequest


class MaintenanceServicer(pb_grpc.MaintenanceServiceServicer):
    """Translates; the domain decides."""

    def __init__(self, library: Library, requests: Requests) -> None:
        self._library = library
        self._requests = requests

    def StartScan(self, request: pb.StartScanRequest, context: grpc.ServicerContext) -> pb.StartScanResponse:
        timeout = _seconds(request, "timeout", request.timeout, TIMEOUT_SECONDS)

        def work(maintenance: Maintenance) -> pb.StartScanResponse:
            maintenance.start_scan(
                request.request_id,
                vm_rate=request.vm_rate or RATE,
                image_rate=request.image_rate or RATE,
                timeout=timeout,
            )
            return pb.StartScanResponse(scan=_scan(maintenance))

        return self._once("StartScan", request, context, work)

    def GetScan(self, request: pb.GetScanRequest, context: grpc.ServicerContext) -> pb.GetScanResponse:
        return pb.GetScanResponse(scan=_scan(self._library.maintenance(request.datastore)))

    def StopScan(self, request: pb.StopScanRequest, context: grpc.ServicerContext) -> pb.StopScanResponse:
        maintenance = self._library.maintenance(request.datastore)
        maintenance.scans.stop(request.run_id)
        return pb.StopScanResponse(scan=_scan(maintenance))

    def ListUnusedImages(
        self, request: pb.ListUnusedImagesRequest, context: grpc.ServicerContext
    ) -> pb.ListUnusedImagesResponse:
        size = _page_size(request.page_size)
        with self._library.using(request.datastore, context.is_active):
            images = self._library.maintenance(request.datastore).unused(request.page_token, size + 1)
        return pb.ListUnusedImagesResponse(
            images=map(image_message, images[:size]),
            next_page_token=images[size - 1].key.image_id if len(images) > size else "",
        )

    def StartSweep(self, request: pb.StartSweepRequest, context: grpc.ServicerContext) -> pb.StartSweepResponse:
        timeout = _seconds(request, "timeout", request.timeout, TIMEOUT_SECONDS)
        grace = _seconds(request, "grace", request.grace, SWEEP_GRACE_SECONDS)

        def work(maintenance: Maintenance) -> pb.StartSweepResponse:
            maintenance.start_sweep(
                request.request_id,
                request.image_ids,
                rate=request.rate or RATE,
                timeout=timeout,
                grace=grace,
                dry_run=request.dry_run,
            )
            return pb.StartSweepResponse(sweep=_sweep(maintenance))

        return self._once("StartSweep", request, context, work)

    def GetSweep(self, request: pb.GetSweepRequest, context: grpc.ServicerContext) -> pb.GetSweepResponse:
        if request.skip_results < 0:
            raise InvalidRequest(f"skip_results is {request.skip_results}; it is not negative")
        maintenance = self._library.maintenance(request.datastore)
        answer = pb.GetSweepResponse(sweep=_sweep(maintenance))
        current = maintenance.sweeps.current()
        if current and current[0].run_id == answer.sweep.run.run_id:
            # Those that are counted, at most: what was decided meanwhile is for the next answer.
            end = min(answer.sweep.total_results, request.skip_results + RESULTS_A_MESSAGE)
            answer.results.extend(
                pb.SweepResult(
                    image_id=result.image_id, deleted=result.deleted, reason=result.reason, freed_bytes=result.freed
                )
                for result in current[1].results[request.skip_results : end]
            )
        return answer

    def StopSweep(self, request: pb.StopSweepRequest, context: grpc.ServicerContext) -> pb.StopSweepResponse:
        maintenance = self._library.maintenance(request.datastore)
        maintenance.sweeps.stop(request.run_id)
        return pb.StopSweepResponse(sweep=_sweep(maintenance))

    def ListDeletedImages(
        self, request: pb.ListDeletedImagesRequest, context: grpc.ServicerContext
    ) -> pb.ListDeletedImagesResponse:
        library = self._library
        discoveries = [library.discovery(request.datastore)] if request.datastore else [*library.discoveries.values()]
        names = [discovery.store.datastore.name for discovery in discoveries]
        page = library.catalog.page(
            names, frozenset((ImageState.TOMBSTONED,)), "", request.page_token, _page_size(request.page_size)
        )
        unknown = [d for d in discoveries if not d.complete or d.status.fault]
        return pb.ListDeletedImagesResponse(
            images=map(self._deleted, page.images),
            next_page_token=page.after or "",
            incomplete_datastores=[
                f"{d.store.datastore.name}: {d.status.fault or 'its images are still being read'}" for d in unknown
            ],
        )

    def Reap(self, request: pb.ReapRequest, context: grpc.ServicerContext) -> pb.ReapResponse:
        grace = _seconds(request, "grace", request.grace, -1.0)
        purge_grace = _seconds(request, "purge_grace", request.purge_grace, -1.0)

        def work(maintenance: Maintenance) -> pb.ReapResponse:
            reaped = maintenance.reap(grace if grace >= 0 else None)
            answer = pb.ReapResponse(
                staging_directories=reaped.staging,
                trash=reaped.trash,
                recovered_images=reaped.recovered,
                freed_bytes=reaped.freed,
                kept=reaped.kept[:_MOST_TOLD],
                faults=reaped.faults[:_MOST_TOLD],
            )
            if purge_grace >= 0:
                expired = maintenance.purge(purge_grace, check=wanted_by(context))
                answer.purged_images.extend(expired.purged)
                answer.freed_bytes += expired.freed
                answer.kept.extend(expired.kept[:_MOST_TOLD])
            return answer

        return self._once("Reap", request, context, work)

    def _deleted(self, image: Image) -> pb.DeletedImage:
        plan = self._library.maintenance(image.key.datastore).plan
        message = pb.DeletedImage(image=image_message(image))
        if plan.purge_interval and image.tombstoned_ns is not None:
            message.purge_time.CopyFrom(timestamp(image.tombstoned_ns + int(plan.tombstone_grace * 1e9)))
        return message

    def _once(
        self, method: str, request: Change, context: grpc.ServicerContext, work: Callable[[Maintenance], Answer]
    ) -> Answer:
        maintenance = self._library.maintenance(request.datastore)
        with self._library.using(request.datastore, context.is_active):
            return self._requests.run(
                request.request_id, fingerprint(method, request), lambda: work(maintenance), context.time_remaining()
            )


def _scan(maintenance: Maintenance) -> pb.Scan:
    name, current = maintenance.store.datastore.name, maintenance.scans.current()
    if current is None:
        return pb.Scan(run=_run(name, None))
    status, tally = current
    return pb.Scan(
        run=_run(name, status),
        read_vms=tally.vms,
        marked_images=tally.marked,
        used_images=tally.used,
        other_images=tally.others,
        unread_images=tally.unread[:_MOST_TOLD],
    )


def _sweep(maintenance: Maintenance) -> pb.Sweep:
    name, current = maintenance.store.datastore.name, maintenance.sweeps.current()
    if current is None:
        return pb.Sweep(run=_run(name, None))
    status, tally = current
    return pb.Sweep(
        run=_run(name, status),
        dry_run=tally.dry_run,
        deleted_images=tally.deleted,
        freed_bytes=tally.freed,
        total_results=len(tally.results),
    )


def _run(datastore: str, status: RunStatus | None) -> pb.MaintenanceRun:
    if status is None:
        return pb.MaintenanceRun(datastore=datastore, state=pb.RUN_STATE_IDLE)
    message = pb.MaintenanceRun(
        datastore=datastore,
        run_id=status.run_id,
        state=_STATES[status.state],
        reached_state=_STATES[status.reached],
        outcome=_OUTCOMES[status.outcome] if status.outcome else pb.RUN_OUTCOME_UNSPECIFIED,
        start_time=timestamp(status.started_ns),
        current_item=status.item,
        done_items=status.done,
        total_items=status.total,
    )
    if status.ended_ns:
        message.end_time.CopyFrom(timestamp(status.ended_ns))
    if status.error:
        message.error_reason, message.error = status.error.reason, status.error.message
    return message


def _page_size(size: int) -> int:
    if not 0 <= size <= LARGEST_PAGE:
        raise InvalidRequest(f"page_size is {size}; it is at most {LARGEST_PAGE}, 0 for the default")
    return size or DEFAULT_PAGE


def _seconds(request: Message, name: str, duration: Duration, default: float) -> float:
    """Of a field; the default when it is not set. InvalidRequest for what is negative."""
    if not request.HasField(name):
        return default
    seconds = duration.seconds + duration.nanos / 1e9
    if seconds < 0:
        raise InvalidRequest(f"{name} is {seconds:g} s; it is not negative")
    return seconds
