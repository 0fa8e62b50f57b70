"""Whether the files of a staged image are a whole disk, as far as their names and sizes tell."""

from fusefs.staged import StagedDirectory, StagedFile
from sidecar.errors import InvalidDisk
from sidecar.images.vmdk import read_disk


def has_whole_disk(directory: StagedDirectory) -> bool:
    """Quick: the sidecar, which publishes, looks at more. What cannot be read is no disk yet."""
    reader = _Reader(directory)
    for file in directory.files:
        if not file.name.endswith(".vmdk"):
            continue
        try:
            if all(extent.fits(reader.size(extent.name)) for extent in read_disk(file.name, reader).files):
                return True
        except (InvalidDisk, OSError):
            continue
    return False


class _Reader:
    def __init__(self, directory: StagedDirectory) -> None:
        self._directory = directory

    def size(self, name: str) -> int:
        return self._file(name).content.status().size

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self._file(name).content.read(length, offset)

    def _file(self, name: str) -> StagedFile:
        file = self._directory.file(name)
        if file is None:
            raise FileNotFoundError(name)
        return file
