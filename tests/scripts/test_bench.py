"""scripts/bench on sizes of a test: every part measures what it says, and nothing is left of it."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.bench import load, vsphere
from tests.bench.command import MIB
from tests.bench.crowd import Outcome, percentile
from tests.bench.disks import Disk
from tests.bench.mount import PARTS, measure
from tests.bench.results import Result, Target, at_least, at_most, seconds
from tests.bench.sizes import LoadSizes, ServerSizes, Sizes
from tests.bench.stage import BINDFS, OURS, RAW
from tests.support.processes import run

SMALL = Sizes(
    images=20,
    many_images=40,
    dense=Disk("dense", "8 MiB dense", 8 * MIB, MIB, 8),
    sparse=Disk("sparse", "64 MiB, 4 MiB of data", 64 * MIB, MIB, 4),
    idle_seconds=0.1,
)
SMALL_LOAD = LoadSizes(
    seconds=2.0,
    clients=8,
    processes=2,
    images=5,
    small=Disk("small", "2 MiB dense", 2 * MIB, MIB, 2),
    touch_seconds=0.5,
    copies=2,
    large=Disk("large", "8 MiB dense", 8 * MIB, MIB, 8),
)
# Contenders of each measure, and how many verdicts there are on the mount.
MEASURED: dict[str, list[tuple[set[str], int]]] = {
    "browsing": [({RAW, BINDFS, OURS}, 2), ({RAW, BINDFS, OURS}, 1)],
    "reading": [({RAW, BINDFS, OURS}, 1)] * 3,
    "copying": [({RAW, f"{RAW}, --reflink=never", OURS}, 1)],
    "importing": [({RAW, f"{RAW}, then sync -f", BINDFS, f"{BINDFS}, then sync -f", OURS}, 1)],
    "living": [({OURS}, 1)] * 5,
}


@pytest.fixture
def place() -> Iterator[Path]:
    """Not tmp_path, which is long: a benchmark's directories and a socket are below it."""
    with tempfile.TemporaryDirectory(prefix="test-bench-") as directory:
        yield Path(directory)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_compares_all_contenders_and_leaves_nothing(part: str, place: Path) -> None:
    report = measure(place, SMALL, 1, [part])
    measures: dict[str, list[Sequence[str]]] = {}
    for row in report.rows:
        measures.setdefault(row[0], []).append(row)
    assert len(measures) == len(MEASURED[part])
    for (what, rows), (contenders, verdicts) in zip(measures.items(), MEASURED[part], strict=True):
        assert {row[1] for row in rows} == contenders, what
        for row in rows:
            expected = verdicts if row[1] == OURS else 0
            assert len(re.findall(r"[≤≥] [\d.]+: (?:reached|missed)", row[5])) == expected, row
            assert re.match(r"\d", row[2]), row
    assert list(place.iterdir()) == []
    assert str(place) not in Path("/proc/self/mounts").read_text() + run("losetup", "--list").stdout


@pytest.mark.slow
def test_a_load_shows_every_operation_and_what_the_sidecar_needs_and_leaves_nothing(place: Path) -> None:
    report = load.measure(place, SMALL_LOAD, 1)
    assert len(report.rows) == 8
    assert sum(bool(re.fullmatch(r"≤ 50: (?:reached|missed)", row[-1])) for row in report.rows) == 2
    operations, state = report.more
    assert {row[0] for row in operations.rows} == {
        *("touch", "list", "delete", "copy, shared", "copy, written", "copy, between the two")
    }
    assert all(int(row[1]) > 0 for row in operations.rows)
    assert len(re.findall("reached|missed", " ".join(state.rows[-1]))) == 3
    assert list(place.iterdir()) == []
    assert str(place) not in Path("/proc/self/mounts").read_text() + run("losetup", "--list").stdout


@pytest.mark.slow
def test_requests_to_a_server_are_counted_and_timed_and_nothing_is_left(place: Path) -> None:
    report = vsphere.measure(place, ServerSizes(images=20, large=SMALL_LOAD.small, times=1), 1)
    counted = {row[0]: int(row[1]) for row in report.rows}
    assert counted["imagectl ls"] == 0
    assert (
        counted["first listing, 20 images with 3 files each"] == counted["first listing, 20 images with 30 files each"]
    )
    assert {"imagectl cp", "imagectl import", "imagectl touch", "cp -r through a mount"} < set(counted)
    assert all(number > 0 for what, number in counted.items() if what != "imagectl ls")
    assert len(re.findall("reached|missed", str(report.more[0].rows))) == 2
    assert list(place.iterdir()) == []


def test_a_load_fails_for_an_error_that_no_client_may_get() -> None:
    outcome = Outcome()
    outcome.add({"touch": [0.1]}, {"copy": {"TOO_MANY_CALLS": 3}})
    outcome.require_no_error_but("TOO_MANY_CALLS")
    outcome.add({}, {"touch": {"INTERNAL": 1}})
    with pytest.raises(AssertionError, match="INTERNAL"):
        outcome.require_no_error_but("TOO_MANY_CALLS")


def test_percentiles_are_of_the_values() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert percentile([7.0], 0.5) == 7.0


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (at_most(0.5, BINDFS), "≤ 0.5: reached"),
        (at_most(0.4, BINDFS), "≤ 0.4: missed"),
        (at_least(0.5, BINDFS), "≥ 0.5: reached"),
        (at_least(0.6, BINDFS), "≥ 0.6: missed"),
        (at_most(1.0), "≤ 1: reached"),
        (at_most(0.9), "≤ 0.9: missed"),
    ],
)
def test_a_target_that_is_missed_is_not_called_reached(target: Target, verdict: str) -> None:
    result = Result("a measure", {BINDFS: [2.0, 2.0, 9.0], OURS: [1.0, 0.5, 1.0]}, seconds, [target])
    peer, ours = result.rows()
    assert (ours[5], peer[5]) == (verdict, "")
    assert (ours[2], peer[2]) == ("1.000 s", "2.000 s")
