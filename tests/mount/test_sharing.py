"""On a reflinking file system a copy through the mount takes no space, by whatever way the tool copies."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.crash.support import image_directory, write_image
from tests.support.disks import MIB
from tests.support.processes import Mount, Sidecar, loop_mount, run, wait_until


@pytest.fixture
def xfs(tmp_path: Path, stack: ExitStack) -> Path:
    """A datastore with the image `a`: a sparse disk of 512 MiB, with 64 MiB of data in it."""
    root = stack.enter_context(loop_mount(tmp_path / "xfs", 400 * MIB, ("mkfs.xfs", "-q", "-m", "reflink=1")))
    with write_image(root, "compound", "a", size=512 * MIB).open("r+b") as file:
        for offset in range(0, 512 * MIB, 64 * MIB):
            file.seek(offset + 4096)
            file.write(os.urandom(8 * MIB))
    os.sync()
    return root


@pytest.fixture
def mount(xfs: Path, tmp_path: Path, stack: ExitStack) -> Mount:
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={xfs}"))
    return stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))


def extents(path: Path) -> list[str]:
    return [line for line in run("filefrag", "-v", path).stdout.splitlines() if line.strip()[:1].isdigit()]


def free(root: Path) -> int:
    os.sync()
    status = os.statvfs(root)
    return status.f_bfree * status.f_frsize


def gnu_cp(source: Path, target: Path) -> None:
    run("cp", "-r", source, target)


def copytree(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def in_odd_pieces(source: Path, target: Path) -> None:
    """Data that no block begins or ends with, and buffers that no page does: the kernel splits them anywhere."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        with file.open("rb", buffering=0) as original, (target / file.name).open("wb", buffering=0) as copied:
            size = file.stat().st_size
            offset = 0
            while offset < size:
                try:
                    start = os.lseek(original.fileno(), offset, os.SEEK_DATA)
                except OSError:  # only a hole up to the end
                    break
                offset = os.lseek(original.fileno(), start, os.SEEK_HOLE)
                while start < offset:
                    start += os.pwrite(
                        copied.fileno(), os.pread(original.fileno(), min(777_777, offset - start), start), start
                    )
            copied.truncate(size)


@pytest.mark.parametrize("copy", (gnu_cp, copytree, in_odd_pieces))
def test_a_copy_by_any_tool_shares_its_extents(xfs: Path, mount: Mount, copy: Callable[[Path, Path], object]) -> None:
    before = free(xfs)
    copy(mount.path / "one" / "a", mount.path / "one" / "b")
    original, copied = image_directory(xfs, "compound", "a"), image_directory(xfs, "compound", "b")
    wait_until((copied / "b.vmdk").exists, "the copy is published")
    assert run("cmp", original / "a-flat.vmdk", copied / "b-flat.vmdk").returncode == 0
    shared = [line for line in extents(copied / "b-flat.vmdk") if "shared" in line]
    assert len(shared) >= len(extents(original / "a-flat.vmdk"))
    if copy is not copytree:  # which writes the holes out, as zeroes
        assert before - free(xfs) < 2 * MIB, extents(copied / "b-flat.vmdk")
        assert len(extents(copied / "b-flat.vmdk")) == len(extents(original / "a-flat.vmdk"))


def test_one_byte_changed_on_the_way_arrives_as_that_byte(xfs: Path, mount: Mount) -> None:
    source, target = mount.path / "one" / "a", mount.path / "one" / "b"
    target.mkdir()
    place = 8 * MIB - 5
    with (source / "a-flat.vmdk").open("rb") as original, (target / "a-flat.vmdk").open("wb", buffering=0) as copied:
        while block := original.read(1 * MIB):
            at = copied.tell()
            if at <= place < at + len(block):
                changed = bytearray(block)
                changed[place - at] ^= 1
                block = bytes(changed)
            copied.write(block)
    run("cp", source / "a.vmdk", target)
    copied_path = image_directory(xfs, "compound", "b") / "b-flat.vmdk"
    wait_until(copied_path.exists, "the import is published")
    difference = run("cmp", "-l", image_directory(xfs, "compound", "a") / "a-flat.vmdk", copied_path, check=False)
    assert [line.split()[0] for line in difference.stdout.splitlines()] == [str(place + 1)]


def test_a_file_that_ends_where_its_source_goes_on_does_not_grow(xfs: Path, mount: Mount, stack: ExitStack) -> None:
    """Its last block is the source's as far as it goes: shared, the file would be longer than its writer made it."""
    short, size = mount.path / "one" / "b" / "a-flat.vmdk", 4096 + 1000
    short.parent.mkdir()
    with (mount.path / "one" / "a" / "a-flat.vmdk").open("rb") as source:
        with short.open("wb", buffering=0) as file:
            file.write(os.pread(source.fileno(), size, 0))
        wait_until(lambda: "not published yet image=one/b" in mount.log.read_text(), "it was looked at")
        with short.open("r+b", buffering=0) as file:
            file.write(os.pread(source.fileno(), size, 0))
        assert short.stat().st_size == size
