"""What the daemon takes: memory with very many images, and processor time when nobody asks it anything."""

import os
import time
from pathlib import Path

from tests.bench.command import progress
from tests.bench.planted import plant
from tests.bench.results import Result, at_most, jiffies, mebibytes
from tests.bench.sizes import Sizes
from tests.bench.stage import OURS, stage
from tests.support.processes import run

RESIDENT, PEAK = "VmRSS", "VmHWM"
NOTE = (
    "Memory and idling: one daemon, looked at once. find looks up every file, so that libfuse knows a node of each. "
    "The idle time follows it; a jiffy, 1/{} s, is the least that ps and top know."
)


def note() -> str:
    return NOTE.format(os.sysconf("SC_CLK_TCK"))


def measure(parent: Path, sizes: Sizes, runs: int) -> list[Result]:
    """`runs` does not matter: what is looked at is one daemon's."""
    limit = [at_most(250)]
    many = f"{sizes.many_images:,} images"
    with stage("xfs", parent, sizes.file_system(images=sizes.many_images)) as on:
        plant(on.root, sizes.many_images)
        progress(f"memory: {many} made")
        on.start(sizes.many_images)
        progress(f"memory: {many} known to the sidecar")
        with on.mounted() as mount:
            assert mount.process is not None
            pid = mount.process.pid
            results = []
            for when, command in (("mounted", None), ("after ls -l", ["ls", "-l"]), ("after find", ["find"])):
                if command is not None:
                    run(*command, mount.path / on.kind, timeout=300)
                values = {OURS: [memory(pid, RESIDENT)]}
                results.append(Result(f"resident memory, {many}, {when}", values, mebibytes, limit))
                progress(f"memory: {when}")
            results.append(Result(f"its peak, {many}", {OURS: [memory(pid, PEAK)]}, mebibytes, limit))
            before = _jiffies(pid)
            time.sleep(sizes.idle_seconds)
            values = {OURS: [_jiffies(pid) - before]}
    results.append(Result(f"processor time, idle for {sizes.idle_seconds:g} s", values, jiffies, [at_most(1)]))
    return results


def memory(pid: int, field: str) -> float:
    """MiB of that field of the process's status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise AssertionError(f"the kernel tells no {field} of process {pid}")


def _jiffies(pid: int) -> float:
    """Of processor time of all threads, counted in ns."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    nanoseconds = sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)
    return nanoseconds * os.sysconf("SC_CLK_TCK") / 1e9
