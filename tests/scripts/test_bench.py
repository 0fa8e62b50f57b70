"""scripts/bench mount on sizes of a test: that every part measures what it says, and that nothing is left of it."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.bench.command import MIB
from tests.bench.disks import Disk
from tests.bench.mount import PARTS, measure
from tests.bench.results import Result, Target, at_least, at_most, seconds
from tests.bench.sizes import Sizes
from tests.bench.stage import BINDFS, OURS, RAW
from tests.support.processes import run

SMALL = Sizes(
    images=20,
    many_images=40,
    dense=Disk("dense", "8 MiB dense", 8 * MIB, MIB, 8),
    sparse=Disk("sparse", "64 MiB, 4 MiB of data", 64 * MIB, MIB, 4),
    idle_seconds=0.1,
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
