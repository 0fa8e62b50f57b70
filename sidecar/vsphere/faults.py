"""What a vSphere server, or the way to it, says went wrong, as the project's errors."""

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

# What a call raises when the server was not reached, did not answer in time, or answered something else than the API.
UNREACHABLE = (OSError, HTTPException)


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
    except (ssl.SSLCertVerificationError, WrongCertificate) as error:
        raise DatastoreDenied(
            f"server {server}: cannot {what}: {error.args[-1]}; when it is the right server, configure ca_file, or its "
            "thumbprint"
        ) from error
    except NoVsphereAnswer as error:
        raise ServerUnreachable(
            f"server {server}: cannot {what}: what answers there is no vSphere API ({error}); look whether the address "
            "is the server's, and whether it runs"
        ) from error
    except UNREACHABLE as error:
        text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise ServerUnreachable(
            f"server {server}: cannot {what}: {text}; look whether it runs and can be reached from here"
        ) from error


def error_of(fault: Exception, server: str, what: str) -> Exception:
    """The error for a fault that a call raised, or that a task ended with."""
    where = f"server {server}: cannot {what}: {_described(fault)}"
    if isinstance(fault, vim.fault.FileNotFound):
        return FileNotFoundError(where)
    if isinstance(fault, vim.fault.FileAlreadyExists):
        return FileExistsError(where)
    for kind, error, what_to_do in _ERRORS:
        if isinstance(fault, kind):
            return error(f"{where}; {what_to_do}")
    return DatastoreUnavailable(f"{where}; look at the server's log")


def _described(fault: Exception) -> str:
    """Its name, and what it says of itself. Not its `repr`, which has everything that the server sent."""
    name = type(fault).__name__.rpartition(".")[2]
    details = [getattr(fault, field, None) for field in ("file", "datastorePath", "name", "privilegeId", "msg")]
    return " ".join([name, *(detail for detail in details if isinstance(detail, str) and detail)])
