"""The kinds of datastore lock, by id."""

from collections.abc import Callable

from sidecar.locks.exclusive_open import ExclusiveOpen
from sidecar.locks.files import LockKind
from sidecar.locks.flock import Flock

LOCK_KINDS: dict[str, Callable[[], LockKind]] = {
    "flock": Flock,
    "exclusive-open": ExclusiveOpen,
}
