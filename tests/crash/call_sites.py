"""Where `sidecar/images` changes a datastore, read from the code; and which of these places a test has reached."""

import ast
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import sidecar.images
from sidecar.datastores.interface import Datastore, WritableFile
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.posix_files import PosixWritable

IMAGES = Path(sidecar.images.__path__[0]).resolve()
# What changes nothing; whatever else a datastore or a file of it can do, changes it, or takes a lock to do so.
READING: dict[type[object], set[str]] = {
    Datastore: {
        *("reflink", "open_directory", "names", "entries", "entry", "read_file", "read_range", "look_ahead"),
        *("open_readable", "shares_extents_with", "lock_holder", "interrupt", "users", "exclude_users", "watcher"),
        *("capacity", "check", "require_in_place", "close", "tree", "vm_server"),
    },
    WritableFile: {"size", "close"},
}

# A file below `sidecar/images`, and a line of it.
Place = tuple[str, int]


def changing(protocol: type[object]) -> set[str]:
    """The methods of a protocol that change something. One that is not known yet counts as such."""
    return {name for name, _ in inspect.getmembers(protocol) if not name.startswith("_")} - READING[protocol]


def call_sites() -> dict[tuple[str, int, int], str]:
    """Every call of such a method in `sidecar/images`: the file, its first and last line, and what is called."""
    names = changing(Datastore) | changing(WritableFile)
    return {
        (str(path.relative_to(IMAGES)), node.lineno, node.end_lineno or node.lineno): ast.unparse(node.func)
        for path in sorted(IMAGES.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
    }


def record_reached() -> set[Place]:
    """From now on, the places in `sidecar/images` by way of which a posix datastore is changed."""
    reached: set[Place] = set()

    def recording(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            reached.update(_places(sys._getframe(1)))
            return real(*arguments, **options)

        return call

    for kind, protocol in ((PosixDatastore, Datastore), (PosixWritable, WritableFile)):
        for name in changing(protocol):
            setattr(kind, name, recording(getattr(kind, name)))
    return reached


def _places(frame: FrameType | None) -> Iterator[Place]:
    directory = f"{IMAGES}{os.sep}"
    while frame is not None:
        if frame.f_code.co_filename.startswith(directory):
            yield frame.f_code.co_filename.removeprefix(directory), frame.f_lineno
        frame = frame.f_back
