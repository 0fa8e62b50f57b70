"""cp -r of an image in the mount, against cp -r of the same directory on the file system itself."""

from contextlib import ExitStack
from pathlib import Path

from tests.bench.copies import COPIED, DURABLE, Copies
from tests.bench.results import Result, at_most, seconds, shown_against
from tests.bench.rounds import take_turns
from tests.bench.sizes import Sizes
from tests.bench.stage import OURS, RAW, stage

BYTES = f"{RAW}, --reflink=never"
NOTE = (
    "Copy: ours until the image is published and durable, the others to cp's exit. Plain cp -r shares extents with the "
    "source on XFS, --reflink=never writes the bytes."
)


def measure(parent: Path, sizes: Sizes, runs: int) -> list[Result]:
    disk = sizes.sparse
    with ExitStack() as stack:
        data = disk.piece * disk.pieces
        on = stack.enter_context(stage("xfs", parent, sizes.file_system(data=3 * data)))
        on.start()
        mount = stack.enter_context(on.mounted())
        on.make_image(disk)
        copies = Copies(on, disk)
        contenders = {
            RAW: copies.raw(),
            BYTES: copies.raw("--reflink=never"),
            OURS: copies.through(mount.path),
        }
        times = take_turns(f"copying, {disk.title}", contenders, runs)
    values = {RAW: times[RAW][COPIED], BYTES: times[BYTES][COPIED], OURS: times[OURS][DURABLE]}
    return [Result(f"cp -r, {disk.title}", values, seconds, [at_most(1, RAW), shown_against(BYTES)])]
