"""Disks from strangers that are to become images: refused with a line, by imagectl and by the sidecar itself."""

import gzip
import os
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar import errors
from tests.hostile.support import GIGABYTE, MOST_SECONDS, SHADOW, Outside, bounded
from tests.images.test_vmdk import descriptor, sparse_file, with_footer
from tests.support.places import MIB, Place, flat_descriptor, write_flat_disk
from tests.support.processes import BIN
from tests.support.world import World

# imagectl alone takes 60 MiB, and the stacks of its threads as much as they may once need.
MOST_OF_IMAGECTL = 400 * MIB


def refused(world: World, tmp_path: Path, *words: str | Path) -> str:
    """What imagectl says of an import that it refuses, within bounds of its own and of the sidecar's."""
    command = [
        "prlimit",
        f"--data={MOST_OF_IMAGECTL}",
        str(BIN / "imagectl"),
        "--sidecar",
        world.sidecar.address,
        "import",
        *map(str, words),
        "one/a",
    ]
    said, began = tmp_path / "said", time.monotonic()
    with bounded(world.sidecar.pid, seconds=2 * MOST_SECONDS), said.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                assert time.monotonic() - began < MOST_SECONDS
                time.sleep(0.02)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    message = said.read_text()
    assert process.returncode in (1, 2), message
    assert message.startswith("imagectl: ")
    assert message.count("\n") == 1
    assert world.places["one"].contents() == set()
    return message


# Where a disk leads


@pytest.mark.parametrize("name", ["/etc/shadow", "../outside/secret", "../../../../../../etc/shadow", "..", "a/../b"])
def test_an_import_reads_no_file_that_a_descriptor_names_elsewhere(
    world: World, outside: Outside, tmp_path: Path, name: str
) -> None:
    for packed in (False, True):
        text = flat_descriptor(name, 2 * MIB).encode()
        path = tmp_path / ("disk.vmdk.gz" if packed else "disk.vmdk")
        path.write_bytes(gzip.compress(text) if packed else text)
        assert "no slash" in refused(world, tmp_path, path) or name == ".."


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("target", [SHADOW, "secret"])
def test_an_import_follows_no_link_in_the_place_of_an_extent(
    world: World, outside: Outside, tmp_path: Path, target: Path | str, packed: bool
) -> None:
    """As an archive that somebody unpacked may have it. The size fits: it would be published."""
    directory = tmp_path / "unpacked"
    directory.mkdir()
    target = outside.secret if target == "secret" else SHADOW
    size = target.stat().st_size
    text = flat_descriptor("disk-flat.vmdk", size).replace("monolithicFlat", "custom")
    (directory / "disk.vmdk").write_text(text)
    (directory / f"disk-flat.vmdk{'.gz' if packed else ''}").symlink_to(target)
    assert "link" in refused(world, tmp_path, directory / "disk.vmdk")


def test_links_to_a_disk_that_is_all_in_one_directory_are_followed(world: World, tmp_path: Path) -> None:
    write_flat_disk(tmp_path / "store", "disk")
    (tmp_path / "links").mkdir()
    for name in ("disk.vmdk", "disk-flat.vmdk"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "store" / name)
    for number, path in enumerate(
        (tmp_path / "links" / "disk.vmdk", tmp_path / "links" / ".." / "store" / "disk.vmdk")
    ):
        command = [BIN / "imagectl", "--sidecar", world.sidecar.address, "import", path, f"one/a{number}"]
        subprocess.run([str(word) for word in command], check=True, capture_output=True, timeout=30)


@pytest.mark.parametrize("kind", ["fifo", "zero", "directory", "socket"])
@pytest.mark.parametrize("name", ["disk.vmdk", "disk-flat.vmdk", "disk-flat.vmdk.gz", "metadata"])
def test_an_import_waits_for_no_pipe_and_reads_no_device(world: World, tmp_path: Path, name: str, kind: str) -> None:
    write_flat_disk(tmp_path / "d", "disk")
    (tmp_path / "d" / "metadata").write_text("{}")
    if name.endswith(".gz"):
        (tmp_path / "d" / "disk-flat.vmdk").unlink()
    path = tmp_path / "d" / name
    path.unlink(missing_ok=True)
    match kind:
        case "fifo":
            if name == "metadata":
                return  # named by the user, as `--metadata <(program)` is
            os.mkfifo(path)
        case "zero":
            os.mknod(path, 0o20666, os.makedev(1, 5))
        case "directory":
            path.mkdir()
        case _:
            os.mknod(path, 0o140666)
    more: list[str | Path] = ["--metadata", tmp_path / "d" / "metadata"] if name == "metadata" else []
    refused(world, tmp_path, tmp_path / "d" / "disk.vmdk", *more)


# How much a disk claims


def in_file(content: bytes, size: int = 0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(content)
            file.truncate(max(size, len(content)))

    return write


def looping(*, directory: tuple[int, ...] = (4,), table: tuple[int, ...] = (128,), offset: int = 3) -> bytes:
    """A stream whose directory names the directory itself, or whose grains are its tables, again and again."""
    text = descriptor('RW 4194304 SPARSE "disk.vmdk"', create_type="streamOptimized")
    fields = {"compression": 1, "flags": 0x30001, "directory_offset": offset}
    return with_footer(sparse_file(capacity=4194304, text=text, directory=directory, table=table, **fields))


def many_grains(compression: int) -> bytes:
    """All grains of a disk of 64 GiB, in tables that each name the same one: what a reader expands to all of it."""
    capacity, tables = 2**27, 2**27 // (128 * 512)
    kind = "streamOptimized" if compression else "monolithicSparse"
    text = descriptor(f'RW {capacity} SPARSE "disk.vmdk"', create_type=kind)
    first = 3 + tables * 4 // 512  # the directory's sectors, then 4 for each table
    grain = -(-(first + tables * 4) // 128) * 128
    head = sparse_file(
        capacity=capacity, text=text, compression=compression, flags=0x30001 if compression else 1, overhead=grain
    )[: 3 * 512]
    body = struct.pack(f"<{tables}I", *(first + 4 * number for number in range(tables)))
    body += struct.pack("<512I", *[grain] * 512) * tables
    end = struct.pack("<QI", 0, 500) + bytes(500) if compression else bytes(128 * 512)
    return (head + body).ljust(grain * 512, b"\0") + end


BOMBS: dict[str, tuple[Callable[[Path], None], str]] = {
    "descriptor of a gigabyte": (in_file(flat_descriptor("disk-flat.vmdk", MIB).encode(), GIGABYTE), "at most 1048576"),
    "sparse of 2^63 sectors": (in_file(sparse_file(capacity=2**63, text=descriptor())), "capacity"),
    "sparse of 2^64-1 sectors": (in_file(sparse_file(capacity=2**64 - 1, text=descriptor())), "capacity"),
    "descriptor of 2^63 sectors": (
        in_file(descriptor('RW 9223372036854775808 FLAT "disk-flat.vmdk" 0')),
        "the most a disk can have",
    ),
    "embedded descriptor of 2^62 sectors": (in_file(sparse_file(descriptor_size=2**62)), "for the descriptor"),
    "directory of 2^40 entries": (in_file(sparse_file(capacity=2**37, grain=8, table_entries=1)), "grain directory of"),
    "directory outside": (in_file(sparse_file(directory_offset=2**40)), "grain directory"),
    "the same table twice": (
        in_file(sparse_file(directory=(4, 4), capacity=128 * 1024, text=descriptor(
            'RW 131072 SPARSE "disk.vmdk"', create_type="monolithicSparse"))),
        "twice",
    ),
    "the same grain everywhere": (in_file(many_grains(0)), "more than"),
    "the same compressed grain everywhere": (in_file(many_grains(1)), "more than"),
    "a stream whose footer has a footer": (in_file(looping(offset=2**64 - 1)), "footer"),
    "a stream whose directory is its header": (in_file(looping(offset=0)), "grain directory"),
    "a stream whose tables are the directory": (in_file(looping(directory=tuple([3] * 64))), "twice"),
    "a stream whose grain has no end": (
        in_file(looping(table=(128,) * 512)[: 128 * 512] + struct.pack("<QI", 0, 2**32 - 1) * 200),
        "disk.vmdk",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_disk_that_claims_what_it_has_not_is_refused_by_imagectl(world: World, tmp_path: Path, bomb: str) -> None:
    write, told = BOMBS[bomb]
    write(tmp_path / "disk.vmdk")
    message = refused(world, tmp_path, tmp_path / "disk.vmdk")
    assert (told if bomb != "descriptor of a gigabyte" else "is not a VMDK") in message


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_disk_that_claims_what_it_has_not_is_refused_by_the_sidecar(world: World, bomb: str) -> None:
    place: Place = world.places["one"]
    write, told = BOMBS[bomb]
    with world.client.create_staging("one/a") as staging:
        write(place.root / staging.directory / "disk.vmdk")
        with bounded(world.sidecar.pid), pytest.raises(errors.InvalidDisk, match=told):
            staging.commit()
    place.assert_holds({})
    # And as an image that somebody put there.
    place.directory("a").mkdir()
    write(place.descriptor("a"))
    place.file("a", "image_timestamp.txt").touch()
    with bounded(world.sidecar.pid):
        world.client.image("one/a")
        for call in (world.client.validate, lambda ref: world.client.copy(ref, "one/b").wait()):
            with pytest.raises(errors.ImageIncomplete):
                call("one/a")


@pytest.mark.parametrize("filling", [b"\0", b"#", b"\n", b"KDMV\1\0\0\0"])
def test_a_gzip_bomb_in_the_place_of_a_descriptor_is_not_decompressed(
    world: World, tmp_path: Path, filling: bytes
) -> None:
    member = gzip.compress(filling * (16 * MIB // len(filling)), 1)
    (tmp_path / "disk.vmdk.gz").write_bytes(member * 256)  # 4 GiB
    refused(world, tmp_path, tmp_path / "disk.vmdk.gz")


def test_a_gzip_bomb_in_the_place_of_an_extent_ends_where_the_extent_would(world: World, tmp_path: Path) -> None:
    (tmp_path / "disk.vmdk").write_text(flat_descriptor("disk-flat.vmdk", 8 * MIB))
    member = gzip.compress(b"\xff" * (16 * MIB), 1)
    (tmp_path / "disk-flat.vmdk.gz").write_bytes(member * 256)
    assert "decompresses to more than the 8388608" in refused(world, tmp_path, tmp_path / "disk.vmdk")


def test_metadata_of_a_gigabyte_is_not_read_by_an_import(world: World, tmp_path: Path) -> None:
    write_flat_disk(tmp_path, "disk")
    in_file(b"{", GIGABYTE)(tmp_path / "meta")
    assert "larger than" in refused(world, tmp_path, tmp_path / "disk.vmdk", "--metadata", tmp_path / "meta")
