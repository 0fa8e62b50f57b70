"""What a system call on the mount answers when something goes wrong, and the log line that says why."""

import errno
import functools
import logging
import os
from collections.abc import Callable
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

from sidecar.errors import DeadlineExceeded, ImagesError, OperationCancelled

_log = logging.getLogger(__name__)

# What a user did: their own tool says it, at once.
_EXPECTED = {
    errno.ENOENT,
    errno.EEXIST,
    errno.EINVAL,
    errno.EROFS,
    errno.EPERM,
    errno.EXDEV,
    errno.ENOTEMPTY,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENXIO,
    errno.ENODATA,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EBUSY,
}


_TRANSIENT = {"UNAVAILABLE", "ABORTED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}


def is_transient(error: ImagesError) -> bool:
    """Whether the same call may succeed later, with nothing done about it."""
    return error.code in _TRANSIENT


def errno_of(error: ImagesError) -> int:
    """What a system call answers for it."""
    # Who does not answer within the time that any answer takes, or before the mount ends, is away for whoever waits
    # for it.
    return errno.EHOSTDOWN if isinstance(error, DeadlineExceeded | OperationCancelled) else error.errno


class AskAgain(OSError):  # noqa: N818 (it is an answer, and no failure)
    """ESTALE to an open: the kernel looks the path up, whatever it remembers of it, and opens it once more."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.ESTALE, "what the kernel knows of it may be old", path)


class HasPaths(Protocol):
    """Says which path a call is about, for the log."""

    def path_of(self, *arguments: Any) -> str: ...


Self = TypeVar("Self", bound=HasPaths)
Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


def fail(number: int, what: str = "") -> NoReturn:
    """Ends the call with an errno; `what` is for the log, the user sees the errno's own text."""
    raise OSError(number, what or os.strerror(number))


def operation(
    method: Callable[Concatenate[Self, Parameters], Answer],
) -> Callable[Concatenate[Self, Parameters], Answer]:
    """Makes a method one that libfuse may call: it answers or raises OSError, and no failure is without a log line."""
    call = method.__name__

    @functools.wraps(method)
    def wrapped(self: Self, /, *arguments: Parameters.args, **options: Parameters.kwargs) -> Answer:
        try:
            return method(self, *arguments, **options)
        except ImagesError as error:
            number = errno_of(error)
            level = logging.INFO if number in _EXPECTED else logging.WARNING
            path = self.path_of(*arguments)
            _log.log(level, "%s failed path=%s reason=%s cause=%s", call, path, error.reason, error.message)
            raise OSError(number, error.message) from error
        except AskAgain:
            raise
        except OSError as error:
            if error.errno not in _EXPECTED:
                _log.warning("%s failed path=%s cause=%s", call, self.path_of(*arguments), error)
            elif error.strerror != os.strerror(error.errno):  # `fail` was told more than the user sees
                _log.info("%s refused path=%s cause=%s", call, self.path_of(*arguments), error)
            raise
        except Exception as error:
            _log.exception("%s failed path=%s cause=%r", call, self.path_of(*arguments), error)
            raise OSError(errno.EIO, repr(error)) from error

    return wrapped
