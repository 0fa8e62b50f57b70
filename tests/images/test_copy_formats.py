"""Every kind of VMDK is an image: the disk is what the descriptor names, on every layout and between them."""

import itertools
import os
from pathlib import Path

import pytest

from protos.images.v1.types_pb2 import IMAGE_STATE_VALID
from sidecar import errors
from tests.support.disks import allocated, assert_same_disk, pseudo_random
from tests.support.places import KIB, LAYOUTS, MIB, TIMESTAMP, Place
from tests.support.processes import run
from tests.support.world import World

GIB = 1 << 30
# Of each kind: the size of a disk, and the files of an image of it; the split ones with three extents.
FORMATS = {
    "monolithicFlat": (16 * MIB, ["-flat.vmdk"]),
    "monolithicSparse": (16 * MIB, []),
    "streamOptimized": (16 * MIB, []),
    "twoGbMaxExtentFlat": (5 * GIB, ["-f001.vmdk", "-f002.vmdk", "-f003.vmdk"]),
    "twoGbMaxExtentSparse": (5 * GIB, ["-s001.vmdk", "-s002.vmdk", "-s003.vmdk"]),
}
# Each layout once as source and once as destination, and one within each.
PAIRS = [("one", "two"), ("two", "three"), ("three", "one"), ("one", "one"), ("two", "two"), ("three", "three")]


@pytest.fixture(scope="module")
def raw_disks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Raw disks with data at both ends, in the middle, and where an extent ends, by size."""
    directory = tmp_path_factory.mktemp("raw")
    disks = {}
    for size in {size for size, _ in FORMATS.values()}:
        disks[size] = directory / f"{size}.raw"
        with disks[size].open("wb") as file:
            file.truncate(size)
            for offset in (0, size // 2, min(2047 * MIB, size // 4) - 64 * KIB, size - 128 * KIB):
                file.seek(offset)
                file.write(pseudo_random(128 * KIB, offset + 1))
    return disks


def plant_disk(place: Place, image_id: str, raw: Path, subformat: str) -> Path:
    place.directory(image_id).mkdir(parents=True)
    descriptor = place.descriptor(image_id)
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, descriptor)
    place.file(image_id, TIMESTAMP).touch()
    return descriptor


@pytest.mark.parametrize(("source", "destination"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
@pytest.mark.parametrize("subformat", FORMATS)
def test_a_disk_of_every_kind_is_copied(
    world: World, raw_disks: dict[int, Path], subformat: str, source: str, destination: str
) -> None:
    size, extents = FORMATS[subformat]
    here, there = world.places[source], world.places[destination]
    original = plant_disk(here, "a", raw_disks[size], subformat)
    assert {path.name for path in here.directory("a").iterdir()} == {
        "a.vmdk",
        TIMESTAMP,
        *(f"a{end}" for end in extents),
    }
    # A longer name, which has to fit into an embedded descriptor too, and begins with the old one.
    copy = "a-" + "copy" * 10
    image = world.client.copy(f"{source}/a", f"{destination}/{copy}").wait()
    assert image.state == IMAGE_STATE_VALID
    assert image.disk_type == subformat
    assert image.capacity_bytes == size
    assert {path.name for path in there.directory(copy).iterdir()} == {
        f"{copy}.vmdk",
        TIMESTAMP,
        *(f"{copy}{end}" for end in extents),
    }
    assert allocated(there.directory(copy)) <= allocated(here.directory("a")) + 256 * KIB
    assert_same_disk(original, there.descriptor(copy))
    check = run("qemu-img", "check", there.descriptor(copy), check=False)
    # A flat disk has nothing that could be checked, which qemu-img says with a status of its own.
    assert check.returncode == 0 or "does not support checks" in check.stderr
    world.client.validate(f"{destination}/{copy}")
    # It stands alone: the source may go.
    world.client.delete(f"{source}/a", force=True)
    run("qemu-img", "compare", "-f", "raw", raw_disks[size], there.descriptor(copy))


@pytest.mark.parametrize("subformat", FORMATS)
def test_a_copy_of_a_copy_of_a_copy_is_the_disk(world: World, raw_disks: dict[int, Path], subformat: str) -> None:
    size, _ = FORMATS[subformat]
    plant_disk(world.places["one"], "a", raw_disks[size], subformat)
    chain = ["one/a", "two/bb", "three/a", "one/c", "one/d.e"]
    for source, destination in itertools.pairwise(chain):
        world.client.copy(source, destination).wait()
    run("qemu-img", "compare", "-f", "raw", raw_disks[size], world.places["one"].descriptor("d.e"))


@pytest.mark.parametrize("subformat", FORMATS)
def test_a_disk_under_a_foreign_name_is_imported_under_the_images(
    world: World, place: Place, raw_disks: dict[int, Path], scratch: Path, subformat: str
) -> None:
    size, extents = FORMATS[subformat]
    disk = scratch / "My Disk.vmdk"
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw_disks[size], disk)
    with world.client.create_staging(f"{place.name}/a") as staging:
        for path in scratch.iterdir():
            staging.write_file(path.name, data_of(path), size=path.stat().st_size)
        answer = staging.commit()
    assert dict(answer.renamed_files) == {
        "My Disk.vmdk": "a.vmdk",
        **{f"My Disk{end}": f"a{end}" for end in extents},
    }
    place.assert_holds({"a": {"a.vmdk", TIMESTAMP, *(f"a{end}" for end in extents)}})
    assert allocated(place.directory("a")) <= allocated(scratch) + 256 * KIB
    run("qemu-img", "compare", "-f", "raw", raw_disks[size], place.descriptor("a"))


def data_of(path: Path) -> list[tuple[int, bytes]]:
    """The data of a sparse file, by offset."""
    parts = []
    with path.open("rb") as file:
        position, end = 0, path.stat().st_size
        while position < end:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            parts.append((start, os.pread(file.fileno(), position - start, start)))
    return parts


def test_a_descriptor_in_which_qemu_left_the_end_of_an_older_one_is_read_copied_and_imported(
    world: World, place: Place, scratch: Path
) -> None:
    # The harm: 1 of about 250 disks made by qemu-img was refused. It writes a shorter CID in place, behind whose text
    # the last bytes of the longer one stay.
    original = place.plant("a")
    left = original.read_bytes()[:-3] + b"\0" + b'"\n' + bytes(512)
    original.write_bytes(left)
    assert world.client.validate(f"{place.name}/a").image.capacity_bytes == 2 * MIB
    world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    assert_same_disk(original, place.descriptor("b"))
    assert place.descriptor("b").read_bytes().rstrip(b"\0") == left.partition(b"\0")[0].replace(
        b"a-flat.vmdk", b"b-flat.vmdk"
    )
    with world.client.create_staging(f"{place.name}/c") as staging:
        staging.write_file("a.vmdk", [(0, left)])
        staging.write_file("a-flat.vmdk", data_of(place.file("a", "a-flat.vmdk")), size=2 * MIB)
        staging.commit()
    assert_same_disk(original, place.descriptor("c"))


def test_a_text_that_goes_on_behind_a_nul_is_no_descriptor(world: World, place: Place) -> None:
    original = place.plant("a")
    original.write_bytes(original.read_bytes() + b"\0" + b'RW 8 FLAT "/etc/shadow" 0\n')
    with pytest.raises(errors.ImageIncomplete, match="not a VMDK descriptor"):
        world.client.validate(f"{place.name}/a")


def test_the_layouts_of_this_suite_are_all_there_are(world: World) -> None:
    assert {store.name: store.layout for store in world.client.datastores()} == LAYOUTS
