"""Reading an extent in order and at random, through mounts, from a datastore that is in the page cache."""

import json
import subprocess
import time
from pathlib import Path

from tests.bench.disks import read_data
from tests.bench.results import Result, at_least, operations, throughput
from tests.bench.rounds import Contender, by_measure, take_turns
from tests.bench.sizes import Sizes
from tests.bench.stage import BINDFS, OURS, RAW, Stage, stage
from tests.support.processes import run

COLD, WARM, RANDOM = "cold", "warm", "random"
NOTE = (
    "Reads: dd with 1 MiB at a time, the extent in the page cache of the datastore; cold: in a new mount; again: in "
    "the same mount; then there fio --rw=randread --bs=4k --ioengine=psync --invalidate=0 over the whole extent."
)


def measure(parent: Path, sizes: Sizes, runs: int) -> list[Result]:
    with stage("xfs", parent, sizes.file_system(data=sizes.dense.size)) as on:
        on.start()
        on.make_image(sizes.dense)
        contenders = {how: _contender(on, how, sizes) for how in (RAW, BINDFS, OURS)}
        values = take_turns(f"reading, {sizes.dense.title}", contenders, runs)
    title = f"sequential read, {sizes.dense.title}"
    return [
        Result(f"{title}, cold", by_measure(values, COLD), throughput, [at_least(1.3, BINDFS)]),
        Result(f"{title}, again", by_measure(values, WARM), throughput, [at_least(0.6, RAW)]),
        Result("random 4 KiB reads, warm", by_measure(values, RANDOM), operations, [at_least(0.8, RAW)]),
    ]


def _contender(on: Stage, how: str, sizes: Sizes) -> Contender:
    directory = on.image_directory(sizes.dense.name)

    def contender(first: bool) -> dict[str, float]:
        on.settle()
        read_data(directory)
        with on.shown(how) as datastore:
            image = datastore / (sizes.dense.name if how == OURS else directory.name)
            extent = image / f"{sizes.dense.name}-flat.vmdk"
            return {
                COLD: _read(extent, sizes.dense.size),
                WARM: _read(extent, sizes.dense.size),
                RANDOM: _read_randomly(extent, sizes.random_seconds),
            }

    return contender


def _read(extent: Path, size: int) -> float:
    """Bytes in a second."""
    start = time.perf_counter()
    subprocess.run(["dd", f"if={extent}", "of=/dev/null", "bs=1M", "status=none"], check=True)
    return size / (time.perf_counter() - start)


def _read_randomly(extent: Path, duration: int) -> float:
    """Reads in a second."""
    result = run(
        "fio", "--name=random", f"--filename={extent}", "--readonly", "--rw=randread", "--bs=4k", "--ioengine=psync",
        "--invalidate=0", "--time_based", f"--runtime={duration}", "--output-format=json",
    )  # fmt: skip
    return float(json.loads(result.stdout)["jobs"][0]["read"]["iops"])
