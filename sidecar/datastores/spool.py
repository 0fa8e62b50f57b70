"""Files that are being staged for a datastore that takes whole files only: kept on this host until they are complete.

Such a file can be written in any order, over several calls, and be read meanwhile; when it is to be durable, it is sent
as a whole. It has no name on this host: whatever happens to the process, it is gone with it.

What is a copy of a file that the same server has is not fetched: it is noted which of its bytes are whose. A file that
is wholly another one in the end is copied by the server; else it is filled in before anything is done with it.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from sidecar.datastores.faults import Faults
from sidecar.datastores.interface import Entry, ReadableFile, Transfer
from sidecar.datastores.posix_files import make_entry, write_all
from sidecar.datastores.through import copy_through
from sidecar.datastores.transfer import data_in, punch_hole
from sidecar.errors import DatastoreUnavailable

_PIECE = 1 << 20


class Lent(ReadableFile, Protocol):
    """An open file whose bytes others may count on; `place` is equal for those that are open on the same file."""

    @property
    def place(self) -> object: ...


@dataclass(frozen=True, slots=True)
class _Borrowed:
    """A range of a file whose bytes are those of another file, at the same place there."""

    offset: int
    length: int
    source: Lent


class SpooledFile:
    """One file, for as long as somebody has it."""

    def __init__(self, faults: Faults, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.faults = faults
        self.on_server = False  # something of it may be, under that path
        self._users = 1
        self._counting = threading.Lock()  # guards the users
        self._content = threading.RLock()  # guards what follows, and is held while it changes
        self._borrowed: list[_Borrowed] = []
        self._changes, self._sent = 1, 0  # how many there were, and how many of them the server has
        self._sent_bytes = 0  # its size when it was sent
        self._sending = threading.Lock()

    @property
    def changed(self) -> bool:
        """Since it was sent."""
        return self._changes != self._sent

    def note_change(self) -> None:
        with self._content:
            self._changes += 1

    @contextmanager
    def changing(self) -> Iterator[None]:
        """For a change of its bytes, which are all here."""
        with self._content:
            self.fill()
            try:
                yield
            finally:
                # Not before it: who sends the file at the same time may have read what was there till then.
                self._changes += 1

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """For sending it, one at a time; gives whether that is needed. It is sent when the block ends without an error;
        what changes meanwhile is to be sent again."""
        with self._sending:
            changes, size = self._changes, self.size
            if changes == self._sent:
                yield False
                return
            self.on_server = True
            yield True
            self._sent, self._sent_bytes = changes, size

    @property
    def unsent(self) -> int:
        """How many bytes more the server will have of it."""
        return max(self.size - self._sent_bytes, 0)

    def take(self) -> None:
        with self._counting:
            self._users += 1

    def let_go(self) -> None:
        with self._counting:
            self._users -= 1
            last = not self._users
        if last:
            self._give_back()
            os.close(self.fd)

    def borrow(self, offset: int, length: int, source: Lent) -> bool:
        """Takes these bytes for those of the source, which is closed in the end; only behind all that is there."""
        with self._content:
            if self.size > offset:
                return False
            os.ftruncate(self.fd, offset + length)
            self._borrowed.append(_Borrowed(offset, length, source))
            self._changes += 1
            return True

    def wholly_borrowed(self) -> Lent | None:
        """The file that this one is a copy of."""
        with self._content:
            if not self._borrowed or sum(each.length for each in self._borrowed) != self.size:
                return None
            source = self._borrowed[0].source
            whole = source.size == self.size and {each.source.place for each in self._borrowed} == {source.place}
            return source if whole else None

    def fill(self) -> None:
        """Fetches what is borrowed."""
        with self._content:
            for each in self._borrowed:
                for start in range(each.offset, each.offset + each.length, _PIECE):
                    data = _read_all(each.source, start, min(start + _PIECE, each.offset + each.length))
                    with self.faults.during("stage", self.path):
                        write_all(self.fd, data, start)
            for source in {each.source.place: each.source for each in self._borrowed}.values():
                source.require_same()
            self._give_back()

    def _give_back(self) -> None:
        with self._content:
            borrowed, self._borrowed = self._borrowed, []
        for each in borrowed:
            each.source.close()

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def entry(self, name: str) -> Entry:
        return make_entry(name, os.fstat(self.fd))

    def pieces(self, size: int) -> Iterator[bytes]:
        """So many bytes from the start, whatever its size becomes meanwhile: it is sent again then."""
        for offset in range(0, size, _PIECE):
            length = min(_PIECE, size - offset)
            yield self.read(offset, length).ljust(length, b"\0")

    def read(self, offset: int, length: int) -> bytes:
        with self._content:
            with self.faults.during("read what is staged of", self.path):
                data = bytearray(os.pread(self.fd, length, offset))
            for each in self._borrowed:
                start, end = max(offset, each.offset), min(offset + len(data), each.offset + each.length)
                if start < end:
                    data[start - offset : end - offset] = _read_all(each.source, start, end)
            return bytes(data)

    def data_ranges(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        with self._content:
            if self._borrowed:
                length = min(length, self.size - offset)
                return [(offset, length)] if length > 0 else []
        with self.faults.during("read what is staged of", self.path):
            return data_in(self.fd, offset, length)


def _read_all(source: ReadableFile, start: int, end: int) -> bytes:
    parts: list[bytes] = []
    while start < end:
        part = source.read(start, end - start)
        if not part:
            raise DatastoreUnavailable(f"what is staged is a copy of a file that has ended at {start}; stage it anew")
        parts.append(part)
        start += len(part)
    return b"".join(parts)


class Spool:
    """The files that are being staged for one datastore, by path. Safe for several threads."""

    def __init__(self, datastore: str) -> None:
        # Not /tmp, which is often in memory: these are disks.
        self._directory = os.environ.get("TMPDIR") or "/var/tmp"
        self._faults = Faults(
            f"{datastore}, staged on this host",
            self._directory,
            when_full=f"make space in {self._directory}, or start the sidecar with another TMPDIR",
        )
        self._lock = threading.Lock()  # guards the files
        self._files: dict[str, SpooledFile] = {}

    def close(self) -> None:
        with self._lock:
            files, self._files = list(self._files.values()), {}
        for file in files:
            file.let_go()

    @contextmanager
    def using(self, path: str) -> Iterator[SpooledFile | None]:
        """The file of that path, if it is here."""
        file = self.take(path)
        try:
            yield file
        finally:
            if file:
                file.let_go()

    def take(self, path: str) -> SpooledFile | None:
        """The file of that path, if it is here, which stays until it is let go of."""
        with self._lock:
            if file := self._files.get(path):
                file.take()
            return file

    def make(self, path: str, content: Iterable[bytes], *, on_server: bool) -> SpooledFile:
        """The file of that path, with that content when it is not here yet; it stays until it is let go of.

        `on_server`: the content is what the server has there.
        """
        if known := self.take(path):
            return known
        with self._faults.during("stage", path):
            with tempfile.TemporaryFile(dir=self._directory) as temporary:
                made = SpooledFile(self._faults, path, os.dup(temporary.fileno()))
                made.on_server = on_server
            try:
                offset = 0
                for piece in content:
                    write_all(made.fd, piece, offset)
                    offset += len(piece)
            except BaseException:
                made.let_go()
                raise
        with self._lock:
            file = self._files.setdefault(path, made)
            file.take()
        if file is not made:
            made.let_go()
        return file

    def has(self, path: str) -> bool:
        with self._lock:
            return path in self._files

    def names(self, directory: str) -> set[str]:
        with self._lock:
            return {name for parent, _, name in (path.rpartition("/") for path in self._files) if parent == directory}

    def unsent(self, directory: str) -> int:
        """How many bytes more the server will have in that directory."""
        with self._lock:
            return sum(file.unsent for path, file in self._files.items() if path.rpartition("/")[0] == directory)

    def rename(self, source: str, destination: str) -> None:
        """A file that is here; FileExistsError when the other one is, too."""
        with self._lock:
            if destination in self._files:
                raise FileExistsError(destination)
            file = self._files.pop(source)
            file.path = destination
            self._files[destination] = file

    def drop(self, path: str) -> bool:
        """Forgets that file, and all below that directory. Whether there was any."""
        with self._lock:
            dropped = [each for each in self._files if each == path or each.startswith(f"{path}/")]
            files = [self._files.pop(each) for each in dropped]
        for file in files:
            file.let_go()
        return bool(files)


class SpooledReadable:
    """A file that is being staged, open for reading."""

    def __init__(self, file: SpooledFile) -> None:
        """Takes over the caller's hold of it."""
        self._file = file
        status = os.fstat(file.fd)
        self.inode, self.modified_ns, self.size = status.st_ino, status.st_mtime_ns, status.st_size

    def read(self, offset: int, length: int) -> bytes:
        return self._file.read(offset, length)

    def data_ranges(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        return self._file.data_ranges(offset, length)

    def require_same(self) -> None:
        """Nobody else has it."""

    def close(self) -> None:
        self._file.let_go()


class SpooledWritable:
    """A file that is being staged, open for writing. `send` puts it onto its datastore.

    `lend` opens once more a file that the same server has; None for any other.
    """

    def __init__(
        self,
        file: SpooledFile,
        send: Callable[[SpooledFile], None],
        lend: Callable[[ReadableFile], Lent | None],
    ) -> None:
        """Takes over the caller's hold of it."""
        self._file, self._send, self._lend = file, send, lend

    def write(self, offset: int, data: bytes) -> None:
        with self._changing():
            write_all(self._file.fd, data, offset)

    def make_hole(self, offset: int, length: int) -> None:
        with self._changing():
            if self.size() < offset + length:
                os.ftruncate(self._file.fd, offset + length)
            punch_hole(self._file.fd, offset, length)

    def resize(self, size: int) -> None:
        if size != self.size():
            with self._changing():
                os.ftruncate(self._file.fd, size)

    def size(self) -> int:
        return self._file.size

    def sync(self) -> None:
        self._send(self._file)

    def clone(self, source: ReadableFile, source_offset: int, offset: int, length: int, transfer: Transfer) -> int:
        length = max(min(length, source.size - source_offset), 0)
        if length and source_offset == offset and (lent := self._lend(source)) is not None:
            if self._file.borrow(offset, length, lent):
                transfer.advance(length)
                return length
            lent.close()
        return copy_through(source, source_offset, self, offset, length, transfer)

    def close(self) -> None:
        self._file.let_go()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._file.changing(), self._file.faults.during("stage", self._file.path):
            yield
