"""What the kernel says went wrong with a datastore, as the project's errors."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from sidecar.beneath import PathError
from sidecar.errors import DatastoreDenied, DatastoreUnavailable, ImagesError, InvalidRequest, NoSpace

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_PLAIN = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


class Faults:
    """Translates the OSErrors of one datastore. FileNotFoundError and FileExistsError pass: they are answers."""

    def __init__(
        self,
        name: str,
        root_path: str,
        *,
        when_full: str = "purge images that are not needed, or make the datastore larger",
    ) -> None:
        """`when_full`: what to do then."""
        self.name = name
        self.root_path = root_path
        self._when_full = when_full

    @contextmanager
    def during(self, what: str, path: str = "") -> Iterator[None]:
        """For the time of one operation, named `what`, as in "cannot read image_a/a.vmdk"."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, ImagesError):
            raise
        except OSError as error:
            where = f"{self.name}: cannot {what}{' ' + path if path else ''}: {error.strerror or error}"
            if error.errno in _NO_SPACE:
                raise NoSpace(f"{where}; {self._when_full}") from error
            if error.errno in _DENIED:
                raise DatastoreDenied(f"{where}; give the sidecar the right to it under {self.root_path}") from error
            if isinstance(error, PathError) or error.errno in _NOT_PLAIN:
                raise InvalidRequest(
                    f"{where}; links, and other than plain files and directories, are refused"
                ) from error
            raise DatastoreUnavailable(f"{where}; look at the datastore under {self.root_path}") from error
