"""On a reflinking file system a copy through the mount takes no space, by whatever way the tool copies."""

import os
import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.crash.support import image_directory, write_image
from tests.mount.harness import COPIERS, published_as
from tests.support.disks import MIB
from tests.support.processes import Mount, Sidecar, loop_mount, run, wait_until

BLOCK = 4096


@pytest.fixture
def xfs(tmp_path: Path, stack: ExitStack) -> Path:
    """Two images. `a`: a sparse disk of 128 MiB, with 16 MiB of data in it; `dense`: 16 MiB of data."""
    letters = random.Random(1)
    root = stack.enter_context(loop_mount(tmp_path / "xfs", 400 * MIB, ("mkfs.xfs", "-q", "-m", "reflink=1")))
    with write_image(root, "compound", "a", size=128 * MIB).open("r+b") as file:
        for offset in range(0, 128 * MIB, 16 * MIB):
            file.seek(offset + 4096)
            file.write(letters.randbytes(2 * MIB))
    write_image(root, "compound", "dense", size=16 * MIB).write_bytes(letters.randbytes(16 * MIB))
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


@pytest.mark.parametrize("image", ["a", "dense"], ids=["sparse", "dense"])
@pytest.mark.parametrize("tool", [*COPIERS, "mv"])
def test_a_copy_by_any_tool_shares_its_extents_and_has_no_more_of_them(
    tool: str, image: str, xfs: Path, mount: Mount
) -> None:
    """Holes stay holes, too, though some of these write them out as zeroes."""
    before = free(xfs)
    run("sh", "-c", COPIERS.get(tool, 'mv "$0" "$1"'), mount.path / "one" / image, mount.path / "one" / "b")
    assert_shared(xfs, image, before)


def test_a_copy_in_odd_pieces_shares_its_extents(xfs: Path, mount: Mount) -> None:
    before = free(xfs)
    in_odd_pieces(mount.path / "one" / "a", mount.path / "one" / "b")
    assert_shared(xfs, "a", before)


@pytest.mark.parametrize(
    "zeroes",
    [
        pytest.param([(BLOCK - 1, BLOCK)], id="the last byte of a block"),
        pytest.param([(BLOCK - 1, BLOCK + 1)], id="the last byte of a block, and the first of the next"),
        pytest.param([(1000, BLOCK)], id="all of a block but its beginning"),
        pytest.param([(1000, BLOCK), (BLOCK, BLOCK + 3000)], id="to the next block, which begins with zeroes"),
        pytest.param([(1000, 2000), (3000, 4000)], id="within a block"),
        pytest.param([(0, 3000), (BLOCK, BLOCK + 1)], id="the first bytes of blocks"),
        pytest.param([(7 * BLOCK + 3000, 8 * BLOCK)], id="the last bytes of the data, before a hole"),
        pytest.param([(8 * BLOCK + 200, 8 * BLOCK + 512)], id="the last bytes of the file"),
        pytest.param([(7 * BLOCK + 3000, 8 * BLOCK), (8 * BLOCK + 1, 8 * BLOCK + 512)], id="all but the file's last"),
    ],
)
@pytest.mark.parametrize("image", ["holes", "no holes"])
def test_a_copier_that_skips_zeroes_shares_the_blocks_that_they_are_in(
    zeroes: list[tuple[int, int]], image: str, xfs: Path, mount: Mount
) -> None:
    """Which are in the data of nearly every disk: rsync writes neither a zero that a KiB begins with, nor its last."""
    data = bytearray(b"x" * (8 * BLOCK + 512))
    for start, end in zeroes:
        data[start:end] = bytes(end - start)
    original = write_image(xfs, "compound", "zeroes", size=128 * BLOCK + 512)
    with original.open("r+b") as file:
        if image == "no holes":
            file.write(random.Random(1).randbytes(128 * BLOCK))
        for offset in (0, 32 * BLOCK, 64 * BLOCK, 120 * BLOCK):
            file.seek(offset)
            file.write(data)
    before = free(xfs)
    run("sh", "-c", COPIERS["rsync --sparse"], mount.path / "one" / "zeroes", mount.path / "one" / "b")
    assert_shared(xfs, "zeroes", before)


def assert_shared(xfs: Path, image: str, free_before: int) -> None:
    """The image `b` is published, is the other one's copy, and takes none of its space again."""
    original = image_directory(xfs, "compound", image) / f"{image}-flat.vmdk"
    copied = image_directory(xfs, "compound", "b") / "b-flat.vmdk"
    wait_until(copied.with_name("b.vmdk").exists, "the copy is published")
    run("cmp", original, copied)
    assert free_before - free(xfs) < 2 * MIB, extents(copied)
    assert [line for line in extents(copied) if "shared" not in line] == []
    assert len(extents(copied)) <= len(extents(original)), extents(copied)


@pytest.mark.parametrize("tool", COPIERS)
def test_one_byte_changed_on_the_way_arrives_as_that_byte(tool: str, xfs: Path, mount: Mount, tmp_path: Path) -> None:
    """Who writes has the file of an image open that has all but this byte, or another one of that name is open."""
    changed, place = tmp_path / "changed", 16 * MIB + 4096 + MIB - 5
    run("cp", "-r", mount.path / "one" / "a", changed)
    with (changed / "a-flat.vmdk").open("r+b") as file:
        byte = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), place)
    command = COPIERS[tool] if COPIERS[tool].startswith("mkdir") else f"exec {COPIERS[tool]}"
    original = mount.path / "one" / "a" / "a-flat.vmdk"
    run("sh", "-c", f'exec 3<"$2"; {command}', changed, mount.path / "one" / "b", original)
    copied = image_directory(xfs, "compound", "b") / "b-flat.vmdk"
    wait_until(copied.exists, "the import is published")
    difference = run("cmp", "-l", original, copied, check=False)
    assert [line.split()[0] for line in difference.stdout.splitlines()] == [str(place + 1)]
    assert published_as(mount, "one/b") == ""


@pytest.mark.parametrize("tool", ["cp", "busybox cp", "tar"])
def test_where_nothing_can_be_shared_bytes_are_written_once(tool: str, tmp_path: Path, stack: ExitStack) -> None:
    root = stack.enter_context(loop_mount(tmp_path / "plain", 400 * MIB, ("mkfs.xfs", "-q", "-m", "reflink=0")))
    write_image(root, "compound", "a", size=32 * MIB).write_bytes(os.urandom(32 * MIB))
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root}"))
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))
    before = bytes_written(root)
    run("sh", "-c", COPIERS[tool], mount.path / "one" / "a", mount.path / "one" / "b")
    assert published_as(mount, "one/b") == "one/a"
    assert 32 * MIB <= bytes_written(root) - before < 40 * MIB


def bytes_written(root: Path) -> int:
    """What the file system has written to its device."""
    os.sync()
    device = Path(run("findmnt", "-no", "SOURCE", root).stdout.strip()).name
    return int(Path(f"/sys/block/{device}/stat").read_text().split()[6]) * 512


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
