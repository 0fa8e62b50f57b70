"""Who the sidecar is to a server: read anew for every login, so that a changed password needs no restart."""

import errno
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from sidecar.errors import DatastoreDenied

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a password, which no message, log line or traceback shows."""

    user: str = field(repr=False)
    password: str = field(repr=False)


def from_file(path: str) -> Callable[[], Credentials]:
    """Those in a file of one line, USER:PASSWORD; DatastoreDenied when it is not there or cannot be meant."""

    told: set[int] = set()  # the modes of which it was warned

    def read() -> Credentials:
        try:
            text, mode = _read_regular(path)
        except (OSError, UnicodeDecodeError) as error:
            what = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise DatastoreDenied(f"cannot read the credentials in {path}: {what}") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO) and mode not in told:
            told.add(mode)
            _log.warning("credentials are not the sidecar's alone path=%s mode=%o see=chmod 600", path, mode)
        return _parse(text, path)

    return read


def _read_regular(path: str) -> tuple[str, int]:
    """What is in it, and its permissions."""
    # Not waiting for who writes into a FIFO: nobody may.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, encoding="utf-8") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read(), stat.S_IMODE(mode)


def from_variable(name: str) -> Callable[[], Credentials]:
    """Those in an environment variable, USER:PASSWORD; DatastoreDenied when it is not set or cannot be meant."""
    return lambda: _parse(os.environ.get(name, ""), f"the environment variable {name}")


def _parse(text: str, source: str) -> Credentials:
    line = text.removesuffix("\n")
    user, colon, password = line.partition(":")
    if not line:
        what = f"there are no credentials in {source}"
    elif "\n" in line:
        what = f"there is more than one line in {source}"
    elif not colon:
        what = f"there is no colon in {source}"
    elif not (user and password):
        what = f"there is no {'password' if user else 'user'} in {source}"
    else:
        return Credentials(user, password)
    raise DatastoreDenied(f"{what}: write one line, USER:PASSWORD")
