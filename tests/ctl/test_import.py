"""imagectl import: what is taken, what is refused and how that is told, and that holes stay holes."""

import gzip
import json
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.client import Hole
from sidecar.ctl.disk_source import open_disk
from tests.ctl.conftest import Imagectl
from tests.support.disks import allocated, assert_same_disk, make_disk, pseudo_random
from tests.support.processes import Sidecar, loop_mount, run

MIB = 1 << 20
SUBFORMATS = ("monolithicFlat", "monolithicSparse", "streamOptimized", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse")
Exported = Callable[[str], Path]


def compress(path: Path) -> Path:
    target = path.with_name(f"{path.name}.gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_every_kind_of_vmdk_becomes_an_image(
    subformat: str, imagectl: Imagectl, tmp_path: Path, exported: Exported
) -> None:
    source = make_disk(tmp_path / "source", subformat=subformat, size=64 * MIB)
    output = imagectl("import", source, "two/new-name")
    assert output.startswith(f"{source} imported as two/new-name: 64.0 MiB disk")
    image = imagectl.json("show", "two/new-name")
    assert (image["state"], image["problems"], image["disk_type"]) == ("VALID", [], subformat)
    # Holes stayed holes.
    assert image["allocated_bytes"] <= allocated(source.parent) + 64 * 1024
    assert image["allocated_bytes"] < 4 * MIB
    copy = exported("two/new-name")
    assert_same_disk(source, copy)
    assert allocated(copy.parent) < 4 * MIB


def test_a_disk_of_several_extents_becomes_an_image(imagectl: Imagectl, tmp_path: Path, exported: Exported) -> None:
    source = make_disk(
        tmp_path / "source",
        subformat="twoGbMaxExtentSparse",
        size=5 << 30,
        data=((0, MIB), (3 << 30, MIB), ((5 << 30) - MIB, MIB)),
    )
    assert len(list(source.parent.iterdir())) == 4
    imagectl("import", source, "one/a")
    assert_same_disk(source, exported("one/a"))


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized"])
def test_a_gzipped_single_file_is_taken(subformat: str, imagectl: Imagectl, tmp_path: Path, exported: Exported) -> None:
    source = make_disk(tmp_path / "source", subformat=subformat, size=64 * MIB)
    packed = compress(Path(shutil.copy(source, tmp_path / "other.vmdk")))
    imagectl("import", packed, "one/a")
    assert_same_disk(source, exported("one/a"))
    assert [file["name"] for file in imagectl.json("show", "one/a")["files"]] == ["a.vmdk"]


@pytest.mark.parametrize("which", ["extent", "both", "descriptor"])
def test_gzipped_files_of_a_disk_are_taken_with_their_zeroes_as_holes(
    which: str, imagectl: Imagectl, tmp_path: Path, exported: Exported
) -> None:
    source = make_disk(tmp_path / "source", size=64 * MIB)
    packed = tmp_path / "packed"
    shutil.copytree(source.parent, packed)
    file = packed / "disk.vmdk"
    if which != "descriptor":
        compress(packed / "disk-flat.vmdk")
    if which != "extent":
        file = compress(file)
    imagectl("import", file, "one/a")
    assert_same_disk(source, exported("one/a"))
    assert imagectl.json("show", "one/a")["allocated_bytes"] < 4 * MIB


def test_the_ending_of_the_file_is_not_what_makes_a_vmdk(
    imagectl: Imagectl, tmp_path: Path, exported: Exported
) -> None:
    source = make_disk(tmp_path / "source", subformat="streamOptimized")
    odd = shutil.copy(source, tmp_path / "download")
    shouted = shutil.copy(source, tmp_path / "DISK.VMDK")
    for name, path in (("a", odd), ("b", shouted)):
        imagectl("import", path, f"one/{name}")
        assert_same_disk(source, exported(f"one/{name}"))


def test_metadata_and_manifest_come_along(imagectl: Imagectl, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "meta").write_text('{"version": 7}')
    (tmp_path / "man").write_text('{"imageType": "CLOUD", "imageReplication": "EAGER"}')
    # An id that begins as the disk is called.
    imagectl("import", disk, "one/disk.x", "--metadata", tmp_path / "meta", "--manifest", tmp_path / "man")
    image = imagectl.json("show", "one/disk.x")
    assert image["metadata"] == {"version": 7}
    assert image["manifest"]["imageType"] == "CLOUD"
    assert {file["name"] for file in image["files"]} == {
        "disk.x.vmdk",
        "disk.x-flat.vmdk",
        "disk.x.ecv",
        "disk.x.manifest",
    }


@pytest.mark.parametrize("content", ["{", "", "\xff\xfe", '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}'])
def test_metadata_that_is_not_json_is_refused_before_anything_is_sent(
    content: str, imagectl: Imagectl, disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "meta").write_bytes(content.encode("latin-1"))
    assert "not JSON" in imagectl.error("import", disk, "one/a", "--metadata", tmp_path / "meta", code=2)
    assert imagectl.json("ls") == []


# --- what is not a disk that can be an image ---


@pytest.mark.parametrize(("kind", "told"), [("qcow2", "qcow2"), ("vdi", "VDI"), ("vhdx", "VHDX"), ("raw", "raw")])
def test_another_kind_of_disk_is_refused_with_the_command_that_converts_it(
    kind: str, told: str, imagectl: Imagectl, tmp_path: Path
) -> None:
    path = tmp_path / f"disk.{kind}"
    run("qemu-img", "create", "-q", "-f", kind, path, "4M")
    message = imagectl.error("import", path, "one/a", code=1)
    assert told in message
    assert f"qemu-img convert -O vmdk {path} {tmp_path}/disk.vmdk" in message
    assert told in imagectl.error("import", compress(path), "one/a", code=1)


def test_an_archive_is_refused_with_what_it_is(imagectl: Imagectl, disk: Path, tmp_path: Path) -> None:
    archive = tmp_path / "appliance.ova"
    run("tar", "-cf", archive, "-C", disk.parent, ".")
    assert "unpack it first" in imagectl.error("import", archive, "one/a", code=1)


def test_text_that_is_no_descriptor_is_refused(imagectl: Imagectl, tmp_path: Path) -> None:
    path = tmp_path / "notes.vmdk"
    path.write_text("buy milk\n")
    assert "notes.vmdk" in imagectl.error("import", path, "one/a", code=1)
    # By the name that it has, not by the one that the disk would have.
    other = path.rename(tmp_path / "good.toml")
    message = imagectl.error("import", other, "one/a", code=1)
    assert message.startswith(f"{other}: ")
    assert "good.toml.vmdk" not in message
    path.write_bytes(b"")
    assert "empty" in imagectl.error("import", path, "one/a", code=1)


def test_a_part_of_a_disk_is_refused_with_the_file_to_name(imagectl: Imagectl, disk: Path, tmp_path: Path) -> None:
    assert f"import its descriptor, {disk}" in imagectl.error(
        "import", disk.with_name("disk-flat.vmdk"), "one/a", code=1
    )
    split = make_disk(tmp_path / "split", subformat="twoGbMaxExtentSparse")
    assert "descriptor" in imagectl.error("import", split.with_name("disk-s001.vmdk"), "one/a", code=1)
    assert "is a directory" in imagectl.error("import", disk.parent, "one/a", code=1)


def test_every_missing_extent_is_named(imagectl: Imagectl, tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source", subformat="twoGbMaxExtentSparse", size=5 << 30, data=((0, MIB),))
    (source.parent / "disk-s001.vmdk").unlink()
    (source.parent / "disk-s003.vmdk").unlink()
    message = imagectl.error("import", source, "one/a", code=1)
    assert "disk-s001.vmdk" in message
    assert "disk-s003.vmdk" in message
    assert "disk-s002.vmdk" not in message


def test_an_extent_of_the_wrong_size_is_refused(imagectl: Imagectl, disk: Path) -> None:
    with disk.with_name("disk-flat.vmdk").open("r+b") as file:
        file.truncate(MIB)
    message = imagectl.error("import", disk, "one/a", code=1)
    assert f"{disk.with_name('disk-flat.vmdk')} has {MIB} bytes, and {8 * MIB} by its descriptor, {disk}: " in message
    assert "copy it again" in message


def test_the_data_without_its_descriptor_is_told_what_is_missing(imagectl: Imagectl, disk: Path) -> None:
    disk.unlink()
    extent = disk.with_name("disk-flat.vmdk")
    message = imagectl.error("import", extent, "one/a", code=1)
    assert f"its descriptor, {disk}, is missing" in message
    command = message.partition("if there is none, convert it with ")[2].split()
    run(*command)
    imagectl("import", command[-1], "one/a")


def test_a_descriptor_cannot_reach_other_directories(imagectl: Imagectl, disk: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(8 * MIB))
    text = disk.read_text(errors="replace").rstrip("\0")
    for name in ("../secret", str(secret)):
        disk.write_text(text.replace("disk-flat.vmdk", name))
        imagectl.error("import", disk, "one/a", code=1)
    assert imagectl.json("ls") == []


def test_an_overlay_is_refused(imagectl: Imagectl, tmp_path: Path) -> None:
    base = make_disk(tmp_path / "source", subformat="monolithicSparse")
    overlay = tmp_path / "source" / "overlay.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", overlay)
    assert "parent" in imagectl.error("import", overlay, "one/a", code=1)


def test_an_unreadable_file_is_told(imagectl: Imagectl, disk: Path) -> None:
    extent = disk.with_name("disk-flat.vmdk")
    extent.unlink()
    extent.symlink_to(extent)
    assert "disk-flat.vmdk" in imagectl.error("import", disk, "one/a", code=1)


# --- damage, bombs, full datastores ---


def nothing_is_left(tmp_path: Path, imagectl: Imagectl) -> None:
    assert imagectl.json("ls", "--all") == []
    assert not list(tmp_path.glob("one/tmp_image_*"))


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_damaged_archive_leaves_no_image(harm: str, imagectl: Imagectl, tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source", size=16 * MIB, data=((0, 12 * MIB),))
    packed = compress(source.with_name("disk-flat.vmdk"))
    content = bytearray(packed.read_bytes())
    if harm == "cut":
        del content[len(content) // 2 :]
    else:
        content[-6] ^= 1  # of the checksum: all of the data was sent when it is read
    packed.write_bytes(content)
    assert f"{packed} is damaged" in imagectl.error("import", source, "one/a", code=1)
    nothing_is_left(tmp_path, imagectl)


@pytest.mark.parametrize("difference", [-512, 512])
def test_an_archive_of_another_size_than_the_descriptor_says_leaves_no_image(
    difference: int, imagectl: Imagectl, tmp_path: Path, disk: Path
) -> None:
    extent = disk.with_name("disk-flat.vmdk")
    with extent.open("r+b") as file:
        file.truncate(8 * MIB + difference)
    compress(extent)
    assert str(8 * MIB) in imagectl.error("import", disk, "one/a", code=1)
    nothing_is_left(tmp_path, imagectl)


def test_a_gzip_bomb_is_bounded_in_size_and_memory(tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source", size=256 * MIB, data=())
    packed = source.with_name("disk-flat.vmdk.gz")
    source.with_name("disk-flat.vmdk").unlink()
    packed.write_bytes(gzip.compress(bytes(64 * MIB)) * 1000)
    extent, _ = open_disk(str(source)).files
    tracemalloc.start()
    try:
        with pytest.raises(errors.InvalidDisk, match="decompresses to more than"):
            for part in extent.parts(lambda read: None):
                assert isinstance(part, Hole)
                assert part.offset + part.length <= 256 * MIB
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


def test_decompressed_data_and_holes_are_the_file(tmp_path: Path) -> None:
    """Zeroes at every kind of place: shorter than a block, across chunks, at the end, and between data."""
    lengths = [(1, 70_000), (0, 3 * MIB), (1, 5), (0, 65_535), (1, MIB), (0, 65_536 * 3 + 1), (1, 1), (0, 2 * MIB - 9)]
    content = b"".join(pseudo_random(length, 7) if data else bytes(length) for data, length in lengths)
    content += bytes(-len(content) % 512)
    source = make_disk(tmp_path / "source", size=len(content))
    extent_path = source.with_name("disk-flat.vmdk")
    extent_path.write_bytes(content)
    compress(extent_path)
    extent, _ = open_disk(str(source)).files
    rebuilt, end, read = bytearray(len(content)), 0, 0

    def advance(count: int) -> None:
        nonlocal read
        read += count

    holes = 0
    for part in extent.parts(advance):
        offset, length = (part.offset, part.length) if isinstance(part, Hole) else (part[0], len(part[1]))
        assert offset == end
        end += length
        if isinstance(part, Hole):
            holes += length
            assert content[offset:end] == bytes(length)
        else:
            rebuilt[offset:end] = part[1]
    assert (bytes(rebuilt), end, extent.size) == (content, len(content), len(content))
    assert read == extent.source_bytes
    assert holes > 4 * MIB


@pytest.mark.parametrize("size", [0, 4 * MIB + 5, 8 * MIB, 9 * MIB])
def test_a_file_that_changes_meanwhile_is_not_taken_for_whole(size: int, disk: Path) -> None:
    extent, _ = open_disk(str(disk)).files
    parts = extent.parts(lambda read: None)
    next(parts)
    with disk.with_name("disk-flat.vmdk").open("r+b") as file:
        file.write(b"12345")
        file.truncate(size)
    with pytest.raises(errors.DiskFileFault, match="changed while it was read"):
        list(parts)


@pytest.mark.parametrize("packed", [False, True])
def test_a_full_datastore_refuses_and_is_left_as_it_was(packed: bool, tmp_path: Path, stack: ExitStack) -> None:
    root = stack.enter_context(loop_mount(tmp_path / "fs", 48 * MIB, ("mkfs.ext4", "-q")))
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"full={root},reserve=1MiB"))
    imagectl = Imagectl(sidecar.address)
    source = make_disk(tmp_path / "source", size=96 * MIB)
    extent = source.with_name("disk-flat.vmdk")
    extent.write_bytes(b"not zero" * (12 * MIB))
    if packed:
        # Small enough to be let in, and too large when it is unpacked.
        compress(extent)
    message = imagectl.error("import", source, "full/a", code=7)
    assert "full" in message
    assert imagectl.json("ls", "--all") == []
    assert not list(root.glob("*image_*"))


def test_an_existing_image_is_told_before_anything_is_sent(imagectl: Imagectl, disk: Path) -> None:
    imagectl("import", disk, "one/a")
    assert "one/a" in imagectl.error("import", disk, "one/a", code=4)


def test_what_was_imported_is_told_to_programs(imagectl: Imagectl, disk: Path) -> None:
    document = json.loads(imagectl("-o", "json", "import", disk, "one/a"))
    assert (document["image"], document["state"]) == ("one/a", "VALID")
