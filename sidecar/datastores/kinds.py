"""The kinds of datastore, by type."""

from collections.abc import Callable

from sidecar.datastores.interface import Datastore
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.writers import Writers
from sidecar.locks.files import LockKind

DATASTORE_TYPES: dict[str, Callable[[str, str, LockKind, Writers], Datastore]] = {
    "local": lambda name, path, locks, writers: PosixDatastore(name, path, "local", locks, writers),
    "nfs": lambda name, path, locks, writers: PosixDatastore(name, path, "nfs", locks, writers),
    "vmfs": lambda name, path, locks, writers: PosixDatastore(name, path, "vmfs", locks, writers),
}
"""Opens a datastore of that type from its name and path, with locks of that kind; `writers` are those of all."""
