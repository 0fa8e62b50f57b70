"""tests/mount on a datastore of a vSphere server by its API alone."""

from tests.mount.test_deleting import *  # noqa: F403
