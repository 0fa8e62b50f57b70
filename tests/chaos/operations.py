"""The operations of a chaos run: what each does, and how its answer is told.

Each takes a Bench and an Operation that has begun, and returns what the answer said. It raises ImagesError for what a
sidecar answered, and ToolError for a tool at the mount. To add one: a function here, a line in KINDS, and its rule in
`effects`.
"""

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidecar.client import Hole, Part, SidecarClient
from sidecar.client_maintenance import SweepResult
from sidecar.errors import ImagesError
from tests.chaos.content import (
    BLOCK,
    NOTES,
    Content,
    content_id_in,
    content_of,
    fault_in,
    metadata,
    named_extents,
)
from tests.chaos.history import Operation

TOOL_SECONDS = 60.0
A_MINUTE, RUN_SECONDS = 1_000_000, 20.0
SWEEP_GRACES = (0.0, 1.0)
Said = dict[str, Any]


class ToolError(Exception):
    """A tool at the mount did not do what it was to do. `is_harmless`: nor anything else, by its own words."""

    def __init__(self, message: str, *, is_harmless: bool = False) -> None:
        super().__init__(message)
        self.is_harmless = is_harmless


@dataclass
class Tools:
    """The tools that run, so that they can be ended when all is to end. `shown`: what paths are told without."""

    shown: Path
    running: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: bool = False

    def run(self, *command: str | Path, harmless: Sequence[str] = ()) -> list[str]:
        """The lines that it printed. `harmless`: how a complaint begins that says that nothing was done."""
        with self.lock:
            if self.ended:
                raise ToolError("the run ends")
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,  # the workers stand for people who know nothing of each other
            )
            self.running.add(process)
        try:
            printed, said = process.communicate(timeout=TOOL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise ToolError(f"{command[0]} did not end within {TOOL_SECONDS:g} s") from None
        finally:
            with self.lock:
                self.running.discard(process)
        if process.returncode:
            message = said.strip().splitlines()[0] if said.strip() else f"status {process.returncode}"
            raise ToolError(
                message.replace(f"{self.shown}/", ""), is_harmless=not printed and message.startswith(tuple(harmless))
            )
        return printed.splitlines()

    def end(self) -> None:
        with self.lock:
            self.ended = True
            for process in self.running:
                process.kill()


@dataclass
class Bench:
    """What an operation works with. `mount`: where the datastores are shown, for what is done at the shell."""

    choose: random.Random
    client: SidecarClient
    mount: Path
    scratch: Path
    tools: Tools


# ---- By the client


def copy(bench: Bench, operation: Operation) -> Said:
    call = bench.client.copy(operation.source, operation.target)
    if bench.choose.random() < 0.1:
        # Somebody changes his mind, at once or when it has begun.
        if bench.choose.random() < 0.5 and (answer := next(call, None)) and answer.HasField("image"):
            return {}
        call.cancel()
    call.wait()
    return {}


def import_image(bench: Bench, operation: Operation) -> Said:
    content = content_of(operation.id)
    with bench.client.create_staging(operation.target) as staging:
        files: list[tuple[str, list[Part], int]] = [
            (NOTES, [(0, content.notes())], len(content.notes())),
            ("src.ecv", [(0, content.metadata())], len(content.metadata())),
            ("src.vmdk", [(0, content.descriptor("src"))], len(content.descriptor("src"))),
        ]
        for index, name in enumerate(content.extent_names("src")):
            files.append((name, list(_parts(content, index)), content.extents[index] * BLOCK))
        bench.choose.shuffle(files)
        for name, parts, size in files:
            staging.write_file(name, parts, size=size)
        staging.commit()
    return {}


def _parts(content: Content, index: int) -> Iterator[Part]:
    at = 0
    for offset, data in content.extent_runs(index):
        if offset > at:
            yield Hole(at, offset - at)
        yield offset, data
        at = offset + len(data)


def delete(bench: Bench, operation: Operation) -> Said:
    bench.client.delete(operation.target)
    return {}


def force(bench: Bench, operation: Operation) -> Said:
    bench.client.delete(operation.target, force=True)
    return {}


def restore(bench: Bench, operation: Operation) -> Said:
    bench.client.restore(operation.target)
    return {}


def purge(bench: Bench, operation: Operation) -> Said:
    bench.client.purge(operation.target)
    return {}


def touch(bench: Bench, operation: Operation) -> Said:
    wall = time.time()
    bench.client.touch(operation.target)
    return {"wall": wall}


def validate(bench: Bench, operation: Operation) -> Said:
    bench.client.validate(operation.target)
    return {}


def repair(bench: Bench, operation: Operation) -> Said:
    bench.client.validate(operation.target, repair=True)
    return {}


def update(bench: Bench, operation: Operation) -> Said:
    image_id = operation.target.partition("/")[2]
    bench.client.update_metadata(operation.target, files={f"{image_id}.ecv": metadata(operation.id)})
    return {}


def read(bench: Bench, operation: Operation) -> Said:
    """The first extent, whole: of one open file, so of one content."""
    image_id = operation.target.partition("/")[2]
    names = {file.name for file in bench.client.image(operation.target).files}
    name = next((name for name in (f"{image_id}-flat.vmdk", f"{image_id}-f001.vmdk") if name in names), "")
    data = bytearray()
    for part in bench.client.read_file(operation.target, name or f"{image_id}-flat.vmdk"):
        if part.data:
            data[part.offset :] = part.data
        else:
            data[part.offset :] = bytes(part.hole_bytes)
    return _judged(bytes(data))


def listing(bench: Bench, operation: Operation) -> Said:
    return {"images": sum(1 for _ in bench.client.images())}


# ---- Maintenance, by the client


def scan(bench: Bench, operation: Operation) -> Said:
    _scan(bench, operation.target.partition("/")[0])
    return {}


def _scan(bench: Bench, datastore: str) -> None:
    run = bench.client.maintenance.start_scan(datastore, vm_rate=A_MINUTE, image_rate=A_MINUTE, timeout=RUN_SECONDS).run
    bench.client.maintenance.wait_scan(datastore, run.run_id, lambda scan: None, pause=0.05)


def sweep(bench: Bench, operation: Operation) -> Said:
    datastore, _, image_id = operation.target.partition("/")
    maintenance = bench.client.maintenance
    grace = bench.choose.choice(SWEEP_GRACES)
    # Mostly with a scan of its own: what others marked is used again soon, or gone.
    scanned = bench.choose.random() < 0.7
    if scanned:
        _scan(bench, datastore)
    run = maintenance.start_sweep(datastore, [image_id], rate=A_MINUTE, timeout=RUN_SECONDS, grace=grace).run
    said: Said = {"deleted": False, "grace": grace, "scanned": scanned}

    def note(sweep: object, results: Sequence[SweepResult]) -> None:
        for result in results:
            said.update(deleted=result.deleted, why=result.reason)

    maintenance.wait_sweep(datastore, run.run_id, note, pause=0.05)
    return said


def reap(bench: Bench, operation: Operation) -> Said:
    answer = bench.client.maintenance.reap(operation.target.partition("/")[0], grace=0)
    return {"staging": len(answer.staging_directories), "trash": len(answer.trash), "faults": list(answer.faults)}


# ---- At the shell, in the mount


def mount_copy(bench: Bench, operation: Operation) -> Said:
    _copy_tree(bench, bench.mount / operation.source, bench.mount / operation.target)
    return {}


def mount_import(bench: Bench, operation: Operation) -> Said:
    source = bench.scratch / f"{operation.id}"
    content_of(operation.id).write(source, "src")
    try:
        _copy_tree(bench, source, bench.mount / operation.target)
    finally:
        for path in source.iterdir():
            path.unlink()
        source.rmdir()
    return {}


def _copy_tree(bench: Bench, source: Path, target: Path) -> None:
    """`cp -r`, and `sync`, without which an import may still fail."""
    harmless = (f"cp: cannot stat '{source}'", f"cp: cannot stat '{target}'", f"cp: cannot create directory '{target}'")
    printed = bench.tools.run("cp", "-rvT", source, target, harmless=harmless)
    # What the mount still stages of an earlier attempt looks like a directory, too.
    if f"'{source}' -> '{target}'" not in printed or not any(".vmdk'" in line for line in printed):
        raise ToolError("cp made no new directory, or found nothing to copy")
    bench.tools.run("sync", target)


def mount_delete(bench: Bench, operation: Operation) -> Said:
    _remove_tree(bench, bench.mount / operation.target)
    return {}


def mount_restore(bench: Bench, operation: Operation) -> Said:
    datastore, _, image_id = operation.target.partition("/")
    deleted = bench.mount / datastore / ".deleted" / image_id
    bench.tools.run("mv", "-T", deleted, bench.mount / operation.target, harmless=[f"mv: cannot stat '{deleted}'"])
    return {}


def mount_purge(bench: Bench, operation: Operation) -> Said:
    datastore, _, image_id = operation.target.partition("/")
    _remove_tree(bench, bench.mount / datastore / ".deleted" / image_id)
    return {}


def _remove_tree(bench: Bench, directory: Path) -> None:
    bench.tools.run("rm", "-rv", directory, harmless=[f"rm: cannot remove '{directory}': No such file"])


def mount_touch(bench: Bench, operation: Operation) -> Said:
    bench.tools.run("touch", bench.mount / operation.target)
    return {}


def mount_read(bench: Bench, operation: Operation) -> Said:
    image_id = operation.target.partition("/")[2]
    directory = bench.mount / operation.target
    try:
        if json.loads((directory / ".image.json").read_bytes())["state"] != "VALID":
            raise ToolError("the mount stages it", is_harmless=True)
        extents = named_extents((directory / f"{image_id}.vmdk").read_bytes())
        data = (directory / extents[0][0]).read_bytes() if extents else b""
    except OSError as error:
        raise ToolError(str(error.strerror), is_harmless=True) from error
    return _judged(data)


def mount_listing(bench: Bench, operation: Operation) -> Said:
    bench.tools.run("ls", "-lR", bench.mount / operation.target.partition("/")[0])
    return {}


def _judged(data: bytes) -> Said:
    content_id = content_id_in(data)
    if content_id is None:
        return {"content": -1, "fault": f"{len(data)} bytes that are no content's"}
    content = content_of(content_id)
    said: Said = {"content": content_id}
    if len(data) != content.extents[0] * BLOCK:
        said["fault"] = f"{len(data)} bytes, not {content.extents[0] * BLOCK}"
    elif fault := fault_in(data, content, 0):
        said["fault"] = fault
    return said


@dataclass(frozen=True, slots=True)
class Kind:
    """`suits`: where the image is believed to be so, it is chosen more often. `leaves`: what is believed afterwards."""

    work: Callable[[Bench, Operation], Said]
    weight: int
    suits: str
    leaves: str = ""


KINDS = {
    "copy": Kind(copy, 14, "absent", "valid"),
    "import": Kind(import_image, 10, "absent", "valid"),
    "delete": Kind(delete, 10, "valid", "deleted"),
    "force": Kind(force, 4, "valid", "absent"),
    "restore": Kind(restore, 8, "deleted", "valid"),
    "purge": Kind(purge, 8, "deleted", "absent"),
    "touch": Kind(touch, 6, "valid"),
    "validate": Kind(validate, 3, "valid"),
    "repair": Kind(repair, 4, "valid"),
    "update": Kind(update, 6, "valid"),
    "read": Kind(read, 5, "valid"),
    "listing": Kind(listing, 2, ""),
    "scan": Kind(scan, 3, ""),
    "sweep": Kind(sweep, 5, "valid"),
    "reap": Kind(reap, 1, ""),
    "mount-copy": Kind(mount_copy, 6, "absent", "valid"),
    "mount-import": Kind(mount_import, 5, "absent", "valid"),
    "mount-delete": Kind(mount_delete, 4, "valid", "deleted"),
    "mount-restore": Kind(mount_restore, 3, "deleted", "valid"),
    "mount-purge": Kind(mount_purge, 3, "deleted", "absent"),
    "mount-touch": Kind(mount_touch, 1, "valid"),
    "mount-read": Kind(mount_read, 5, "valid"),
    "mount-listing": Kind(mount_listing, 2, ""),
}

__all__ = ["KINDS", "Bench", "ImagesError", "Kind", "ToolError", "Tools"]
