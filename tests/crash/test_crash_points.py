"""Every operation, ended at every one of its steps: by SIGKILL, by a full disk, by an I/O error.

Not sampled: the step at which the operation ends moves through all of them (see `crash_points`).
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.crash_points import OPERATIONS
from tests.crash.support import LAYOUTS
from tests.support.processes import run

REPLACING = ("copy", "import", "replace")
# What the image may be when the operation ends in the middle: what it was, and what it was to become.
BETWEEN = {
    "copy": {"ABSENT", "WHOLE"},
    "import": {"ABSENT", "WHOLE"},
    "replace": {"INCOMPLETE", "ABSENT", "WHOLE"},
    "delete": {"WHOLE", "TOMBSTONED"},
    "restore": {"TOMBSTONED", "WHOLE"},
    "restore a repairable one": {"TOMBSTONED", "WHOLE"},
    "purge": {"TOMBSTONED", "ABSENT"},
    "force": {"WHOLE", "ABSENT"},
    "touch": {"WHOLE"},
}
# Where directories cannot be renamed: what nobody uses, and the next publish or purge clears away.
BETWEEN_VSAN = {**BETWEEN, **{name: BETWEEN[name] | {"INCOMPLETE"} for name in ("copy", "import", "replace", "force")}}
IN_THE_END = {"delete": "TOMBSTONED", "purge": "ABSENT", "force": "ABSENT"}
# Of a second attempt: it does what is left to do, or says that it is done.
AGAIN = {
    "copy": {"ok", "IMAGE_ALREADY_EXISTS"},
    "import": {"ok", "IMAGE_ALREADY_EXISTS"},
    "replace": {"ok", "IMAGE_ALREADY_EXISTS"},
    "delete": {"ok", "IMAGE_TOMBSTONED"},
    "restore": {"ok", "IMAGE_NOT_TOMBSTONED"},
    "restore a repairable one": {"ok", "IMAGE_NOT_TOMBSTONED"},
    "purge": {"ok", "IMAGE_NOT_FOUND"},
    "force": {"ok", "IMAGE_NOT_FOUND"},
    "touch": {"ok"},
}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is such a place: a kill does not touch what the kernel has not written yet."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.ismount("/dev/shm") else tmp_path) as name:
        yield Path(name)


def steps(directory: Path, layout: str, operation: str, fault: str) -> list[dict[str, Any]]:
    result = run(sys.executable, "-m", "tests.crash.crash_points", directory, layout, operation, fault)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found[-1]["answer"] == "ok", "the last run meets no fault"
    assert len(found) > 4, "the fault was met at several steps"
    return found


def check_each(found: list[dict[str, Any]], layout: str, operation: str) -> None:
    between = (BETWEEN_VSAN if layout == "vsan" else BETWEEN)[operation]
    for step in found:
        assert step["state"] in between, step
        assert step["again"] in AGAIN[operation], step
        assert step["afterwards"] == IN_THE_END.get(operation, "WHOLE"), step
        assert step["source"] == "WHOLE", step
        assert step["anew"] == "ok", step


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_any_step_leaves_the_image_before_or_after_and_blocks_nobody(
    directory: Path, layout: str, operation: str
) -> None:
    found = steps(directory, layout, operation, "kill")
    assert {step["answer"] for step in found[:-1]} == {"killed"}
    check_each(found, layout, operation)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", ("compound", "vsan"))
def test_a_full_disk_at_any_step_leaves_nothing_half_made(directory: Path, layout: str, operation: str) -> None:
    found = steps(directory, layout, operation, "ENOSPC")
    check_each(found, layout, operation)
    for step in found:
        # A lock whose holder could not be written down is held all the same.
        assert step["answer"] in ("ok", "NO_SPACE"), step
        assert step["staging"] == 0, step
        assert step["locks"] == 0, step
        assert step["leaked"] == 0, step
        if operation in REPLACING:
            assert step["remains"] == [], step
            assert step["directory"] == (step["state"] != "ABSENT"), step
            assert (step["answer"] == "ok") == (step["state"] == "WHOLE"), step


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", ("compound", "vsan"))
def test_an_io_error_at_any_step_is_unavailable_and_never_not_found(
    directory: Path, layout: str, operation: str
) -> None:
    found = steps(directory, layout, operation, "EIO")
    check_each(found, layout, operation)
    for step in found:
        # What only tidies up may fail without a word to the caller: the log has it.
        assert step["answer"] in ("ok", "DATASTORE_UNAVAILABLE"), step
        assert step["leaked"] == 0, step
        if operation in REPLACING:
            assert (step["answer"] == "ok") == (step["state"] == "WHOLE"), step
