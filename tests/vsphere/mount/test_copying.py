"""tests/mount on a datastore of a vSphere server by its API alone."""

from tests.mount.test_copying import *  # noqa: F403
