"""A chaos run: python -m tests.chaos --seconds N --seed S. Ends with 1 when a promise was broken."""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.checker import Checker
from tests.chaos.driver import Plan, carry_out, end_on_signal
from tests.chaos.history import Recorder, read_history
from tests.chaos.report import render


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long operations are done (60)")
    parser.add_argument("--seed", type=int, help="what all that is random follows from (another one each time)")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep history, logs and what was found there")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if arguments.seed is None else arguments.seed
    end_on_signal()
    directory = Path(tempfile.mkdtemp(prefix="images-chaos-"))
    try:
        return _run(arguments.seconds, seed, directory, arguments.keep)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run(seconds: float, seed: int, directory: Path, keep: Path | None) -> int:
    path = directory / "history.jsonl"
    began = time.monotonic()
    try:
        with Recorder(path) as recorder:
            result = carry_out(Plan(seconds, seed, directory), recorder)
    except BaseException:
        _keep(directory, keep)
        raise
    history = read_history(path)
    verdict = Checker(history, result.readings, result.afterwards).check()
    sys.stdout.write(render(time.monotonic() - began, seed, result.layouts, history, verdict) + "\n")
    for name, readings in (("readings", result.readings), ("afterwards", result.afterwards)):
        found = {store: reading.to_json() for store, reading in readings.items()}
        (directory / f"{name}.json").write_text(json.dumps(found, indent=1))
    if verdict.violations and keep is None:
        keep = Path(tempfile.gettempdir()) / f"images-chaos-seed-{seed}"
    _keep(directory, keep)
    return 1 if verdict.violations else 0


def _keep(directory: Path, keep: Path | None) -> None:
    """History, logs and readings; the datastores themselves are gone."""
    if keep is None:
        return
    keep.mkdir(parents=True, exist_ok=True)
    for path in (*directory.glob("*.json*"), *directory.glob("*.log"), *directory.glob("run/*.log")):
        shutil.copy(path, keep)
    sys.stdout.write(f"history and logs are kept in {keep}\n")


sys.exit(main())
