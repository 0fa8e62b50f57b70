"""Runs an operation again and again, each time in a child of its own that meets its end one step later.

    python -m tests.crash.crash_points DIRECTORY LAYOUT OPERATION FAULT

A step is a system call that changes what is on the disk. FAULT `kill`: the child is killed right before the step.
FAULT `ENOSPC`, `EIO`, …: the call fails with that error, once. Prints one line of JSON a step: what was there then,
and what the next attempt of another process made of it. Imports no gRPC and has one thread, so that it can fork.
"""

import errno
import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidecar.datastores import posix
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.renaming import rename_no_replace
from sidecar.errors import ImageNotFound, ImagesError
from sidecar.images.checking import check_whole, touch_image
from sidecar.images.committing import StagedDisk, commit
from sidecar.images.copying import copy_image
from sidecar.images.deletion import delete_image, purge_image, restore_image
from sidecar.images.layouts import LAYOUTS
from sidecar.images.progress import Progress
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from tests.crash.support import (
    image_directory,
    lock_files,
    remains,
    staging_directories,
    write_image,
    write_image_files,
)

# What a full file system may refuse; the others free space, or need none.
ALLOCATING = ("open", "mkdir", "pwrite", "pwritev", "copy_file_range", "ftruncate", "fsync", "renameat2")
STEPS = (*ALLOCATING[:-1], "rename", "unlink", "rmdir", "utime")


def make_store(root: Path, layout: str) -> ImageStore:
    store = ImageStore(PosixDatastore("one", str(root)), LAYOUTS[layout], lock_timeout=5.0)
    store.datastore.check()  # opens the root, which stays open
    store.layout.prepare(store.datastore)
    return store


def do_copy(store: ImageStore) -> None:
    copy_image(store, "source", store, "target", Progress())


def do_import(store: ImageStore) -> None:
    with StagingDirectory(store, "target", "import") as staging:
        directory = Path(store.datastore.root_path) / staging.directory
        write_image_files(directory, "disk")
        (directory / "disk.ecv").write_text("{}")
        commit(staging, StagedDisk(staging))


OPERATIONS: dict[str, tuple[str, Callable[[ImageStore], object]]] = {
    # By name: what is there before, and what is done.
    "copy": ("absent", do_copy),
    "import": ("absent", do_import),
    "replace": ("wreck", do_copy),
    "delete": ("valid", lambda store: delete_image(store, "target")),
    "restore": ("deleted", lambda store: restore_image(store, "target")),
    "restore a repairable one": ("deleted, no timestamp", lambda store: restore_image(store, "target")),
    "purge": ("deleted", lambda store: purge_image(store, "target")),
    "force": ("valid", lambda store: purge_image(store, "target", force=True)),
    "touch": ("valid", lambda store: touch_image(store, "target")),
}


def prepare(root: Path, layout: str, state: str) -> None:
    root.mkdir()
    write_image(root, layout, "source", dense=True)
    if state == "absent":
        return
    extent = write_image(root, layout, "target", dense=True)
    if state == "wreck":
        extent.unlink()
        (extent.parent / "image_timestamp.txt").unlink()
    if state.startswith("deleted"):
        (extent.parent / "image_tombstone.txt").touch()
    if state.endswith("no timestamp"):
        (extent.parent / "image_timestamp.txt").unlink()


def fail_at(step: int, fault: str) -> dict[str, str]:
    """Plants the fault in this process; says in what it returns which call it was, once it was met."""
    counted = 0
    met: dict[str, str] = {}

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal counted
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            counted += 1
            if counted == step:
                met["call"] = name
                if fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                number = getattr(errno, fault)
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return call

    for name in STEPS:
        if fault != "ENOSPC" or name in ALLOCATING:
            setattr(os, name, counting(name, getattr(os, name)))
    # Not by the module that has it: this is the name that is called.
    setattr(posix, "rename_no_replace", counting("renameat2", rename_no_replace))  # noqa: B010
    return met


def state_of(store: ImageStore, image_id: str) -> str:
    """What everybody is told of the image; `WHOLE` when it is valid and every byte that it should have is there."""
    try:
        image = store.read(image_id)
    except ImageNotFound:
        return "ABSENT"
    if image.state.value != "VALID":
        return image.state.value
    check_whole(store, image)
    return "WHOLE"


def attempt(operation: Callable[[ImageStore], object], store: ImageStore) -> str:
    try:
        operation(store)
    except ImagesError as error:
        return error.reason
    return "ok"


def child(root: Path, layout: str, step: int, fault: str, operation: Callable[[ImageStore], object]) -> dict[str, Any]:
    store = make_store(root, layout)
    before = len(os.listdir("/proc/self/fd"))
    met = fail_at(step, fault)
    answer = attempt(operation, store)
    return {"answer": answer, "leaked": len(os.listdir("/proc/self/fd")) - before, **met}


def fork(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a process of its own; nothing when that was killed."""
    read_end, write_end = os.pipe()
    if not (pid := os.fork()):
        status = 1
        try:
            said = json.dumps(work()).encode()
            os.write(write_end, said)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and status:
        raise AssertionError("the child ended with an error that is none of the project's")
    result: dict[str, Any] = json.loads(answer) if answer else {"answer": "killed"}
    return result


def run(directory: Path, layout: str, operation: str, fault: str) -> None:
    before, work = OPERATIONS[operation]
    for step in range(1, 1000):
        root = directory / f"{step}"
        prepare(root, layout, before)
        found = {"step": step, **fork(functools.partial(child, root, layout, step, fault, work))}
        found |= {
            "staging": len(staging_directories(root)),
            "locks": len(lock_files(root)),
            "remains": remains(root, "source", "target"),
            "directory": image_directory(root, layout, "target").exists(),
        }
        store = make_store(root, layout)
        found |= {
            "state": state_of(store, "target"),
            "again": attempt(work, store),
            "afterwards": state_of(store, "target"),
            "source": state_of(store, "source"),
        }
        # What a dead process left is in nobody's way.
        attempt(lambda store: delete_image(store, "target"), store)
        attempt(lambda store: purge_image(store, "target"), store)
        found["anew"] = attempt(do_copy, store)
        store.datastore.close()
        shutil.rmtree(root)
        print(json.dumps(found), flush=True)  # noqa: T201
        if "call" not in found and found["answer"] != "killed":
            return


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
