"""Copies of whole images, by imagectl and by cp -r through the mount, against cp on the same file system."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tests.bench import command
from tests.bench.command import GIB, PRIORITY
from tests.bench.copies import COPIED, DURABLE, Copies
from tests.bench.disks import DENSE, SPARSE, Disk
from tests.bench.machine import describe_machine
from tests.bench.report import Report
from tests.bench.rounds import Contender, take_turns
from tests.bench.stage import stage

FILE_SYSTEM_BYTES = 6 * GIB
NEEDED_BYTES = 7 * GIB

RAW, CLIENT, IMAGECTL, MOUNTED = "raw", "client", "imagectl", "mount"
OURS = (CLIENT, IMAGECTL, MOUNTED)
NAMES = {
    CLIENT: "CopyImage, from a client that is connected",
    IMAGECTL: "imagectl cp",
    MOUNTED: "cp -r through the mount",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A disk on a file system: how raw cp is called there, and what is to be reached against it."""

    kind: str
    disk: Disk
    flags: tuple[str, ...]
    # Compared with: cp to its exit, or to the end of a following sync -f.
    peer: str
    target: str
    reached: Callable[[float, float], bool]
    # Shown for (ours, peer).
    shown: Callable[[float, float], str]


def _by_seconds(ours: float, peer: float) -> str:
    return f"{ours - peer:+.2f} s"


def _by_throughput(ours: float, peer: float) -> str:
    return f"{peer / ours:.2f} of the throughput"


def _by_time(ours: float, peer: float) -> str:
    return f"{ours / peer:.2f} of the time"


CASES = (
    *(
        Case("xfs", disk, ("--reflink=always",), COPIED, "≤ +0.3 s", lambda a, b: a <= b + 0.3, _by_seconds)
        for disk in (DENSE, SPARSE)
    ),
    Case("ext4", DENSE, (), DURABLE, "≥ 0.9", lambda a, b: b / a >= 0.9, _by_throughput),
    Case("ext4", SPARSE, ("--sparse=auto",), DURABLE, "≤ 1.0", lambda a, b: a <= b, _by_time),
)


def rows_of(case: Case, times: Mapping[str, Mapping[str, Sequence[float]]]) -> list[list[str]]:
    """The rows of one case; `times` are seconds by contender and by what was done then."""
    cp = " ".join(("cp -r", *case.flags))
    peer = statistics.median(times[RAW][case.peer])
    rows = []

    def add(how: str, seconds: Sequence[float], against: str = "", verdict: str = "") -> None:
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        rows.append([case.kind, case.disk.title, how, f"{statistics.median(seconds):.3f}", spread, against, verdict])

    for what, how in ((COPIED, cp), (DURABLE, f"{cp}, then sync -f")):
        add(how, times[RAW][what], "the peer" if what == case.peer else "")
    for way in (way for way in OURS if way in times):
        seconds = times[way][DURABLE]
        ours = statistics.median(seconds)
        verdict = f"{case.target}: {'reached' if case.reached(ours, peer) else 'missed'}"
        add(NAMES[way], seconds, case.shown(ours, peer), verdict)
    return rows


def main(arguments: list[str]) -> int:
    options = command.parser("copy", __doc__, needed_bytes=NEEDED_BYTES)
    options.add_argument("--only", choices=["xfs", "ext4"], help="this file system")
    options.add_argument("--without", choices=OURS, action="append", default=[], help="leave this way out")
    parsed = command.parse(options, arguments, needed_bytes=NEEDED_BYTES)
    command.raise_priority()
    machine = describe_machine(parsed.directory)
    rows: list[list[str]] = []
    late: list[str] = []
    for kind in ("xfs", "ext4"):
        if parsed.only not in (None, kind):
            continue
        with ExitStack() as stack:
            on = stack.enter_context(stage(kind, parsed.directory, FILE_SYSTEM_BYTES))
            on.start()
            mount = stack.enter_context(on.mounted()) if MOUNTED not in parsed.without else None
            for case in (case for case in CASES if case.kind == kind):
                on.make_image(case.disk)
                copies = Copies(on, case.disk)
                contenders: dict[str, Contender] = {RAW: copies.raw(*case.flags)}
                if CLIENT not in parsed.without:
                    contenders[CLIENT] = copies.by_client()
                if IMAGECTL not in parsed.without:
                    contenders[IMAGECTL] = copies.by_imagectl()
                if mount is not None:
                    contenders[MOUNTED] = copies.through(mount.path)
                rows += rows_of(case, take_turns(f"{kind}, {case.disk.title}", contenders, parsed.runs))
                if copies.published_late:
                    late.append(
                        f"{kind}, {case.disk.title}: {copies.published_late:.1f} s of the mount's time come after "
                        "cp's exit."
                    )
    report = Report(
        "copy",
        "Copies of whole images",
        ["file system", "disk", "how", "median s", "range s", "against the peer", "target"],
        rows,
        [
            f"Medians of {parsed.runs} runs, the contenders in turn, after a round that does not count, in which "
            "qemu-img compared each copy with its source.",
            f"Everything runs at nice {PRIORITY}. Before each run: the last copy removed, sync -f, the source read "
            "into the page cache.",
            "Each file system is of its own, 6 GiB on a loop device with direct I/O, every block written before.",
            "Ours end when the image is published, which is after its fsync; through the mount that is cp's exit "
            "where the image is there by then, else the moment that it is.",
            *late,
        ],
        machine,
    )
    command.give(report, parsed)
    return 0
