"""Runs operations again and again, each time in a child of its own that meets its end one step later.

    python -m tests.crash.crash_points DIRECTORY LAYOUT FAULT [OPERATION...]

A step is a system call that changes what is on the disk, or takes or lets go of a lock. It has a name: the call, and
the path with what differs from run to run left out. FAULT `kill`: the child is killed right before the step. FAULT
`ENOSPC`, `EIO`, ...: the call fails with that error, once. Prints one line of JSON a step: what was there then, and
what the next attempt of another process made of it; at the end, one with the places in `sidecar/images` that were
reached. Imports no gRPC and has one thread, so that it can fork.
"""

import errno
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidecar import beneath
from sidecar.datastores import posix
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.renaming import rename_no_replace
from sidecar.errors import ImageNotFound, ImagesError
from sidecar.images.checking import check_whole
from sidecar.images.deletion import delete_image, purge_image
from sidecar.images.layouts import LAYOUTS
from sidecar.images.reaping import reap
from sidecar.images.store import ImageStore
from sidecar.locks.flock import Flock
from tests.crash.call_sites import Place, record_reached
from tests.crash.crash_operations import OPERATIONS, do_copy, prepare
from tests.crash.support import image_directory, lock_files, remains, staging_directories

# What a full file system may refuse; the others free space, or need none.
ALLOCATING = ("open", "mkdir", "pwrite", "copy_file_range", "ftruncate", "fsync", "renameat2")
STEPS = (*ALLOCATING, "rename", "unlink", "rmdir", "utime", "flock")

Tell = Callable[[dict[str, Any]], None]

_CHANGES_EACH_TIME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<=\.)[0-9a-f]{32}")


def make_store(root: Path, layout: str) -> ImageStore:
    # The system call as this module finds it at each call, so that a fault can be planted in it.
    locks = Flock(lambda fd, kind: fcntl.flock(fd, kind))  # noqa: PLW0108
    store = ImageStore(PosixDatastore("one", str(root), "local", locks), LAYOUTS[layout], lock_timeout=5.0)
    store.datastore.check()  # opens the root, which stays open
    store.layout.prepare(store.datastore)
    return store


class Faults:
    """The end of the `step`-th step of this process. `tell` is told which one it was, before it has an effect."""

    def __init__(self, root: Path, step: int, fault: str, tell: Callable[[str], None]) -> None:
        self._root, self._step, self._fault, self._tell = str(root), step, fault, tell
        self._counted = 0

    def plant(self) -> None:
        names = [name for name in STEPS if self._fault != "ENOSPC" or name in ALLOCATING]
        for name in set(names) - {"renameat2", "flock"}:
            setattr(os, name, self._counting(name, getattr(os, name)))
        # Bound already, by default.
        beneath.open_beneath.__kwdefaults__ = {"system_open": os.open}
        # Not by the module that has it: this is the name that is called.
        setattr(posix, "rename_no_replace", self._counting("renameat2", rename_no_replace))  # noqa: B010
        if "flock" in names:
            setattr(fcntl, "flock", self._counting("flock", fcntl.flock))  # noqa: B010

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self._counted += 1
            if self._counted == self._step:
                self._tell(f"{name} {self._described(name, *arguments, **options)}")
                if self._fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                number = getattr(errno, self._fault)
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return call

    def _described(self, call: str, *arguments: Any, dir_fd: int | None = None, **options: Any) -> str:
        match call:
            case "rename":
                source, target = arguments
                first, second = options["src_dir_fd"], options["dst_dir_fd"]
                return f"{self._path(source, first)} -> {self._path(target, second)}"
            case "renameat2":
                first, source, second, target = arguments
                return f"{self._path(source, first)} -> {self._path(target, second)}"
            case "copy_file_range":
                return f"{self._path(arguments[0])} -> {self._path(arguments[1])}"
            case "flock":
                what = "let go of" if arguments[1] & fcntl.LOCK_UN else "take"
                return f"({what}) {self._path(arguments[0])}"
            case _:
                return self._path(arguments[0], dir_fd)

    def _path(self, what: int | str, directory: int | None = None) -> str:
        """Relative to the root, of a descriptor or a name in an open directory."""
        if isinstance(what, int):
            path = os.readlink(f"/proc/self/fd/{what}").removesuffix(" (deleted)")
        else:
            path = what if directory is None else f"{os.readlink(f'/proc/self/fd/{directory}')}/{what}"
        return _CHANGES_EACH_TIME.sub("*", os.path.relpath(path, self._root))


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


def fork(work: Callable[[Tell], None]) -> dict[str, Any]:
    """What `work` tells, in a process of its own, before that ends or is killed."""
    read_end, write_end = os.pipe()
    if not (pid := os.fork()):
        status = 1
        try:
            work(lambda said: _write_line(write_end, said))
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    found: dict[str, Any] = {"answer": "killed"}
    with open(read_end, "rb") as pipe:
        for line in pipe:
            found |= json.loads(line)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and status:
        raise AssertionError(f"the child ended with an error that is none of the project's, at {found.get('step')}")
    return found


def _write_line(fd: int, said: dict[str, Any]) -> None:
    line = json.dumps(said).encode() + b"\n"
    while line:
        line = line[os.write(fd, line) :]


def run(directory: Path, layout: str, fault: str, *names: str) -> None:
    reached = record_reached()
    for name in names or OPERATIONS:
        run_operation(directory, layout, fault, name, reached)
    print(json.dumps({"reached": sorted(reached)}), flush=True)  # noqa: T201


def run_operation(directory: Path, layout: str, fault: str, name: str, reached: set[Place]) -> None:
    operation = OPERATIONS[name]
    for step in range(1, 1000):
        root = directory / f"{step}"
        prepare(root, layout, operation.before)
        said = fork(functools.partial(_end_at, root, layout, name, step, fault, reached))
        reached |= {(file, line) for file, line in said.pop("reached", [])}
        found = {
            "operation": name,
            "layout": layout,
            "fault": fault,
            **said,
            "staging": len(staging_directories(root)),
            "locks": len(lock_files(root)),
            "remains": remains(root, "source", "target"),
            "directory": image_directory(root, layout, "target").exists(),
        }
        store = make_store(root, layout)
        found |= {
            "state": state_of(store, "target"),
            "again": attempt(operation.work, store),
            "afterwards": state_of(store, "target"),
            "source": state_of(store, "source"),
        }
        # What a dead process left is in nobody's way.
        attempt(lambda store: delete_image(store, "target"), store)
        attempt(lambda store: purge_image(store, "target"), store)
        found["anew"] = attempt(do_copy, store)
        # And does not stay.
        reap(store, 0)
        found["left"] = remains(root, "source", "target") + [path.name for path in lock_files(root)]
        store.datastore.close()
        shutil.rmtree(root)
        print(json.dumps(found), flush=True)  # noqa: T201
        if "step" not in found:
            return


def _end_at(root: Path, layout: str, name: str, step: int, fault: str, reached: set[Place], tell: Tell) -> None:
    """One attempt at the operation, in this process, with its end at that step."""
    store = make_store(root, layout)
    before = len(os.listdir("/proc/self/fd"))
    Faults(root, step, fault, lambda met: tell({"step": f"{name}: {met}"})).plant()
    answer = attempt(OPERATIONS[name].work, store)
    leaked = len(os.listdir("/proc/self/fd")) - before
    tell({"answer": answer, "leaked": leaked, "reached": sorted(reached)})


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
