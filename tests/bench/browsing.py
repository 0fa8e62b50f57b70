"""ls -l of a datastore with many images, and find over all their files: each in a mount that nobody looked into."""

import subprocess
import time
from pathlib import Path

from tests.bench.planted import FILES, FILES_SHOWN, PREFIX, plant
from tests.bench.results import Result, at_most, seconds
from tests.bench.rounds import Contender, by_measure, take_turns
from tests.bench.sizes import Sizes
from tests.bench.stage import BINDFS, OURS, RAW, Stage, stage
from tests.support.processes import run

LIST, FIND = "ls -l", "find -type f"
NOTE = (
    "ls and find: before each run, ls -lR of the raw directory, so that its dentries and inodes are in memory for all "
    "contenders; each run of bindfs and of ours is the first in a new mount, of which the kernel knows nothing. find "
    "lists 3 files of each image, 2 in ours, which does not show the timestamp."
)


def measure(parent: Path, sizes: Sizes, runs: int) -> list[Result]:
    with stage("xfs", parent, sizes.file_system(images=sizes.images)) as on:
        plant(on.root, sizes.images)
        on.start(sizes.images)
        contenders = {how: _contender(on, how, sizes.images) for how in (RAW, BINDFS, OURS)}
        values = take_turns(f"browsing {sizes.images} images", contenders, runs)
    return [
        Result(f"{LIST}, {sizes.images:,} images, cold", by_measure(values, LIST), seconds,
               [at_most(0.15, BINDFS), at_most(4, RAW)]),
        Result(f"{FIND}, {sizes.images:,} images, cold", by_measure(values, FIND), seconds, [at_most(0.5, BINDFS)]),
    ]  # fmt: skip


def _contender(on: Stage, how: str, images: int) -> Contender:
    lines = {LIST: images, FIND: images * (FILES_SHOWN if how == OURS else FILES)}

    def contender(first: bool) -> dict[str, float]:
        times = {}
        for what in (LIST, FIND):
            _warm(on.root)
            with on.shown(how) as directory:
                command = {LIST: ["ls", "-l", str(directory)], FIND: ["find", str(directory), "-type", "f"]}[what]
                start = time.perf_counter()
                # A pipe: what writes to /dev/null may know it and do less.
                listed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                times[what] = time.perf_counter() - start
            if (found := sum(PREFIX.encode() in line for line in listed.splitlines())) != lines[what]:
                raise AssertionError(f"{what} of {how} shows {found} instead of {lines[what]}")
        return times

    return contender


def _warm(root: Path) -> None:
    run("ls", "-lR", root)
