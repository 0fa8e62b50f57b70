"""Every operation, ended at every one of its steps: by SIGKILL, by a full disk, by an I/O error, by a right taken away.

Not sampled: the step at which the operation ends moves through all of them (see `crash_points`).
"""

import functools
import json
import os
import sys
import tempfile
from collections import Counter
from typing import Any

import pytest

from tests.crash.call_sites import Place, call_sites
from tests.crash.crash_operations import OPERATIONS
from tests.crash.crash_points import ALLOCATING, STEPS
from tests.crash.support import LAYOUTS
from tests.support.processes import run

# What only tidies up may fail without a word to the caller: the log has it. REFUSED: one thing of many was not done.
ANSWERS = {
    "ENOSPC": {"ok", "NO_SPACE", "REFUSED"},
    "EIO": {"ok", "DATASTORE_UNAVAILABLE", "REFUSED"},
    "EACCES": {"ok", "DATASTORE_DENIED", "REFUSED"},
}

pytestmark = pytest.mark.slow


@functools.cache
def ended(layout: str, fault: str) -> tuple[dict[str, list[dict[str, Any]]], set[Place]]:
    """What was found of each operation at each of its steps, and the places that were reached; once for all tests."""
    # In memory, where there is such a place: a kill does not touch what the kernel has not written yet.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.ismount("/dev/shm") else None) as directory:
        result = run(sys.executable, "-m", "tests.crash.crash_points", directory, layout, fault, timeout=110)
    *lines, last = [json.loads(line) for line in result.stdout.splitlines()]
    found = {name: [line for line in lines if line["operation"] == name] for name in OPERATIONS}
    return found, {(file, line) for file, line in last["reached"]}


def check_each(layout: str, operation: str, fault: str) -> list[dict[str, Any]]:
    """What holds whatever the fault is; what was found at each step, which has a name."""
    *found, whole = ended(layout, fault)[0][operation]
    expected = OPERATIONS[operation]
    between = expected.between | (expected.between_vsan if layout == "vsan" else set())
    assert whole["answer"] in expected.again, "the last run meets no fault"
    assert found, "the fault was met"
    for step in found:
        assert step["state"] in between, step
        assert step["again"] in expected.again, step
        assert step["afterwards"] == expected.end, step
        assert step["source"] == "WHOLE", step
        assert step["anew"] == "ok", step
        assert step["left"] == [], step
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_any_step_leaves_the_image_before_or_after_and_blocks_nobody(layout: str, operation: str) -> None:
    found = check_each(layout, operation, "kill")
    assert {step["answer"] for step in found} == {"killed"}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", ("compound", "vsan"))
def test_a_full_disk_at_any_step_leaves_nothing_half_made(layout: str, operation: str) -> None:
    for step in check_each(layout, operation, "ENOSPC"):
        # A lock whose holder could not be written down is held all the same.
        assert step["answer"] in ANSWERS["ENOSPC"], step
        assert step["leaked"] == 0, step
        if operation != "reap":
            assert step["staging"] == 0, step
            assert step["locks"] == 0, step
        if OPERATIONS[operation].publishes:
            # The wreck that was in the way is the reaper's: nothing comes back from the trash.
            assert [path for path in step["remains"] if not path.startswith("deleted_images/")] == [], step
            assert step["directory"] == (step["state"] != "ABSENT"), step
            assert (step["answer"] == "ok") == (step["state"] == "WHOLE"), step


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("layout", "fault"), [("compound", "EIO"), ("vsan", "EIO"), ("compound", "EACCES")])
def test_an_error_at_any_step_is_told_as_what_it_is_and_never_as_not_found(
    layout: str, operation: str, fault: str
) -> None:
    for step in check_each(layout, operation, fault):
        assert step["answer"] in ANSWERS[fault], step
        assert step["leaked"] == 0, step
        if OPERATIONS[operation].publishes:
            assert (step["answer"] == "ok") == (step["state"] == "WHOLE"), step


def test_every_kind_of_system_call_is_a_step_of_some_operation() -> None:
    """Else a call that is made in another way now would be left out of all of the above, without a word."""
    calls: Counter[str] = Counter()
    for operation in OPERATIONS:
        steps = [found["step"] for found in ended("compound", "EIO")[0][operation] if "step" in found]
        names = [step.removeprefix(f"{operation}: ") for step in steps]
        calls.update(name.split()[0] for name in names)
        # It begins with its lock, and lets go of it.
        for call in ("open", "flock (take)", "unlink", "flock (let go of)"):
            assert any(name.startswith(call) and name.endswith(".ec_lock") for name in names), (call, names)
    assert set(calls) == set(STEPS)
    assert set(ALLOCATING) < set(STEPS)


def test_every_place_that_changes_a_datastore_is_reached_by_some_operation() -> None:
    """The list is read from the code: a change of a new kind, or an operation that is not in the table, is named."""
    reached: set[Place] = set()
    for layout, fault in (("compound", "EIO"), ("sharded", "kill"), ("vsan", "EIO")):
        reached |= ended(layout, fault)[1]
    unreached = [
        f"sidecar/images/{file}:{first}: {call}"
        for (file, first, last), call in call_sites().items()
        if not any((file, line) in reached for line in range(first, last + 1))
    ]
    assert unreached == []
