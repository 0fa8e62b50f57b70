"""What a copy takes: nothing where extents can be shared, no hole anywhere."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.crash.support import image_directory, write_image
from tests.support.disks import MIB, allocated
from tests.support.processes import Sidecar, loop_mount, run


def free(root: Path) -> int:
    os.sync()
    status = os.statvfs(root)
    return status.f_bfree * status.f_frsize


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("compound", "vsan"))
def test_a_copy_on_a_reflinking_file_system_takes_no_space(tmp_path: Path, stack: ExitStack, layout: str) -> None:
    size = 1024 * MIB
    root = stack.enter_context(loop_mount(tmp_path / "xfs", 1400 * MIB, ("mkfs.xfs", "-q", "-m", "reflink=1")))
    source = write_image(root, layout, "source", size=size, dense=True)
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    assert client.datastore("one").reflink
    before = free(root)
    assert before < size, "a copy of the bytes would not fit"
    answers = list(client.copy("one/source", "one/target"))
    assert before - free(root) < MIB
    assert answers[-1].cloned_bytes >= size
    target = image_directory(root, layout, "target") / "target-flat.vmdk"
    extents = [line for line in run("filefrag", "-v", target).stdout.splitlines() if line.strip()[:1].isdigit()]
    assert extents and all("shared" in line for line in extents)
    assert run("cmp", source, target).returncode == 0


@pytest.mark.parametrize("mkfs", (("mkfs.ext4", "-q"), ("mkfs.xfs", "-q", "-m", "reflink=0")))
def test_a_copy_keeps_holes_where_nothing_can_be_shared(
    tmp_path: Path, stack: ExitStack, mkfs: tuple[str, ...]
) -> None:
    root = stack.enter_context(loop_mount(tmp_path / "fs", 320 * MIB, mkfs))
    source = write_image(root, "compound", "source", size=512 * MIB)
    with source.open("r+b") as file:
        for offset in (0, 200 * MIB, 511 * MIB):
            file.seek(offset)
            file.write(os.urandom(MIB))
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root}"))
    client = stack.enter_context(sidecar.client())
    assert not client.datastore("one").reflink
    client.copy("one/source", "one/target").wait()
    target = image_directory(root, "compound", "target") / "target-flat.vmdk"
    os.sync()
    assert target.stat().st_size == 512 * MIB
    assert 3 * MIB <= allocated(target) < 4 * MIB
    assert run("cmp", source, target).returncode == 0
