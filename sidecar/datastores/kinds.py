"""The kinds of datastore, by type."""

from collections.abc import Callable

from sidecar.datastores.interface import Datastore
from sidecar.datastores.posix import PosixDatastore

DATASTORE_TYPES: dict[str, Callable[[str, str], Datastore]] = {
    "local": PosixDatastore,
    "nfs": lambda name, path: PosixDatastore(name, path, "nfs"),
}
"""Opens a datastore of that type from its name and path."""
