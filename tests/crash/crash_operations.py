"""The operations that change a datastore: what is there before, what is done, and what may have come of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidecar.errors import ImagesError
from sidecar.images.checking import touch_image, validate_image
from sidecar.images.committing import StagedDisk, commit
from sidecar.images.copying import copy_image
from sidecar.images.deletion import delete_image, purge_image, restore_image
from sidecar.images.expiry import expire
from sidecar.images.metadata import update_companions
from sidecar.images.progress import Progress
from sidecar.images.reaping import reap
from sidecar.images.runs import Clock, Run
from sidecar.images.scan import mark
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from sidecar.images.sweep import SweepTally, sweep
from sidecar.images.vm_scan import VmSource
from tests.crash.support import image_directory, image_lock, staging_place, write_image, write_image_files
from tests.support.places import MARKER, RENAMED, TIMESTAMP, TOMBSTONE

_LONG_AGO = 1_500_000_000  # seconds: before the mark
_MARKED = 1_600_000_000
_NO_VMS = VmSource(lambda store: (), lambda stores, store, directory: {})


class Refused(ImagesError):  # noqa: N818 - named like the errors of the domain
    """What was not done of many things, for a reason that is told and is no error of the whole."""

    reason = "REFUSED"


@dataclass(frozen=True)
class Operation:
    """`before`: the state of the image `target`, see `prepare`. `between`: what it may be when the operation ends in
    the middle; on layout vsan, where directories cannot be renamed, `between_vsan` too: what nobody uses, and the next
    publish or purge clears away. `again`: what a second attempt answers, which does what is left to do, or says that
    it is done. `end`: what the image is then.
    """

    before: str
    work: Callable[[ImageStore], object]
    between: frozenset[str]
    again: frozenset[str] = frozenset({"ok"})
    end: str = "WHOLE"
    between_vsan: frozenset[str] = frozenset()
    publishes: bool = False


def do_copy(store: ImageStore) -> None:
    copy_image(store, "source", store, "target", Progress())


def do_import(store: ImageStore) -> None:
    with StagingDirectory(store, "target", "import") as staging:
        _stage(store, staging)
        for name in ("new.ecv", "extra"):
            (Path(store.datastore.root_path) / staging.path(name)).write_text("{}")
        staging.rename_file("new.ecv", "disk.ecv")
        staging.remove_file("extra")
        commit(staging, StagedDisk(staging))


def do_abort(store: ImageStore) -> None:
    staging = StagingDirectory(store, "target", "import")
    _stage(store, staging)
    try:
        staging.abort()
    finally:
        staging.leave()


def _stage(store: ImageStore, staging: StagingDirectory) -> None:
    directory = Path(store.datastore.root_path) / staging.directory
    write_image_files(directory, "disk")
    (directory / "disk.ecv").write_text("{}")


def do_mark(store: ImageStore, *, used: bool = False) -> None:
    mark(store, "target", {store.key("target"): ["VM 1"]} if used else {}, _run())


def do_sweep(store: ImageStore) -> None:
    tally = SweepTally(dry_run=False)
    sweep(store, _NO_VMS, _run(), tally, targets=["target"], rate=1e6, grace=60)
    if not tally.deleted:
        raise Refused(tally.results[0].reason)


def do_reap(store: ImageStore) -> None:
    reaped = reap(store, 0)
    if left := reaped.faults + reaped.kept:
        raise Refused("; ".join(left))


def do_expire(store: ImageStore) -> None:
    expired = expire(store, _NO_VMS, grace=60)
    if not expired.purged:
        raise Refused("; ".join(expired.kept))


def _run() -> Run:
    return Run("run", 1e6, Clock())


def _of(*states: str) -> frozenset[str]:
    return frozenset(states)


_PUBLISHED = _of("ok", "IMAGE_ALREADY_EXISTS")
_PURGED = _of("ok", "IMAGE_NOT_FOUND")
_INCOMPLETE = _of("INCOMPLETE")

OPERATIONS: dict[str, Operation] = {
    "copy": Operation("absent", do_copy, _of("ABSENT", "WHOLE"), _PUBLISHED, between_vsan=_INCOMPLETE, publishes=True),
    "import": Operation(
        "absent", do_import, _of("ABSENT", "WHOLE"), _PUBLISHED, between_vsan=_INCOMPLETE, publishes=True
    ),
    "replace": Operation("wreck", do_copy, _of("INCOMPLETE", "ABSENT", "WHOLE"), _PUBLISHED, publishes=True),
    "abort": Operation("absent", do_abort, _of("ABSENT"), end="ABSENT"),
    "delete": Operation(
        "valid",
        lambda store: delete_image(store, "target"),
        _of("WHOLE", "TOMBSTONED"),
        _of("ok", "IMAGE_TOMBSTONED"),
        "TOMBSTONED",
    ),
    "restore": Operation(
        "deleted",
        lambda store: restore_image(store, "target"),
        _of("TOMBSTONED", "WHOLE"),
        _of("ok", "IMAGE_NOT_TOMBSTONED"),
    ),
    "restore a repairable one": Operation(
        "deleted, no timestamp",
        lambda store: restore_image(store, "target"),
        _of("TOMBSTONED", "WHOLE"),
        _of("ok", "IMAGE_NOT_TOMBSTONED"),
    ),
    "purge": Operation(
        "deleted", lambda store: purge_image(store, "target"), _of("TOMBSTONED", "ABSENT"), _PURGED, "ABSENT"
    ),
    "force": Operation(
        "valid",
        lambda store: purge_image(store, "target", force=True),
        _of("WHOLE", "ABSENT"),
        _PURGED,
        "ABSENT",
        _INCOMPLETE,
    ),
    "touch": Operation("valid", lambda store: touch_image(store, "target"), _of("WHOLE")),
    "update": Operation(
        "valid",
        lambda store: update_companions(store, "target", {"target.ecv": b"{}"}, ["notes"]),
        _of("WHOLE"),
        _of("ok", "FILE_NOT_FOUND"),
    ),
    "repair": Operation(
        "no timestamp", lambda store: validate_image(store, "target", repair=True), _of("INCOMPLETE", "WHOLE")
    ),
    "repair after a sweep": Operation(
        "renamed", lambda store: validate_image(store, "target", repair=True), _of("INCOMPLETE", "WHOLE")
    ),
    "mark": Operation("unused", do_mark, _of("WHOLE")),
    "unmark": Operation("marked", lambda store: do_mark(store, used=True), _of("WHOLE")),
    "mark after a sweep": Operation("renamed", do_mark, _of("INCOMPLETE", "WHOLE")),
    # It begins again, or says that the image, or what says that it is unused, is not there any more.
    "sweep": Operation("marked", do_sweep, _of("WHOLE", "INCOMPLETE", "ABSENT"), _of("ok", "REFUSED"), "ABSENT"),
    "sweep of a used one": Operation("marked, used", do_sweep, _of("WHOLE"), _of("REFUSED")),
    "sweep after a sweep": Operation("marked, renamed, used", do_sweep, _of("INCOMPLETE", "WHOLE"), _of("REFUSED")),
    "reap": Operation("leftovers", do_reap, _of("INCOMPLETE", "WHOLE")),
    "expire": Operation("deleted", do_expire, _of("TOMBSTONED", "ABSENT"), _of("ok", "REFUSED"), "ABSENT"),
}


def prepare(root: Path, layout: str, state: str) -> None:
    """A datastore with a whole image `source`, and `target` as it is before an operation."""
    root.mkdir()
    write_image(root, layout, "source", dense=True)
    if state == "absent":
        return
    extent = write_image(root, layout, "target", dense=True)
    directory = extent.parent
    (directory / "notes").touch()
    os.utime(directory / TIMESTAMP, (_LONG_AGO, _LONG_AGO))
    if state == "wreck":
        extent.unlink()
        (directory / TIMESTAMP).unlink()
    if state.startswith("deleted"):
        (directory / TOMBSTONE).touch()
        os.utime(directory / TOMBSTONE, (_LONG_AGO, _LONG_AGO))
    if state.startswith("marked"):
        (directory / MARKER).write_text(str(_MARKED))
    if state.endswith("used") and "unused" not in state:
        os.utime(directory / TIMESTAMP, (_MARKED + 1, _MARKED + 1))
    if "renamed" in state or state == "leftovers":
        (directory / TIMESTAMP).rename(directory / RENAMED)
    if state.endswith("no timestamp"):
        (directory / TIMESTAMP).unlink()
    if state == "leftovers":
        _leave_behind(root, layout)


def _leave_behind(root: Path, layout: str) -> None:
    """What processes left that died: in making, writing, sweeping and freeing images, and with their locks."""
    staging = root / staging_place(layout, "new", "token")
    staging.mkdir(parents=True)
    write_image_files(staging, "new")
    lock = staging / "lock.ec_lock" if layout == "vsan" else staging.with_name(f"{staging.name}.ec_lock")
    lock.touch()
    (image_directory(root, layout, "target") / f".{'0' * 32}").touch()
    image_lock(root, layout, "target").touch()
    remains = image_directory(root, layout, "remains")
    remains.mkdir(parents=True)
    (remains / MARKER).write_text("1")
    if layout != "vsan":
        (root / "deleted_images" / "token").mkdir(parents=True)
        write_image_files(root / "deleted_images" / "token", "old")
    for path in root.rglob("*"):
        os.utime(path, (_LONG_AGO, _LONG_AGO))
