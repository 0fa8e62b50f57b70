"""Files of a vSphere server that are open for reading.

No server holds a file for whoever reads it: it may be another one by the time that it was read, and is looked at then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidecar.datastores.interface import Entry, EntryKind
from sidecar.datastores.open_here import OpenHere
from sidecar.errors import FileChanged, InvalidRequest
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.faults import ServerUnreachable
from sidecar.vsphere.files import ServerFile, ServerFiles
from sidecar.vsphere.folder import Download, Folder
from sidecar.vsphere.inventory import ServerDatastore


@dataclass(frozen=True)
class ApiFiles:
    """The files of one datastore, as its server has them."""

    name: str
    connection: Connection
    known: Callable[[], ServerDatastore]
    files: ServerFiles
    folder: Folder
    open_here: OpenHere

    def open(self, path: str) -> "ApiReadable":
        self.open_here.add(path)
        try:
            entry = entry_of(self.files.entry(path))
            if entry.kind is not EntryKind.FILE:
                raise InvalidRequest(f"{self.name}: {path} is not a regular file")
            return ApiReadable(self, path, entry)
        except BaseException:
            self.open_here.remove(path)
            raise


class ApiReadable:
    """An open file of the server: read in order, it comes with one request."""

    inode = 0

    def __init__(self, origin: ApiFiles, path: str, entry: Entry) -> None:
        """It is counted as open until it is closed."""
        self.origin, self.path, self._entry = origin, path, entry
        self.modified_ns, self.size = entry.modified_ns, entry.size
        self.place = origin.name, path, entry.modified_ns, entry.size
        self._download: Download | None = None
        self._was_read = False
        self._position = 0  # where the last read ended

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        if offset != self._position or not offset:
            self._end_download()
            read = self.origin.folder.read
        else:
            read = self._read_on
        self._was_read = True
        try:
            data = read(self.path, offset, length)
        except FileNotFoundError as error:
            raise self._changed() from error
        self._position = offset + len(data)
        return data

    def note_read(self) -> None:
        """Its bytes were taken by other means."""
        self._was_read = True

    def require_same(self) -> None:
        if not self._was_read:
            return
        try:
            now = entry_of(self.origin.files.entry(self.path))
        except FileNotFoundError as error:
            raise self._changed() from error
        if (now.modified_ns, now.size) != (self.modified_ns, self.size):
            raise self._changed()

    def _changed(self) -> FileChanged:
        return FileChanged(
            f"{self.origin.name}: {self.path} was removed or replaced while it was read; look at the image again"
        )

    def _read_on(self, path: str, offset: int, length: int) -> bytes:
        if self._download is not None:
            try:
                return self._download.read(length)
            except ServerUnreachable:
                # Servers, and what is between, end what is read slowly.
                self._end_download()
        self._download = self.origin.folder.open(path, offset)
        return self._download.read(length)

    def data_ranges(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """All of it: what is a hole is not told."""
        length = min(length, self.size - offset)
        return [(offset, length)] if length > 0 else []

    def again(self) -> "ApiReadable":
        """The same open file once more, without asking the server."""
        self.origin.open_here.add(self.path)
        return ApiReadable(self.origin, self.path, self._entry)

    def close(self) -> None:
        self._end_download()
        self.origin.open_here.remove(self.path)

    def _end_download(self) -> None:
        download, self._download = self._download, None
        if download:
            download.close()


def entry_of(file: ServerFile) -> Entry:
    kind = EntryKind.DIRECTORY if file.is_directory else EntryKind.FILE
    # What it has allocated is not told; its links and its inode neither.
    return Entry(file.name, kind, file.size, file.size, file.modified_ns, file.modified_ns, 0)
