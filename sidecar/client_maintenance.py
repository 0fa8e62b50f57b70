"""Maintenance of datastores, from the client's side: scans, sweeps, and what they found."""

from collections.abc import Callable, Iterable, Iterator

from protos.images.v1 import maintenance_service_pb2 as wire
from protos.images.v1.maintenance_service_pb2 import (
    RUN_OUTCOME_DONE,
    RUN_OUTCOME_STOPPED,
    RUN_OUTCOME_TIMED_OUT,
    RUN_STATE_IDLE,
    DeletedImage,
    MaintenanceRun,
    ReapResponse,
    Scan,
    Sweep,
    SweepResult,
)
from protos.images.v1.types_pb2 import Image
from sidecar import errors
from sidecar.client_calls import Caller, new_request_id
from sidecar.client_staging import as_duration

# Freeing bytes takes its time for large files of many extents, and there may be many of them.
REAP_SECONDS = 1800.0
_PAGE = 1000

__all__ = ["DeletedImage", "Maintenance", "MaintenanceRun", "ReapResponse", "Scan", "Sweep", "SweepResult"]


class Maintenance:
    """The calls of MaintenanceService. A scan and a sweep go on without their caller: look at them, or stop them."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def start_scan(
        self,
        datastore: str,
        *,
        vm_rate: float = 0,
        image_rate: float = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Scan:
        """Starts a scan; TaskAlreadyRunning. Rates are VMs and images a minute, 0: the sidecar's; seconds of timeout.

        The request id is the id of the run.
        """
        request = wire.StartScanRequest(
            datastore=datastore,
            vm_rate=vm_rate,
            image_rate=image_rate,
            timeout=as_duration(timeout),
            request_id=request_id or new_request_id(),
        )
        return self._caller.unary(self._caller.maintenance.StartScan, request).scan

    def scan(self, datastore: str) -> Scan:
        """The scan of a datastore that is running, else the last one."""
        return self._caller.unary(self._caller.maintenance.GetScan, wire.GetScanRequest(datastore=datastore)).scan

    def stop_scan(self, datastore: str, run_id: str = "") -> Scan:
        """Asks the scan to end; with an id, only if it is that one."""
        request = wire.StopScanRequest(datastore=datastore, run_id=run_id)
        return self._caller.unary(self._caller.maintenance.StopScan, request).scan

    def wait_scan(self, datastore: str, run_id: str, progress: Callable[[Scan], object], pause: float = 0.25) -> Scan:
        """The scan when it has ended; `progress` is called with it several times a second until then.

        Raises the error that ended it: OperationCancelled when it was stopped, DeadlineExceeded by its timeout.
        """
        while True:
            scan = self.scan(datastore)
            _require_same(scan.run, run_id)
            progress(scan)
            if scan.run.state == RUN_STATE_IDLE:
                raise_outcome(scan.run, "scan")
                return scan
            self._caller.pause(pause)

    def start_sweep(
        self,
        datastore: str,
        image_ids: Iterable[str] = (),
        *,
        rate: float = 0,
        timeout: float | None = None,
        grace: float | None = None,
        dry_run: bool = False,
        request_id: str | None = None,
    ) -> Sweep:
        """Starts a sweep of these images, or of all; TaskAlreadyRunning. `rate` are deletions a minute.

        `grace`: what was touched so many seconds before the scan, or later, is in use. The request id is the run's id.
        """
        request = wire.StartSweepRequest(
            datastore=datastore,
            image_ids=image_ids,
            rate=rate,
            timeout=as_duration(timeout),
            grace=as_duration(grace),
            dry_run=dry_run,
            request_id=request_id or new_request_id(),
        )
        return self._caller.unary(self._caller.maintenance.StartSweep, request).sweep

    def sweep(self, datastore: str, skip_results: int = 0) -> tuple[Sweep, list[SweepResult]]:
        """The sweep of a datastore that is running, else the last one, and its results after so many."""
        request = wire.GetSweepRequest(datastore=datastore, skip_results=skip_results)
        answer = self._caller.unary(self._caller.maintenance.GetSweep, request)
        return answer.sweep, list(answer.results)

    def stop_sweep(self, datastore: str, run_id: str = "") -> Sweep:
        """Asks the sweep to end; with an id, only if it is that one."""
        request = wire.StopSweepRequest(datastore=datastore, run_id=run_id)
        return self._caller.unary(self._caller.maintenance.StopSweep, request).sweep

    def wait_sweep(
        self, datastore: str, run_id: str, progress: Callable[[Sweep, list[SweepResult]], object], pause: float = 0.25
    ) -> Sweep:
        """As `wait_scan`; `progress` gets every result once."""
        seen = 0
        while True:
            sweep, results = self.sweep(datastore, seen)
            _require_same(sweep.run, run_id)
            seen += len(results)
            progress(sweep, results)
            if sweep.run.state == RUN_STATE_IDLE and seen == sweep.total_results:
                raise_outcome(sweep.run, "sweep")
                return sweep
            if not results:
                self._caller.pause(pause)

    def unused(self, datastore: str) -> Iterator[Image]:
        """The images that a scan has marked, by id."""
        request = wire.ListUnusedImagesRequest(datastore=datastore, page_size=_PAGE)
        while True:
            page = self._caller.unary(self._caller.maintenance.ListUnusedImages, request)
            yield from page.images
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def deleted(self, datastore: str = "") -> Iterator[DeletedImage]:
        """The tombstoned images, by datastore and id; DatastoreUnavailable after them when not all are known."""
        request = wire.ListDeletedImagesRequest(datastore=datastore, page_size=_PAGE)
        while True:
            page = self._caller.unary(self._caller.maintenance.ListDeletedImages, request)
            yield from page.images
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        if page.incomplete_datastores:
            raise errors.DatastoreUnavailable(f"not all images are known: {'; '.join(page.incomplete_datastores)}")

    def reap(self, datastore: str, *, grace: float | None = None, purge_grace: float | None = None) -> ReapResponse:
        """Frees the trash, and staging directories that are abandoned and older than `grace` seconds.

        With `purge_grace`, purges images that were deleted more seconds ago than that.
        """
        request = wire.ReapRequest(
            datastore=datastore,
            grace=as_duration(grace),
            purge_grace=as_duration(purge_grace),
            request_id=new_request_id(),
        )
        return self._caller.unary(
            self._caller.maintenance.Reap, request, timeout=max(REAP_SECONDS, self._caller.timeout)
        )


def raise_outcome(run: MaintenanceRun, kind: str) -> None:
    """Raises what ended a run, unless it is done."""
    if run.outcome == RUN_OUTCOME_DONE:
        return
    what = f"the {kind} of {run.datastore}"
    if run.outcome == RUN_OUTCOME_STOPPED:
        raise errors.OperationCancelled(f"{what} was stopped, at {run.done_items} of {run.total_items} items")
    if run.outcome == RUN_OUTCOME_TIMED_OUT:
        raise errors.DeadlineExceeded(
            f"{what} took longer than its timeout, and ended at {run.done_items} of {run.total_items} items; allow it "
            "more time, or a higher rate"
        )
    error = errors.error_classes().get(run.error_reason, errors.InternalError)
    raise error(f"{what} failed: {run.error}")


def _require_same(run: MaintenanceRun, run_id: str) -> None:
    if run.run_id != run_id:
        raise errors.OperationCancelled(
            f"what came of it is not known: {run.datastore} has another run by now, or the sidecar was restarted"
        )
