"""What can go wrong, one class per fault: each with a reason, a gRPC code, an errno and an exit code.

The reason travels in google.rpc.ErrorInfo, so the client raises the same class that the sidecar raised.
Messages say what happened, where, and what to do next.
"""

import errno
from typing import ClassVar


class ImagesError(Exception):
    """Base of every error that this project raises on purpose.

    `reason`, `code` (the name of a gRPC status), `errno` and `exit_code` belong to the class, never to one instance,
    so one table serves the server, the client, the mount and the command line.
    """

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[str] = "INTERNAL"
    errno: ClassVar[int] = errno.EIO
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ImageNotFound(ImagesError):
    reason, code, errno, exit_code = "IMAGE_NOT_FOUND", "NOT_FOUND", errno.ENOENT, 3


class FileNotInImage(ImagesError):
    """The image or staging directory has no file of that name."""

    reason, code, errno, exit_code = "FILE_NOT_FOUND", "NOT_FOUND", errno.ENOENT, 3


class FileChanged(ImagesError):
    """The file is another one than the caller knows: its image was replaced, or changed. Look at the image again."""

    reason, code, errno, exit_code = "FILE_CHANGED", "FAILED_PRECONDITION", errno.ESTALE, 5


class DatastoreNotFound(ImagesError):
    reason, code, errno, exit_code = "DATASTORE_NOT_FOUND", "NOT_FOUND", errno.ENOENT, 3


class StagingNotFound(ImagesError):
    """The staging directory was published, aborted, or expired, or the sidecar that held it was restarted."""

    reason, code, errno, exit_code = "STAGING_NOT_FOUND", "NOT_FOUND", errno.ESTALE, 3


class HolderNotFound(ImagesError):
    """The call that made the holder has ended, and what it held is free: make another one, and hold again."""

    reason, code, errno, exit_code = "HOLDER_NOT_FOUND", "NOT_FOUND", errno.EHOSTDOWN, 3


class StagingPublished(ImagesError):
    """The staging directory cannot be aborted any more: it is the image now."""

    reason, code, errno, exit_code = "STAGING_PUBLISHED", "FAILED_PRECONDITION", errno.EEXIST, 5


class StagingLost(ImagesError):
    """Nobody can tell what of it the disk has, or what a server still writes there: it is dropped, and begun anew."""

    reason, code, errno, exit_code = "STAGING_LOST", "DATA_LOSS", errno.EIO, 1


class ImageAlreadyExists(ImagesError):
    reason, code, errno, exit_code = "IMAGE_ALREADY_EXISTS", "ALREADY_EXISTS", errno.EEXIST, 4


class ImageTombstoned(ImagesError):
    reason, code, errno, exit_code = "IMAGE_TOMBSTONED", "FAILED_PRECONDITION", errno.ENOENT, 5


class ImageNotTombstoned(ImagesError):
    """Restore and purge are for tombstoned images."""

    reason, code, errno, exit_code = "IMAGE_NOT_TOMBSTONED", "FAILED_PRECONDITION", errno.EPERM, 5


class ImageIncomplete(ImagesError):
    reason, code, errno, exit_code = "IMAGE_INCOMPLETE", "FAILED_PRECONDITION", errno.EIO, 5


class ImageInUse(ImagesError):
    reason, code, errno, exit_code = "IMAGE_IN_USE", "FAILED_PRECONDITION", errno.EBUSY, 5


class UseUnknown(ImagesError):
    """What a VM uses cannot be told, so it may use any image: what is wrong with the VM is in the message."""

    reason, code, errno, exit_code = "USE_UNKNOWN", "FAILED_PRECONDITION", errno.EBUSY, 5


class InvalidImageId(ImagesError):
    reason, code, errno, exit_code = "INVALID_IMAGE_ID", "INVALID_ARGUMENT", errno.EINVAL, 2


class InvalidDisk(ImagesError):
    """The disk is not one that can be an image: what is wrong is in the message."""

    reason, code, errno, exit_code = "INVALID_DISK", "INVALID_ARGUMENT", errno.EINVAL, 1


class InvalidRequest(ImagesError):
    """An argument of the call, other than an image id or a disk, cannot be meant."""

    reason, code, errno, exit_code = "INVALID_REQUEST", "INVALID_ARGUMENT", errno.EINVAL, 2


class InvalidMetadata(ImagesError):
    """A companion file does not hold what it must: reported, never taken for "no metadata"."""

    reason, code, errno, exit_code = "INVALID_METADATA", "FAILED_PRECONDITION", errno.EIO, 5


class TaskAlreadyRunning(ImagesError):
    """There is one scan and one sweep of a datastore at a time."""

    reason, code, errno, exit_code = "TASK_ALREADY_RUNNING", "FAILED_PRECONDITION", errno.EALREADY, 5


class LockTimeout(ImagesError):
    """Another process changes the image, and did so for as long as the caller waited."""

    reason, code, errno, exit_code = "LOCK_TIMEOUT", "ABORTED", errno.EBUSY, 1


class NoSpace(ImagesError):
    reason, code, errno, exit_code = "NO_SPACE", "RESOURCE_EXHAUSTED", errno.ENOSPC, 7


class TooManyCalls(ImagesError):
    """A bounded pool is full: the same call may succeed later."""

    reason, code, errno, exit_code = "TOO_MANY_CALLS", "RESOURCE_EXHAUSTED", errno.EAGAIN, 6


class DatastoreUnavailable(ImagesError):
    """The datastore answered an operation with an I/O error: nothing is known about what is on it."""

    reason, code, errno, exit_code = "DATASTORE_UNAVAILABLE", "UNAVAILABLE", errno.EIO, 6


class DatastoreDenied(ImagesError):
    """The sidecar may not read or write there (EACCES, EPERM, EROFS)."""

    reason, code, errno, exit_code = "DATASTORE_DENIED", "PERMISSION_DENIED", errno.EACCES, 1


class DiskFileFault(ImagesError):
    """The bytes of a disk file could not be read, written or cloned."""

    reason, code, errno, exit_code = "DISK_FILE_FAULT", "INTERNAL", errno.EIO, 1


class OperationCancelled(ImagesError):
    reason, code, errno, exit_code = "CANCELLED", "CANCELLED", errno.EINTR, 1


class DeadlineExceeded(ImagesError):
    """The call took longer than its caller was ready to wait."""

    reason, code, errno, exit_code = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", errno.ETIMEDOUT, 6


class SidecarUnavailable(ImagesError):
    """No sidecar answers at the address."""

    reason, code, errno, exit_code = "SIDECAR_UNAVAILABLE", "UNAVAILABLE", errno.EHOSTDOWN, 6


class InternalError(ImagesError):
    """A defect: the log of the sidecar has the traceback."""


class CallUnknown(InternalError):
    """The sidecar is of a version that does not have the call."""


def error_classes() -> dict[str, type[ImagesError]]:
    """Every error class by its reason."""
    return {cls.reason: cls for cls in ImagesError.__subclasses__()}
