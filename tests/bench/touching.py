"""Touches beside running copies: by the sidecar, and by a plain process beside as many cp."""

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence

from tests.bench.clients import DELETE, TOUCH, Orders
from tests.bench.crowd import crowd, percentile
from tests.bench.hall import SHARED, WRITTEN, Hall
from tests.bench.results import at_most
from tests.bench.rounds import Contender, take_turns
from tests.bench.sizes import LoadSizes
from tests.support.places import TIMESTAMP
from tests.support.processes import wait_until

COLUMNS = ("touched", "how", "touches a second", "p50 ms", "p99 ms", "its range", "max ms", "p99 against", "target")
# Milliseconds, of the p99 of the sidecar's touches beside copies.
TARGET = at_most(50)
IDLE, BESIDE = "the sidecar, idle", "the sidecar, beside its copies"
RAW_IDLE, RAW_BESIDE = "utime and fsync, on the idle disk", "utime and fsync, beside as many cp"
WAYS = (RAW_IDLE, RAW_BESIDE, IDLE, BESIDE)
COPY = "copy"
_P50, _P99, _MAX, _RATE, _RUNNING = "p50", "p99", "max", "rate", "running"
# For what copies had begun before.
_FOREVER = 3600.0


def measure(hall: Hall, sizes: LoadSizes, runs: int) -> tuple[list[list[str]], list[str]]:
    """Rows, and how many copies there were beside the touches, in words."""
    rows: list[list[str]] = []
    notes: list[str] = []
    for datastore in (WRITTEN, SHARED):
        contenders = {way: _contender(hall, sizes, datastore, way) for way in WAYS}
        values = take_turns(f"touches on {datastore}", contenders, runs)
        rows += rows_of(_title(datastore), values)
        ours, cp = (statistics.median(values[way][_RUNNING]) for way in (BESIDE, RAW_BESIDE))
        notes.append(f"{datastore}: {ours:.1f} copies and {cp:.1f} cp ran at a time")
    return rows, notes


def rows_of(title: str, values: Mapping[str, Mapping[str, Sequence[float]]]) -> list[list[str]]:
    """A row for each way; the verdict in that of the sidecar beside copies."""
    p99 = {way: statistics.median(values[way][_P99]) for way in WAYS}
    against = {
        IDLE: f"{p99[IDLE] / p99[RAW_IDLE]:.3g} of utime and fsync",
        BESIDE: f"{p99[BESIDE] / p99[IDLE]:.3g} of idle, {p99[BESIDE] / p99[RAW_BESIDE]:.3g} of beside cp",
        RAW_BESIDE: f"{p99[RAW_BESIDE] / p99[RAW_IDLE]:.3g} of idle",
    }
    return [
        [
            title,
            way,
            f"{statistics.median(values[way][_RATE]):.0f}",
            f"{statistics.median(values[way][_P50]):.1f}",
            f"{p99[way]:.1f}",
            f"{min(values[way][_P99]):.1f} to {max(values[way][_P99]):.1f}",
            f"{max(values[way][_MAX]):.1f}",
            against.get(way, ""),
            TARGET.verdict(p99[way]) if way == BESIDE else "",
        ]
        for way in WAYS
    ]


def _title(datastore: str) -> str:
    return f"{datastore}, {'where the copies are written' if datastore == WRITTEN else 'the other datastore'}"


def _contender(hall: Hall, sizes: LoadSizes, datastore: str, way: str) -> Contender:
    raw = way in (RAW_IDLE, RAW_BESIDE)
    images = hall.planted(datastore)
    touches = Orders(
        address="" if raw else hall.sidecar.address,
        task="raw touch" if raw else "touch",
        clients=1,
        number=0,
        seconds=sizes.touch_seconds,
        touched=[str(path / TIMESTAMP) for path in images.values()] if raw else list(images),
        copied={},
        listed=[],
    )

    def contender(first: bool) -> dict[str, float]:
        hall.settle()
        running = 0.0
        with contextlib.ExitStack() as stack:
            toucher = stack.enter_context(crowd(touches))
            if way in (BESIDE, RAW_BESIDE):
                copiers = stack.enter_context(crowd(_copies(hall, sizes, raw)))
                copiers.go()
                wait_until(lambda: hall.copies_run(raw), "copies run", 30)
                time.sleep(min(1.0, sizes.touch_seconds))  # until all of them do, and the disk has its work
            toucher.go()
            touched = toucher.outcome()
            touched.require_no_error_but()
            if way in (BESIDE, RAW_BESIDE):
                copiers.end()
                copied = copiers.outcome()
                copied.require_no_error_but()
                busy, freeing = sum(copied.seconds[COPY]), sum(copied.seconds[DELETE])
                running = sizes.copies * busy / (busy + freeing)
        milliseconds = [1000 * seconds for seconds in touched.seconds[TOUCH]]
        return {
            _P50: percentile(milliseconds, 0.5),
            _P99: percentile(milliseconds, 0.99),
            _MAX: max(milliseconds),
            _RATE: len(milliseconds) / sizes.touch_seconds,
            _RUNNING: running,
        }

    return contender


def _copies(hall: Hall, sizes: LoadSizes, raw: bool) -> Orders:
    source = str(hall.image_directory(WRITTEN, sizes.large.name)) if raw else f"{WRITTEN}/{sizes.large.name}"
    destination = str(hall.raw_directory) if raw else WRITTEN
    return Orders(
        address="" if raw else hall.sidecar.address,
        task="cp" if raw else "copy",
        clients=sizes.copies,
        number=0,
        seconds=_FOREVER,
        touched=[],
        copied={COPY: (source, destination)},
        listed=[],
    )
