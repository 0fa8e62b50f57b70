"""A datastore that was closed stays that: what was left behind in a thread of its own opens nothing any more."""

import os
from pathlib import Path

import pytest

from sidecar.datastores.posix import PosixDatastore
from sidecar.errors import DatastoreUnavailable
from tests.crash.support import open_descriptors


def test_who_looks_at_a_datastore_that_was_closed_opens_nothing(tmp_path: Path) -> None:
    before = open_descriptors(os.getpid())
    datastore = PosixDatastore("one", str(tmp_path))
    datastore.check()
    datastore.close()
    with pytest.raises(DatastoreUnavailable, match="one was closed"):
        datastore.check()
    assert open_descriptors(os.getpid()) == before
