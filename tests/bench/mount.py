"""The mount, against bindfs and against the datastore's own directory: listing, reading, copying, importing, living."""

from collections.abc import Callable, Iterable
from pathlib import Path

from tests.bench import browsing, command, copying, importing, living, reading
from tests.bench.command import GIB, PRIORITY
from tests.bench.machine import describe_machine
from tests.bench.report import Report
from tests.bench.results import COLUMNS, Result
from tests.bench.sizes import Sizes

NEEDED_BYTES = 7 * GIB

PARTS: dict[str, tuple[Callable[[Path, Sizes, int], list[Result]], str]] = {
    "browsing": (browsing.measure, browsing.NOTE),
    "reading": (reading.measure, reading.NOTE),
    "copying": (copying.measure, copying.NOTE),
    "importing": (importing.measure, importing.NOTE),
    "living": (living.measure, living.note()),
}


def main(arguments: list[str]) -> int:
    options = command.parser("mount", __doc__ or "", needed_bytes=NEEDED_BYTES)
    options.add_argument("--only", choices=PARTS, action="append", help="this part; may be given again")
    parsed = command.parse(options, arguments, needed_bytes=NEEDED_BYTES)
    command.raise_priority()
    report = measure(parsed.directory, Sizes(), parsed.runs, parsed.only or PARTS)
    command.give(report, parsed)
    return 0


def measure(parent: Path, sizes: Sizes, runs: int, parts: Iterable[str]) -> Report:
    """Each part on a new file system below `parent`."""
    machine = describe_machine(parent)
    notes = [
        f"Medians of {runs} runs, the contenders in turn, after a round that does not count; against the peers: ours "
        "divided by theirs. The file systems are XFS, of their own, on a loop device with direct I/O, every block "
        f"written before. Everything runs at nice {PRIORITY}; bindfs runs with no options.",
    ]
    rows: list[list[str]] = []
    for part in parts:
        run_part, note = PARTS[part]
        for result in run_part(parent, sizes, runs):
            rows += result.rows()
        notes.append(note)
    return Report("mount", "The mount", COLUMNS, rows, notes, machine)
