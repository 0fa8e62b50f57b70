"""Real runs: of the product, in which every promise holds, and of sidecars that break one, which is seen."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.checker import Checker, Verdict
from tests.chaos.driver import Plan, carry_out
from tests.chaos.history import Recorder, read_history
from tests.chaos.report import render

SEED = 20
MINUTE = 60.0
# By the client alone: what breaks is a sidecar.
CLIENT_KINDS = ("copy", "import", "delete", "force", "restore", "purge", "read", "validate")


def carried_out(plan: Plan) -> Verdict:
    path = plan.directory / "history.jsonl"
    with Recorder(path) as recorder:
        result = carry_out(plan, recorder)
    history = read_history(path)
    verdict = Checker(history, result.readings, result.afterwards).check()
    sys.stdout.write(render(plan.seconds, plan.seed, result.layouts, history, verdict))  # told when the test fails
    return verdict


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_promise_holds_for_a_minute(tmp_path: Path) -> None:
    verdict = carried_out(Plan(MINUTE, SEED, tmp_path))
    assert verdict.violations == []
    assert verdict.published > 20
    assert len(verdict.undecided) < 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("rule", "seed", "promise"),
    [
        ("publish-file-by-file", 3, "whole"),
        ("purge-without-lock", 3, "order"),
        ("publish-over-others", 3, "order"),
    ],
)
def test_a_rule_that_is_broken_is_seen(tmp_path: Path, rule: str, seed: int, promise: str) -> None:
    command = (sys.executable, "-m", "tests.chaos.broken", rule)
    kinds = ("copy", "import") if promise == "whole" else CLIENT_KINDS
    verdict = carried_out(Plan(15, seed, tmp_path, command, kinds, disturb=False))
    assert promise in {violation.promise for violation in verdict.violations}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--seconds", "100", "--seed", "5"]
    place = tmp_path_factory.mktemp("i")  # short: a socket's path has at most 107 bytes
    environment = {"TMPDIR": str(place), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    said = tmp_path / "said"  # a pipe that nobody reads would hold it up
    with said.open("wb") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            # Interrupted once it runs, wherever it is then.
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"it ended with {process.wait(25)}:\n{said.read_text()[-4000:]}")
            process.terminate()
            assert process.wait(120) == 143
        finally:
            process.kill()
    assert list(place.iterdir()) == []
    assert str(place) not in Path("/proc/self/mounts").read_text()
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(place).encode() not in cmdline.read_bytes()
        except OSError:
            continue
