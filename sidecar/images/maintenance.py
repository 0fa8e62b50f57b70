"""The maintenance of one datastore: its scan, its sweep, and what is reaped and purged, asked for or by itself."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidecar.errors import InvalidRequest, TaskAlreadyRunning
from sidecar.images.expiry import Expired, expire
from sidecar.images.image import Image, ImageState
from sidecar.images.keeping import Keeper, Task
from sidecar.images.listing import image_ids, names_if_directory
from sidecar.images.names import UNUSED_MARKER, check_image_id
from sidecar.images.reaping import Reaped, reap
from sidecar.images.runs import Clock, Outcome, Run, Runs, RunState
from sidecar.images.scan import ScanTally, scan
from sidecar.images.store import ImageStore
from sidecar.images.sweep import SweepTally, sweep
from sidecar.images.vm_scan import VmSource

RATE = 10.0  # VMs, images, deletions a minute
TIMEOUT_SECONDS = 7 * 86400.0
SWEEP_GRACE_SECONDS = 60.0  # for clocks of hosts that differ
STAGING_GRACE_SECONDS = 2 * 3600.0
TOMBSTONE_GRACE_SECONDS = 86400.0

_LARGEST_RATE = 1e6
_LONGEST_SECONDS = 10 * 365 * 86400.0
_LOOK_SECONDS = 5.0  # between two looks whether a scan of our own has ended

# Purges and sweeps come no earlier: mounts have found a sidecar that was restarted by then, and have it hold again what
# is open in them.
FIRST_PURGE_SECONDS = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done by itself: intervals and grace times are seconds, an interval of 0 is never.

    `purge_below_free`: free bytes below which deleted images are purged before their time. `sweep_grace`: images that
    were used so long before a scan of our own, or since, stay.
    """

    reap_interval: float = 0.0
    staging_grace: float = STAGING_GRACE_SECONDS
    purge_interval: float = 0.0
    tombstone_grace: float = TOMBSTONE_GRACE_SECONDS
    purge_below_free: int = 0
    sweep_interval: float = 0.0
    sweep_grace: float = SWEEP_GRACE_SECONDS
    rate: float = RATE
    timeout: float = TIMEOUT_SECONDS


class Maintenance:
    """Of one datastore. Thread-safe."""

    def __init__(
        self,
        store: ImageStore,
        source: VmSource,
        plan: Plan,
        clock: Clock | None = None,
    ) -> None:
        clock = clock or Clock()
        self.store = store
        self.plan = plan
        self._source = source
        name = store.datastore.name
        self.scans: Runs[ScanTally] = Runs("scan", name, clock)
        self.sweeps: Runs[SweepTally] = Runs("sweep", name, clock)
        self._sweep_after = ""  # the id of a scan of our own, when it is done; of the keeper's thread
        tasks = [
            Task("reap", plan.reap_interval, lambda check: reap(self.store, plan.staging_grace, check)),
            Task(
                "purge",
                plan.purge_interval,
                lambda check: self.purge(plan.tombstone_grace, plan.purge_below_free, check),
                first=min(FIRST_PURGE_SECONDS, plan.purge_interval),
            ),
            Task("scan", plan.sweep_interval, self._scan_by_itself),
            Task(
                "sweep",
                _LOOK_SECONDS if plan.sweep_interval else 0.0,
                self._sweep_by_itself,
                first=min(FIRST_PURGE_SECONDS, plan.sweep_interval),
            ),
        ]
        self._keeper = Keeper(name, [task for task in tasks if task.interval > 0], clock)

    def start(self) -> None:
        self._keeper.start()

    def close(self) -> None:
        """Ends what runs, within one item, and joins the threads."""
        self.scans.refuse()
        self.sweeps.refuse()
        self._keeper.close()
        self.scans.close()
        self.sweeps.close()

    def start_scan(
        self, run_id: str, *, vm_rate: float = RATE, image_rate: float = RATE, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """InvalidRequest, TaskAlreadyRunning; what goes wrong later is in the status of the run."""
        _check_rate("vm_rate", vm_rate)
        _check_rate("image_rate", image_rate)
        _check_seconds("timeout", timeout)
        tally = ScanTally()

        def work(run: Run) -> None:
            scan(self.store, self._source, run, tally, vm_rate=vm_rate, image_rate=image_rate)

        self.scans.start(run_id or self.store.new_token(), timeout, tally, work)

    def start_sweep(
        self,
        run_id: str,
        targets: Sequence[str] = (),
        *,
        rate: float = RATE,
        timeout: float = TIMEOUT_SECONDS,
        grace: float = SWEEP_GRACE_SECONDS,
        dry_run: bool = False,
    ) -> None:
        """As `start_scan`; InvalidImageId for a target that is no image id."""
        for image_id in targets:
            check_image_id(image_id)
        _check_rate("rate", rate)
        _check_seconds("timeout", timeout)
        _check_seconds("grace", grace)
        tally = SweepTally(dry_run)

        def work(run: Run) -> None:
            sweep(self.store, self._source, run, tally, targets=targets, rate=rate, grace=grace)

        self.sweeps.start(run_id or self.store.new_token(), timeout, tally, work)

    def reap(self, grace: float | None = None) -> Reaped:
        """Frees the trash, and abandoned staging directories that are older than that."""
        grace = self.plan.staging_grace if grace is None else grace
        _check_seconds("grace", grace)
        return reap(self.store, grace)

    def purge(self, grace: float, wanted_free: int = 0, check: Callable[[], None] = lambda: None) -> Expired:
        """Purges what was deleted longer ago than that, and more while fewer bytes are free than wanted."""
        _check_seconds("purge_grace", grace)
        return expire(self.store, self._source, grace=grace, wanted_free=wanted_free, check=check)

    def unused(self, after: str, limit: int) -> list[Image]:
        """Up to so many of the valid images that are marked as unused, by id, from the one after `after` on."""
        found: list[Image] = []
        for image_id in image_ids(self.store):
            if image_id <= after:
                continue
            directory = self.store.layout.image_directory(image_id)
            if UNUSED_MARKER not in names_if_directory(self.store.datastore, directory):
                continue
            image = self.store.read(image_id)
            if image.state is ImageState.VALID:
                found.append(image)
                if len(found) == limit:
                    break
        return found

    def _scan_by_itself(self, check: Callable[[], None]) -> None:
        run_id = self.store.new_token()
        try:
            plan = self.plan
            self.start_scan(run_id, vm_rate=plan.rate, image_rate=plan.rate, timeout=plan.timeout)
        except TaskAlreadyRunning as error:
            _log.info("no scan started datastore=%s reason=%s", self.store.datastore.name, error)
        else:
            self._sweep_after = run_id

    def _sweep_by_itself(self, check: Callable[[], None]) -> None:
        current = self.scans.current()
        if not self._sweep_after or current is None:
            return
        status = current[0]
        if status.run_id == self._sweep_after and status.state is not RunState.IDLE:
            return
        done = status.run_id == self._sweep_after and status.outcome is Outcome.DONE
        self._sweep_after = ""
        if done:
            plan = self.plan
            self.start_sweep("", rate=plan.rate, timeout=plan.timeout, grace=plan.sweep_grace)


def _check_rate(name: str, rate: float) -> None:
    if not 0 < rate <= _LARGEST_RATE:
        raise InvalidRequest(f"{name} is {rate:g}; it is a number of items a minute, more than 0 and at most 1000000")


def _check_seconds(name: str, seconds: float) -> None:
    if not 0 <= seconds <= _LONGEST_SECONDS:
        raise InvalidRequest(f"{name} is {seconds:g} s; it is a length of time, from 0 to ten years")
