"""The directories that are locks, on a datastore that is reached by its server's API alone."""

from contextlib import suppress

from sidecar.errors import DatastoreUnavailable, InvalidRequest
from sidecar.vsphere.files import ServerFiles
from sidecar.vsphere.folder import Folder


class LockDirectories:
    """What locks need of a datastore, without what is staged for it."""

    def __init__(self, files: ServerFiles, folder: Folder) -> None:
        self._files, self._folder = files, folder
        self.make_directory = files.make_directory
        self.rename = files.move

    def names(self, path: str) -> list[str]:
        try:
            return [file.name for file in self._files.entries(path)]
        except DatastoreUnavailable:
            if not self._files.entry(path).is_directory:
                raise InvalidRequest(f"{path} is not a directory") from None
            # The file of a host with a path, which has let go of it, and somebody has it as a directory since.
            return [file.name for file in self._files.entries(path)]

    def read_file(self, path: str, limit: int) -> bytes:
        return self._folder.read(path, 0, limit)

    def put_file(self, path: str, content: bytes) -> None:
        # Who holds the lock is in the file's name; what it holds is for reading, and may be cut off.
        self._folder.write(path, len(content), lambda: [content], may_be_short=True)

    def remove_tree(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._files.remove(path)
