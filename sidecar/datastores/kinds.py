"""The kinds of datastore, by type."""

from collections.abc import Callable

from sidecar.datastores.interface import Datastore
from sidecar.datastores.posix import PosixDatastore
from sidecar.locks.files import LockKind

DATASTORE_TYPES: dict[str, Callable[[str, str, LockKind], Datastore]] = {
    "local": lambda name, path, locks: PosixDatastore(name, path, "local", locks),
    "nfs": lambda name, path, locks: PosixDatastore(name, path, "nfs", locks),
    "vmfs": lambda name, path, locks: PosixDatastore(name, path, "vmfs", locks),
}
"""Opens a datastore of that type from its name and path, with locks of that kind."""
