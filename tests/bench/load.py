"""Load: touches beside running copies, and 64 clients at once that copy, touch and list."""

from pathlib import Path

from tests.bench import command, mixing, touching
from tests.bench.command import GIB, PRIORITY
from tests.bench.hall import hall
from tests.bench.machine import describe_machine
from tests.bench.report import Report, Section
from tests.bench.sizes import LoadSizes

NEEDED_BYTES = 8 * GIB


def main(arguments: list[str]) -> int:
    options = command.parser("load", __doc__ or "", needed_bytes=NEEDED_BYTES)
    options.add_argument("--seconds", type=float, default=60.0, help="of the 64 clients")
    parsed = command.parse(options, arguments, needed_bytes=NEEDED_BYTES)
    command.raise_priority()
    report = measure(parsed.directory, LoadSizes(seconds=parsed.seconds), parsed.runs)
    command.give(report, parsed)
    return 0


def measure(parent: Path, sizes: LoadSizes, runs: int) -> Report:
    """On new file systems below `parent`. AssertionError when a client got an error that it may not get."""
    machine = describe_machine(parent)
    with hall(parent, sizes) as where:
        mixed = mixing.mix(where, sizes)
        rows, running = touching.measure(where, sizes, runs)
        where.assert_tidy()
    return Report(
        "load",
        "Load",
        touching.COLUMNS,
        rows,
        [
            f"One client touches, one of {sizes.images} images after the other, for {sizes.touch_seconds:g} s a run; "
            f"{runs} runs, the contenders in turn, after a round that does not count. p50 and p99 are the medians of "
            f"the runs', max is that of all. {'; '.join(running)}.",
            f"The copies are of {sizes.large.title}, on ext4, by {sizes.copies} clients that copy and free; cp is cp "
            "-r, then sync of each file, then rm -r, in as many loops. A touch is a lock, a look at the image, utime "
            "and fsync, which waits for the disk that the copies write to: both file systems are on loop devices with "
            "direct I/O on one disk.",
            f"The {sizes.clients} clients are in {sizes.processes} processes, each with a connection of its own and "
            f"without pauses: of ten operations six are touches, three list the {sizes.images} images and more of a "
            f"datastore, one is a copy of {sizes.small.title}, which is freed afterwards. {mixing.ALLOWED} is what the "
            "limits answer when all 16 places for copies of a kind are taken; any other error fails the benchmark, "
            "and so does anything that is left on a datastore.",
            "Before the load, a warm-up, whose clients leave: all of them copy for "
            f"{mixing.WARM_UP * sizes.seconds:g} s, then do for as long what they do in the load. Pools keep their "
            "threads; what was answered is remembered by request id, 10,000 answers at most.",
            f"Everything runs at nice {PRIORITY}; the sidecar logs at its default level.",
        ],
        machine,
        [
            Section(f"{sizes.clients} clients for {sizes.seconds:g} s", mixing.COLUMNS, mixed.rows()),
            Section("What the sidecar needs for them", mixing.STATE_COLUMNS, mixed.state_rows()),
        ],
    )
