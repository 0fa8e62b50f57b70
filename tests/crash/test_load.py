"""Many clients at once, for a while: none gets an error that it may not get, and nothing stays when they have left."""

import tempfile
from pathlib import Path

import pytest

from tests.bench import mixing
from tests.bench.command import MIB
from tests.bench.disks import Disk
from tests.bench.hall import hall
from tests.bench.sizes import LoadSizes

# The large disk of the benchmark is not needed: no touches are measured beside its copies.
SIZES = LoadSizes(seconds=20.0, copies=1, large=Disk("large", "1 MiB dense", MIB, MIB, 1))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sixty_four_clients_leave_nothing_behind() -> None:
    """That there is no other error than TOO_MANY_CALLS, and nothing on the disks, the load itself checks."""
    with tempfile.TemporaryDirectory(prefix="test-load-") as directory, hall(Path(directory), SIZES) as where:
        mixed = mixing.mix(where, SIZES)
    assert {"touch", "list", "copy, shared", "copy, written", "copy, between the two"} <= set(mixed.outcome.seconds)
    assert mixed.growth.mebibytes < mixing.MORE_MIB
    assert mixed.growth.descriptors <= mixing.MORE_DESCRIPTORS
    assert mixed.growth.threads - mixed.growth.pooled <= mixing.MORE_THREADS
