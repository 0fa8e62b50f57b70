"""What a vSphere server, or the way to it, says went wrong, as the project's errors."""

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException

from pyVmomi import vim, vmodl

from sidecar.errors import (
    DatastoreDenied,
    DatastoreUnavailable,
    DiskFileFault,
    ImageInUse,
    ImagesError,
    NoSpace,
    OperationCancelled,
)
from sidecar.vsphere.certificates import WrongCertificate

_IN_PYTHON = re.compile(r" *\(_ssl\.c:\d+\)")  # where an error of TLS was noticed
_MOST_SHOWN = 300  # characters of one thing

# What a call raises when the server was not reached, did not answer in time, or answered something else than the API.
UNREACHABLE = (OSError, HTTPException)


class NoConnectionError(OSError):
    """There was no connection for a call, so that nothing of it was sent. `reason`: why."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class NoVsphereAnswer(HTTPException):
    """What came is no answer of the API: that of another program, or a part of one."""


class ServerUnreachable(DatastoreUnavailable):
    """The server gave no answer: whether it did what it was asked is not known."""


# The first that fits: what is special before what it is a kind of.
_ERRORS: tuple[tuple[type[Exception], type[ImagesError], str], ...] = (
    (vim.fault.InvalidLogin, DatastoreDenied, "put right the credentials that are configured for the server"),
    (vim.fault.NotAuthenticated, DatastoreUnavailable, "the server ends every session at once; look at its log"),
    (vim.fault.NoPermission, DatastoreDenied, "give the account of the sidecar this privilege"),
    (vim.fault.NoDiskSpace, NoSpace, "purge images that are not needed, or make the datastore larger"),
    (vim.fault.FileTooLarge, NoSpace, "the datastore takes no file of that size"),
    (vim.fault.FileLocked, ImageInUse, "a VM or another task has it open; end that use first"),
    (vim.fault.FileNotWritable, DatastoreDenied, "make the datastore writable"),
    (vim.fault.CannotAccessFile, DatastoreUnavailable, "look at the datastore, and at the host that has it"),
    (vim.fault.FileFault, DiskFileFault, "look at the file, and at the space on the datastore"),
    (vim.fault.InvalidDatastore, DatastoreUnavailable, "look at the datastore in the server's inventory"),
    (vmodl.fault.RequestCanceled, OperationCancelled, "somebody cancelled it on the server"),
    (vmodl.fault.ManagedObjectNotFound, DatastoreUnavailable, "the server has lost it, maybe in a restart; try again"),
    (vmodl.fault.HostCommunication, DatastoreUnavailable, "look at the connection of the server to its hosts"),
    (vmodl.MethodFault, DatastoreUnavailable, "look at the server's log"),
)


@contextmanager
def translated(server: str, what: str) -> Iterator[None]:
    """For the time of one call, named `what` as in "cannot copy a.vmdk": its faults as ImagesErrors.

    FileNotFoundError and FileExistsError for what the server says is not there, or there already: they are answers.
    """
    try:
        yield
    except vmodl.MethodFault as fault:
        raise error_of(fault, server, what) from fault
    except (FileNotFoundError, FileExistsError):
        raise
    except UNREACHABLE as error:
        raise _unreachable(error.reason if isinstance(error, NoConnectionError) else error, server, what) from error


def _unreachable(error: Exception, server: str, what: str) -> ImagesError:
    where = f"server {server}: cannot {what}"
    if isinstance(error, ssl.SSLCertVerificationError | WrongCertificate):
        return DatastoreDenied(
            f"{where}: {printable(str(error.args[-1]))}; when it is the right server, configure ca_file, or its "
            "thumbprint"
        )
    if isinstance(error, NoVsphereAnswer):
        return ServerUnreachable(
            f"{where}: what answers there is no vSphere API ({printable(str(error))}); look whether the address is the "
            "server's, and whether it runs"
        )
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    if isinstance(error, TimeoutError) and "timed out" in text:
        text = "it did not answer in time"
    text = _IN_PYTHON.sub("", text)
    return ServerUnreachable(f"{where}: {printable(text)}; look whether it runs and can be reached from here")


def error_of(fault: Exception, server: str, what: str) -> Exception:
    """The error for a fault that a call raised, or that a task ended with."""
    where = f"server {server}: cannot {what}: {described(fault)}"
    if isinstance(fault, vim.fault.FileNotFound):
        return FileNotFoundError(where)
    if isinstance(fault, vim.fault.FileAlreadyExists):
        return FileExistsError(where)
    for kind, error, what_to_do in _ERRORS:
        if isinstance(fault, kind):
            return error(f"{where}; {what_to_do}")
    return DatastoreUnavailable(f"{where}; look at the server's log")


def described(fault: Exception) -> str:
    """The name of a fault, and what it says of itself. Not its `repr`, which has everything that the server sent."""
    name = type(fault).__name__.rpartition(".")[2]
    details = [getattr(fault, field, None) for field in ("file", "datastorePath", "name", "privilegeId", "msg")]
    return " ".join([name, *(printable(detail) for detail in details if isinstance(detail, str) and detail)])


def printable(text: str) -> str:
    """What a server sent, as a message or a log line may carry it: on one line, without controls, and not endless."""
    shown = " ".join("".join(each if each.isprintable() else " " for each in text[: 2 * _MOST_SHOWN]).split())
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}…"
