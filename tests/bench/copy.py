"""Copies of whole images, by imagectl and by cp -r through the mount, against cp on the same file system."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from sidecar.client import ImageState, SidecarClient, errors
from tests.bench.filesystems import file_system
from tests.bench.machine import describe_machine
from tests.bench.report import Report
from tests.support.disks import allocated, assert_same_disk
from tests.support.processes import BIN, Mount, Sidecar, run, wait_until

MIB, GIB = 1024**2, 1024**3
FILE_SYSTEM_BYTES = 6 * GIB
NEEDED_BYTES = 7 * GIB
PRIORITY = -15

RAW, DURABLE, CLIENT, IMAGECTL, MOUNTED = "raw", "durable", "client", "imagectl", "mount"
OURS = (CLIENT, IMAGECTL, MOUNTED)
NAMES = {
    CLIENT: "CopyImage, from a client that is connected",
    IMAGECTL: "imagectl cp",
    MOUNTED: "cp -r through the mount",
}


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of `size` bytes, with `pieces` of `piece` bytes of data, spread evenly."""

    name: str
    title: str
    size: int
    piece: int
    pieces: int


DISKS = (
    Disk("dense", "2 GiB dense", 2 * GIB, 8 * MIB, 256),
    Disk("sparse", "20 GiB, 256 MiB of data", 20 * GIB, 1 * MIB, 256),
)


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
        Case("xfs", disk, ("--reflink=always",), RAW, "≤ +0.3 s", lambda a, b: a <= b + 0.3, _by_seconds)
        for disk in DISKS
    ),
    Case("ext4", DISKS[0], (), DURABLE, "≥ 0.9", lambda a, b: b / a >= 0.9, _by_throughput),
    Case("ext4", DISKS[1], ("--sparse=auto",), DURABLE, "≤ 1.0", lambda a, b: a <= b, _by_time),
)


@dataclass(slots=True)
class World:
    """A sidecar with a datastore on each file system, and a mount, each a process of its own."""

    stack: ExitStack
    directory: Path
    mount: Path = field(init=False)
    address: str = field(init=False)
    client: SidecarClient = field(init=False)
    # A new name for every copy: the kernel may remember for a moment what the mount showed under one that was purged.
    copies: int = 0
    # Seconds from cp's exit until the image was there, where it was not at once.
    published_late: list[float] = field(default_factory=list)

    def start(self, kind: str, *, mounted: bool) -> None:
        root = self.root(kind)
        root.mkdir()
        sidecar = self.stack.enter_context(Sidecar(self.directory / "run", f"{kind}={root}"))
        self.address = sidecar.address
        self.client = self.stack.enter_context(sidecar.client())
        self.mount = self.directory / "mnt"
        if mounted:
            self.stack.enter_context(Mount(self.mount, sidecar.address))

    @property
    def copy(self) -> str:
        return f"copy-{self.copies}"

    def root(self, kind: str) -> Path:
        return self.directory / kind / "images"

    def make_image(self, kind: str, disk: Disk) -> None:
        ref = f"{kind}/{disk.name}"
        with self.client.create_staging(ref) as staging:
            directory = self.root(kind) / staging.directory
            options = ("-f", "vmdk", "-o", "subformat=monolithicFlat")
            run("qemu-img", "create", "-q", *options, directory / f"{disk.name}.vmdk", str(disk.size))
            with (directory / f"{disk.name}-flat.vmdk").open("r+b", buffering=0) as file:
                for number in range(disk.pieces):
                    file.seek(number * (disk.size // disk.pieces))
                    file.write(os.urandom(disk.piece))
            staging.commit()
        if self.mount.is_mount():
            wait_until((self.mount / ref / f"{disk.name}.vmdk").exists, f"the mount shows {ref}")

    def image_directory(self, ref: str) -> Path:
        return self.root(ref.partition("/")[0]) / self.client.image(ref).directory

    # ---- One run of each contender: seconds by what was done then.

    def copy_raw(self, case: Case) -> dict[str, float]:
        source = self.image_directory(f"{case.kind}/{case.disk.name}")
        target = self.directory / case.kind / "raw-copy"
        start = time.perf_counter()
        subprocess.run(["cp", "-r", *case.flags, source, target], check=True)
        copied = time.perf_counter()
        subprocess.run(["sync", "-f", target], check=True)
        durable = time.perf_counter()
        shutil.rmtree(target)
        return {RAW: copied - start, DURABLE: durable - start}

    def copy_by_client(self, case: Case) -> dict[str, float]:
        start = time.perf_counter()
        self.client.copy(f"{case.kind}/{case.disk.name}", f"{case.kind}/{self.copy}").wait()
        return {CLIENT: time.perf_counter() - start}

    def copy_by_imagectl(self, case: Case) -> dict[str, float]:
        command = [str(BIN / "imagectl"), "--sidecar", self.address, "cp"]
        start = time.perf_counter()
        subprocess.run(
            [*command, f"{case.kind}/{case.disk.name}", f"{case.kind}/{self.copy}"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return {IMAGECTL: time.perf_counter() - start}

    def copy_by_mount(self, case: Case) -> dict[str, float]:
        start = time.perf_counter()
        subprocess.run(
            ["cp", "-r", self.mount / case.kind / case.disk.name, self.mount / case.kind / self.copy], check=True
        )
        copied = time.perf_counter()
        if not self.is_there(f"{case.kind}/{self.copy}"):
            wait_until(lambda: self.is_there(f"{case.kind}/{self.copy}"), "the copy is published", 60)
            self.published_late.append(time.perf_counter() - copied)
            copied = time.perf_counter()
        return {MOUNTED: copied - start}

    def is_there(self, ref: str) -> bool:
        try:
            return self.client.image(ref).state == ImageState.IMAGE_STATE_VALID
        except errors.ImageNotFound:
            return False

    # ----

    def settle(self, case: Case) -> None:
        """The same state before every run: nothing left to write, the source in the page cache."""
        self.copies += 1
        subprocess.run(["sync", "-f", self.root(case.kind)], check=True)
        for path in self.image_directory(f"{case.kind}/{case.disk.name}").iterdir():
            with path.open("rb", buffering=0) as file:
                _read_data(file.fileno())

    def check_copy(self, case: Case) -> None:
        """What was measured is a copy: the guest sees the same bytes, and holes are holes."""
        source = self.image_directory(f"{case.kind}/{case.disk.name}")
        copy = self.image_directory(f"{case.kind}/{self.copy}")
        assert_same_disk(source / f"{case.disk.name}.vmdk", copy / f"{self.copy}.vmdk")
        if allocated(copy) > allocated(source) * 1.02 + MIB:
            raise AssertionError(f"the copy of {source} takes {allocated(copy)} bytes instead of {allocated(source)}")


def _read_data(fd: int) -> None:
    buffer = bytearray(8 * MIB)
    position, size = 0, os.fstat(fd).st_size
    while position < size:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # a hole up to the end
            return
        end = os.lseek(fd, position, os.SEEK_HOLE)
        while position < end:
            position += os.preadv(fd, [memoryview(buffer)[: end - position]], position)


def measure(world: World, case: Case, runs: int, ways: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of each run by what was done, the contenders in turn; a first round, not counted, checks the copies."""
    contenders: dict[str, Callable[[Case], dict[str, float]]] = {
        RAW: world.copy_raw,
        CLIENT: world.copy_by_client,
        IMAGECTL: world.copy_by_imagectl,
        MOUNTED: world.copy_by_mount,
    }
    times: dict[str, list[float]] = {}
    for number in range(runs + 1):
        for way, contender in contenders.items():
            if way in OURS and way not in ways:
                continue
            world.settle(case)
            if number == 0:
                world.published_late.clear()
            taken = contender(case)
            if way in OURS:
                if number == 0:
                    world.check_copy(case)
                world.client.delete(f"{case.kind}/{world.copy}", force=True)
            if number:
                for what, seconds in taken.items():
                    times.setdefault(what, []).append(seconds)
        _progress(f"{case.kind}, {case.disk.title}: {'warm-up' if number == 0 else f'run {number} of {runs}'}")
    return times


def rows_of(case: Case, times: dict[str, list[float]]) -> list[list[str]]:
    command = " ".join(("cp -r", *case.flags))
    names = {RAW: command, DURABLE: f"{command}, then sync -f", **NAMES}
    peer = statistics.median(times[case.peer])
    rows = []
    for what, seconds in times.items():
        ours = statistics.median(seconds)
        against = verdict = ""
        if what in OURS:
            against = case.shown(ours, peer)
            verdict = f"{case.target}: {'reached' if case.reached(ours, peer) else 'missed'}"
        elif what == case.peer:
            against = "the peer"
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        rows.append([case.kind, case.disk.title, names[what], f"{ours:.3f}", spread, against, verdict])
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench copy", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each contender, after one that does not count")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on the disk to measure; 7 GiB free")
    parser.add_argument("--only", choices=["xfs", "ext4"], help="this file system")
    parser.add_argument("--without", choices=OURS, action="append", default=[], help="leave this way out")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, with the machine")
    parser.add_argument("--write", action="store_true", help="put it into docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if shutil.disk_usage(options.directory).free < NEEDED_BYTES:
        parser.error(f"{options.directory} has less than 7 GiB free: name another with --directory")
    # Inherited by everything that is started here, ours and the peers: other work on the machine disturbs them less.
    os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    ways = [way for way in OURS if way not in options.without]
    machine = describe_machine(options.directory)
    rows: list[list[str]] = []
    late: list[str] = []
    for kind in ("xfs", "ext4"):
        if options.only not in (None, kind):
            continue
        with ExitStack() as stack:
            directory = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="images-bench-", dir=options.directory))
            )
            _progress(f"{kind}: making the file system")
            stack.enter_context(file_system(kind, directory, FILE_SYSTEM_BYTES))
            world = World(stack, directory)
            world.start(kind, mounted=MOUNTED in ways)
            for case in (case for case in CASES if case.kind == kind):
                world.make_image(kind, case.disk)
                rows += rows_of(case, measure(world, case, options.runs, ways))
                if world.published_late:
                    seconds = statistics.median(world.published_late)
                    late.append(f"{kind}, {case.disk.title}: {seconds:.1f} s of the mount's time come after cp's exit.")
    report = Report(
        "copy",
        "Copies of whole images",
        ["file system", "disk", "how", "median s", "range s", "against the peer", "target"],
        rows,
        [
            f"Medians of {options.runs} runs, the contenders in turn, after a round that does not count, in which "
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
    report.show()
    if options.markdown:
        sys.stdout.write(report.markdown())
    if options.write:
        report.write()
    return 0


def _progress(what: str) -> None:
    sys.stderr.write(f"{what}\n")
