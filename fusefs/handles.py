"""Open files and directories of the mount."""

import errno
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusefs.attributes import Attributes
from fusefs.errors import fail
from fusefs.generations import OpenFile
from fusefs.provenance import Generation, SourceFile
from fusefs.reading import Reader
from fusefs.staged import StagedDirectory, StagedFile
from fusefs.staging import LateCompanion, Recent
from fusefs.tree import IndexedImage

# A name, and how to find out what stat shows of it: asked for when the kernel asks, so that opening is cheap.
Entry = tuple[str, Callable[[], Attributes]]


@dataclass(slots=True, eq=False)
class ImageHandle:
    """A file of an image, open for reading."""

    path: str
    source: SourceFile
    reader: Reader
    process: int  # whose it is; 0: not known
    opened: OpenFile
    current: Callable[[], Generation | None]  # what the index shows where it was opened


class Borrowed(NamedTuple):
    """A file of an image that another process reads, opened for what is written here."""

    source: SourceFile
    reader: Reader


@dataclass(slots=True, eq=False)
class StagedHandle:
    """A file of an image in the making."""

    path: str
    directory: StagedDirectory
    file: StagedFile
    writable: bool
    writer: tuple[int, int] = (0, 0)  # the thread that wrote last, and its process
    compared: bool = True  # whether what is written is still worth comparing with an image's file
    mismatches: int = 0
    borrowed: Borrowed | None = None


@dataclass(slots=True, eq=False)
class CompanionHandle:
    """A companion file that arrives after its image was published."""

    path: str
    recent: Recent
    companion: LateCompanion
    writable: bool


@dataclass(slots=True, eq=False)
class DirectoryHandle:
    """What a directory held when it was opened."""

    path: str
    entries: Sequence[Entry]
    staged: StagedDirectory | None  # which one it is, when something else may have its name by now
    image: IndexedImage | None  # likewise
    process: int  # whose it is; 0: not known


@dataclass(slots=True, eq=False)
class DocumentHandle:
    """A document, as it was when it was opened."""

    path: str
    text: bytes


Handle = ImageHandle | StagedHandle | CompanionHandle | DirectoryHandle | DocumentHandle


class Handles:
    """The open files by the number that the kernel has of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._handles: dict[int, Handle] = {}
        self._by_process: dict[int, list[ImageHandle]] = {}

    def add(self, handle: Handle) -> int:
        with self._lock:
            number = next(self._numbers)
            self._handles[number] = handle
            if isinstance(handle, ImageHandle) and handle.process:
                self._by_process.setdefault(handle.process, []).append(handle)
            return number

    def get(self, number: int) -> Handle:
        try:
            return self._handles[number]
        except KeyError:
            fail(errno.EBADF)

    def find(self, number: int | None) -> Handle | None:
        return self._handles.get(number) if number is not None else None

    def remove(self, number: int) -> Handle | None:
        with self._lock:
            handle = self._handles.pop(number, None)
            if isinstance(handle, ImageHandle) and handle.process:
                mine = self._by_process[handle.process]
                mine.remove(handle)
                if not mine:
                    del self._by_process[handle.process]
            return handle

    def images_open_in(self, process: int) -> list[ImageHandle]:
        """The files of images that a process has open, the last one first."""
        with self._lock:
            return self._by_process.get(process, [])[::-1]

    def has_directory_open(self, process: int, path: str) -> bool:
        """Whether a process has a directory open that it opened by this path."""
        return any(
            isinstance(handle, DirectoryHandle) and handle.process == process and handle.path == path
            for handle in self.all()
        )

    def all(self) -> list[Handle]:
        with self._lock:
            return list(self._handles.values())
