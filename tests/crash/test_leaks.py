"""A sidecar that runs for a year: descriptors and threads are what they were."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.crash.support import LAYOUTS, answers, open_descriptors, threads, write_image
from tests.support.disks import import_image
from tests.support.processes import Sidecar, wait_until

ROUNDS = 20


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_hundred_operations_leave_no_descriptor_and_no_thread(
    tmp_path: Path, stack: ExitStack, layout: str, disk: Path
) -> None:
    root = tmp_path / "one"
    write_image(root, layout, "source", dense=True)
    write_image(root, layout, "wreck").unlink()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())

    def round_trip(number: int) -> None:
        ref = f"one/target-{number % 4}"
        client.copy("one/source", ref).wait()
        assert answers(client.copy("one/source", ref).wait) == "IMAGE_ALREADY_EXISTS"
        assert answers(client.copy("one/wreck", "one/other").wait) == "IMAGE_INCOMPLETE"
        # Cancelled at any point, or too late.
        client.copy("one/source", "one/cancelled").cancel()
        answers(partial(client.delete, "one/cancelled", force=True))
        with client.create_staging("one/other") as staging:
            staging.write_file("x.vmdk", [(0, b"no descriptor")])
            assert answers(staging.commit) == "INVALID_DISK"
        assert answers(partial(import_image, client, ref, disk)) == "IMAGE_ALREADY_EXISTS"
        next(iter(client.read_file(ref, f"target-{number % 4}.vmdk")))
        client.image(ref)
        client.delete(ref)
        assert answers(partial(client.touch, ref)) == "IMAGE_TOMBSTONED"
        client.restore(ref)
        client.delete(ref, force=True)

    # Pools grow to their size at first: what is counted is what comes after.
    for number in range(ROUNDS):
        round_trip(number)
    before = open_descriptors(sidecar.pid), threads(sidecar.pid)
    for number in range(ROUNDS):
        round_trip(number)
    wait_until(
        lambda: open_descriptors(sidecar.pid) <= before[0] + 2 and threads(sidecar.pid) <= before[1] + 2,
        f"descriptors and threads are about {before}",
    )
