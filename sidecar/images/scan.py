"""Scan: find the images that no VM uses, and mark each with the time at which the scan started.

What is used from then on is touched, and a sweep compares that touch with the mark. So all that is asked here is about
the past: a VM that is made while the VMs are being read is not missed.
"""

import enum
import logging
from dataclasses import dataclass, field

from sidecar.errors import ImageNotFound, ImagesError, LockTimeout
from sidecar.images.image import ImageState
from sidecar.images.listing import image_ids
from sidecar.images.runs import Pace, Run, RunState
from sidecar.images.store import ImageStore
from sidecar.images.unused_marker import recover_timestamp, remove_marker, write_marker
from sidecar.images.vm_scan import Uses, VmSource, VmSteps, read_uses

_NS = 10**9

_log = logging.getLogger(__name__)


class Finding(enum.Enum):
    """What a scan makes of an image."""

    UNUSED = "unused"
    USED = "used"
    NO_IMAGE = "neither"  # tombstoned, incomplete, gone: nothing that could be used


@dataclass(slots=True)
class ScanTally:
    """What a scan has counted; written by its thread alone."""

    vms: int = 0
    marked: int = 0
    used: int = 0
    others: int = 0
    unread: list[str] = field(default_factory=list)  # images that were left as they are, and why

    def __str__(self) -> str:
        return f"vms={self.vms} marked={self.marked} used={self.used} others={self.others} unread={len(self.unread)}"


def scan(
    store: ImageStore,
    source: VmSource,
    run: Run,
    tally: ScanTally,
    *,
    vm_rate: float,
    image_rate: float,
) -> None:
    """Marks the images of a datastore that no VM on any of this host uses; at so many VMs and images a minute.

    When one VM cannot be read, that error is raised and nothing is marked. An image that cannot be read or locked is
    left as it is.
    """
    run.enter(RunState.VM_SCAN)
    used = read_uses(source, store.stores, run.check, steps=_Steps(run, run.pace(vm_rate), tally))
    images = image_ids(store)
    run.enter(RunState.IMAGE_MARK, len(images))
    pace = run.pace(image_rate)
    for image_id in images:
        run.begin(image_id)
        pace.wait()
        pace.count()
        try:
            finding = mark(store, image_id, used, run)
        except (ImagesError, FileNotFoundError) as error:
            _log.warning("image not marked image=%s error=%s", store.key(image_id), error)
            tally.unread.append(f"{store.key(image_id)}: {error}")
            if not isinstance(error, LockTimeout):
                store.datastore.check()
        else:
            tally.marked += finding is Finding.UNUSED
            tally.used += finding is Finding.USED
            tally.others += finding is Finding.NO_IMAGE
        run.finish_item()


def mark(store: ImageStore, image_id: str, used: Uses, run: Run) -> Finding:
    """Marks one image as unused since the start of the run, or takes the mark from it."""
    start_seconds = run.started_ns // _NS
    try:
        with store.lock(image_id, "mark", check=run.check):
            image = store.read(image_id)
            if recover_timestamp(store, image):
                image = store.read(image_id)
            if image.state is not ImageState.VALID or image.touched_ns is None:
                return Finding.NO_IMAGE
            is_used = (
                image.key in used
                or image.touched_ns >= start_seconds * _NS
                or bool(store.datastore.users([image.path(file.name) for file in image.files], image_id))
            )
            if is_used:
                remove_marker(store, image)
            else:
                write_marker(store, image, start_seconds)
    except (FileNotFoundError, ImageNotFound):
        return Finding.NO_IMAGE
    store.changed(image_id)
    return Finding.USED if is_used else Finding.UNUSED


class _Steps(VmSteps):
    """The VMs as the run's items, at its pace."""

    def __init__(self, run: Run, pace: Pace, tally: ScanTally) -> None:
        self._run, self._pace, self._tally = run, pace, tally

    def expect(self, total: int) -> None:
        self._run.expect(total)

    def begin(self, vm: str) -> None:
        self._run.begin(vm)
        self._pace.wait()
        self._pace.count()

    def end(self) -> None:
        self._tally.vms += 1
        self._run.finish_item()
