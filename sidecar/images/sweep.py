"""Sweep: delete the images that a scan found unused and that nobody has touched since.

Every step up to the rename into the trash is made under the image's lock. Who touches images without asking for that
lock, as the origin does, is noticed by the timestamp file: it is renamed, and its time compared, before the image goes.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from sidecar.errors import ImageInUse, ImageNotFound, ImagesError, LockTimeout
from sidecar.images.deletion import discard_unused, free_discarded
from sidecar.images.image import Image, ImageState, read_image_names
from sidecar.images.listing import image_ids
from sidecar.images.names import UNUSED_MARKER
from sidecar.images.runs import Run, RunState
from sidecar.images.store import ImageStore
from sidecar.images.unused_marker import put_timestamp_back, remove_marker, rename_timestamp, renamed_ns
from sidecar.images.vm_scan import Uses, VmSource, read_uses

_NS = 10**9
_CLOCK_NS = 60 * _NS  # what clocks of two hosts may differ

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What became of an image, or would become of it, and why; `freed` are the allocated bytes of its files."""

    image_id: str
    deleted: bool
    reason: str
    freed: int = 0


@dataclass(slots=True)
class SweepTally:
    """What a sweep has decided; appended to by its thread alone."""

    dry_run: bool
    results: list[SweepResult] = field(default_factory=list)
    deleted: int = 0
    freed: int = 0

    def add(self, result: SweepResult) -> None:
        self.results.append(result)
        self.deleted += result.deleted
        self.freed += result.freed

    def __str__(self) -> str:
        return f"dry_run={self.dry_run} images={len(self.results)} deleted={self.deleted} freed={self.freed}"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a sweep goes by: seconds of `grace`, for clocks that differ; the images that VMs used at its start, and how
    to look again, under an image's lock."""

    grace: float
    dry_run: bool
    used: Uses
    look_again: Callable[[], Uses]


class _Stays(Exception):  # noqa: N818 - an answer
    """The image stays, for this reason; `used`: because it is in use, so that its mark is to be removed."""

    def __init__(self, reason: str, *, used: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.used = reason, used


def sweep(
    store: ImageStore,
    source: VmSource,
    run: Run,
    tally: SweepTally,
    *,
    targets: Sequence[str],
    rate: float,
    grace: float,
) -> None:
    """Sweeps the targets, or all images where none is named, deleting at most `rate` of them a minute.

    An image that cannot be read or locked stays; a VM that cannot be read is an error, as it may use any image.
    """
    look = partial(read_uses, source, store.stores, run.check)
    # The mark may be old, and not everybody who makes a VM touches its image.
    rules = Rules(grace, tally.dry_run, look(), partial(look, locked=True))
    images = list(dict.fromkeys(targets)) or image_ids(store)
    run.enter(RunState.IMAGE_SWEEP, len(images))
    pace = run.pace(rate)
    for image_id in images:
        run.begin(image_id)
        result: SweepResult | None
        try:
            marked_s = read_marked(store, image_id).marked_unused_s  # step 1
            assert marked_s is not None
            pace.wait()
            result = sweep_image(store, image_id, marked_s, rules, run)
            if result.deleted and not tally.dry_run:
                pace.count()
        except _Stays as stays:
            result = SweepResult(image_id, False, stays.reason)
        except (FileNotFoundError, ImageNotFound):
            result = SweepResult(image_id, False, "it is not there") if targets else None
        except ImagesError as error:
            _log.warning("image not swept image=%s error=%s", store.key(image_id), error)
            result = SweepResult(image_id, False, error.message)
            if not isinstance(error, LockTimeout):
                store.datastore.check()
        if result:
            tally.add(result)
        run.finish_item()


def sweep_image(store: ImageStore, image_id: str, marked_s: int, rules: Rules, run: Run) -> SweepResult:
    """Decides about an image with that mark, and deletes it unless that is only tried."""
    trash: str | None = None
    with store.lock(image_id, "sweep", check=run.check):  # step 2
        image = read_marked(store, image_id)  # that it is marked still, and not another image
        try:
            if rules.dry_run:
                _require_unused(store, image, marked_s, rules)
                _require_closed(store, image)
            else:
                trash = _take_away(store, image, marked_s, rules)
        except _Stays as stays:
            if stays.used and not rules.dry_run:
                remove_marker(store, image)
                store.changed(image_id)
            raise
    reason = f"unused since {_text(marked_s * _NS)}"
    if not rules.dry_run:
        store.changed(image_id)
        free_discarded(store, image_id, trash)
        _log.info("image swept image=%s marked=%s freed=%s", image.key, marked_s, image.allocated)
    return SweepResult(image_id, True, reason, image.allocated)


def read_marked(store: ImageStore, image_id: str) -> Image:
    """The image, when it is one that a sweep decides about: with a mark, and not tombstoned."""
    # By names first: most images have no mark, and attributes may be slow to read.
    image = read_image_names(store.datastore, store.layout, image_id)
    if image.state is ImageState.TOMBSTONED:
        raise _Stays("it is deleted (tombstoned) already: a purge frees it")
    if UNUSED_MARKER not in store.datastore.names(image.directory):
        raise _Stays("no scan found it unused")
    image = store.read(image_id)
    if image.marked_unused_s is None:
        unreadable = next((problem for problem in image.problems if UNUSED_MARKER in problem), None)
        raise _Stays(unreadable or "no scan found it unused")
    if image.marked_unused_s * _NS > store.clock() + _CLOCK_NS:
        # By a host whose clock was ahead: every touch until then would seem to be older.
        raise _Stays(f"its mark is of {_text(image.marked_unused_s * _NS)}, which is to come: scan again")
    return image


def _require_unused(store: ImageStore, image: Image, marked_s: int, rules: Rules) -> None:
    """Steps 3 and 4: by the VMs, and by the time of the last use."""
    _require_no_vm(image, rules.used)
    times = [time for time in (image.touched_ns, renamed_ns(store, image)) if time is not None]
    if not times:
        raise _Stays(
            "it has no timestamp file, so nobody knows when it was last used: repair it (imagectl validate --repair), "
            "or delete it"
        )
    last_ns = max(times)
    if last_ns >= marked_s * _NS - int(rules.grace * _NS):
        raise _Stays(
            f"it was used at {_text(last_ns)}, the scan that found it unused started at {_text(marked_s * _NS)}",
            used=True,
        )


def _require_no_vm(image: Image, used: Uses) -> None:
    if users := used.get(image.key):
        more = f" and {len(users) - 3} more" if len(users) > 3 else ""
        raise _Stays(f"it is in use by {', '.join(users[:3])}{more}", used=True)


def _require_closed(store: ImageStore, image: Image) -> None:
    if users := store.datastore.users([image.path(file.name) for file in image.files], image.key.image_id):
        raise _Stays(f"it is in use by {', '.join(users)}", used=True)


def _take_away(store: ImageStore, image: Image, marked_s: int, rules: Rules) -> str | None:
    """Steps 3 to 7; returns what is to be freed. When the image stays, its timestamp file is where it was."""
    try:
        _require_unused(store, image, marked_s, rules)
        _require_no_vm(image, rules.look_again())  # the sweep may have begun days ago
    except _Stays as stays:
        if stays.used and image.touched_ns is None:
            put_timestamp_back(store, image)  # an earlier sweep died between steps 5 and 6
        raise
    try:
        if image.touched_ns is not None:
            rename_timestamp(store, image)  # step 5
            if renamed_ns(store, image) != image.touched_ns:  # step 6
                raise _Stays("it was used just now", used=True)
        return discard_unused(store, image)  # step 7
    except BaseException as error:
        # With what is wrong there, this may fail too: the reaper puts it back then, or the next sweep goes on.
        with contextlib.suppress(ImagesError, OSError):
            put_timestamp_back(store, image)
        if isinstance(error, ImageInUse):
            raise _Stays(f"it is {error.message.removeprefix(f'{image.key} is ')}", used=True) from error
        raise


def _text(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / _NS, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
