"""cp -r of a disk from outside: into a mount, into bindfs, and into the file system itself."""

import shutil
import subprocess
import time
from itertools import count
from pathlib import Path

from sidecar.client import ImageState
from tests.bench.copies import COPIED, DURABLE, timed_copy
from tests.bench.disks import read_data
from tests.bench.results import Result, at_least, shown_against, throughput
from tests.bench.rounds import Contender, take_turns
from tests.bench.sizes import Sizes
from tests.bench.stage import BINDFS, OURS, RAW, Stage, stage
from tests.support.disks import assert_same_disk

PUBLISHED = "published"
SYNCED = ", then sync -f"
NOTE = (
    "Import: from another file system, the disk in its page cache. Ours: cp -r, then sync of the new directory, which "
    "ends when the image is published and durable; the others to cp's exit, when nothing is durable yet, and to the "
    "end of a following sync -f."
)


def measure(parent: Path, sizes: Sizes, runs: int) -> list[Result]:
    disk = sizes.dense
    with stage("xfs", parent, sizes.file_system(data=disk.size + disk.size // 2)) as on:
        on.start()
        source = on.directory / disk.name
        source.mkdir()
        disk.make(source)
        contenders = {how: _raw(on, source, how) for how in (RAW, BINDFS)}
        contenders[OURS] = _ours(on, source)
        times = take_turns(f"importing, {disk.title}", contenders, runs)
    rates = {
        how: {what: [disk.size / value for value in values] for what, values in measured.items()}
        for how, measured in times.items()
    }
    values = {
        RAW: rates[RAW][COPIED],
        RAW + SYNCED: rates[RAW][DURABLE],
        BINDFS: rates[BINDFS][COPIED],
        BINDFS + SYNCED: rates[BINDFS][DURABLE],
        OURS: rates[OURS][PUBLISHED],
    }
    targets = [at_least(4, BINDFS), shown_against(RAW), shown_against(RAW + SYNCED)]
    return [Result(f"import with cp -r, {disk.title}", values, throughput, targets)]


def _raw(on: Stage, source: Path, how: str) -> Contender:
    def contender(first: bool) -> dict[str, float]:
        on.settle()
        read_data(source)
        with on.shown(how) as directory:
            target = directory.parent / "raw-copy"
            times = timed_copy(source, target)
            shutil.rmtree(target)
        return times

    return contender


def _ours(on: Stage, source: Path) -> Contender:
    numbers = count()

    def contender(first: bool) -> dict[str, float]:
        name = f"import-{next(numbers)}"
        on.settle()
        read_data(source)
        with on.shown(OURS) as datastore:
            start = time.perf_counter()
            subprocess.run(["cp", "-r", source, datastore / name], check=True)
            subprocess.run(["sync", datastore / name], check=True)
            seconds = time.perf_counter() - start
        if on.client.image(on.ref(name)).state != ImageState.IMAGE_STATE_VALID:
            raise AssertionError(f"{name} is not published after sync")
        if first:
            assert_same_disk(source / f"{source.name}.vmdk", on.image_directory(name) / f"{name}.vmdk")
        on.client.delete(on.ref(name), force=True)
        return {PUBLISHED: seconds}

    return contender
