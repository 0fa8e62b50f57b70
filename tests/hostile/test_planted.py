"""What somebody planted on a datastore: links, pipes, devices, endless files. Nothing leads out, nothing hangs."""

import os
import stat
import threading
from pathlib import Path

import pytest

from fusefs.provenance import Generation
from fusefs.reading import LocalReader
from sidecar import errors
from tests.hostile.support import GIGABYTE, SHADOW, Outside, bounded, every_call
from tests.support.disks import assert_same_disk
from tests.support.places import MARKER, MIB, TIMESTAMP, TOMBSTONE, Place, flat_descriptor, flat_files
from tests.support.world import World

FIFO, ZERO, NULL = "fifo", "zero", "null"


def put(kind: str | Path, path: Path) -> None:
    """A link to a path, a pipe, a device that never ends, one that has nothing; in the place of what is there."""
    path.unlink(missing_ok=True)
    match kind:
        case Path():
            path.symlink_to(kind)
        case "fifo":
            os.mkfifo(path)
        case "zero":
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
        case "null":
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        case "disk":
            os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 0))


SPECIAL = {"link": None, "link to shadow": SHADOW, "fifo": FIFO, "zero": ZERO, "null": NULL, "disk": "disk"}
# Which calls must refuse when that file of an image is none.
OF_THE_DISK = {"validate", "repair", "touch", "update", "copy", "clone disk"}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["a.vmdk", "a-flat.vmdk", "a.ecv", "a.manifest", TIMESTAMP, MARKER])
def test_a_file_of_an_image_that_is_none_is_neither_read_nor_written_nor_waited_for(
    world: World, place: Place, outside: Outside, name: str, kind: str
) -> None:
    place.plant("a")
    world.wait_listed(f"{place.name}/a")
    put(SPECIAL[kind] or outside.secret, place.file("a", name))
    found = every_call(world, place)
    assert {call for call, reason in found.items() if reason == "ok"}.isdisjoint(OF_THE_DISK)
    assert found["list"] == found["image"] == "ok"
    assert found["delete"] == "ok"
    assert found["purge"] == "ok"
    place.assert_holds({})


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_lock_file_that_is_none_locks_nobody_in_and_nothing_is_written_through_it(
    world: World, place: Place, outside: Outside, kind: str
) -> None:
    place.plant("a")
    put(SPECIAL[kind] or outside.secret, place.lock_file("a"))
    found = every_call(world, place)
    refusing = ("touch", "update", "delete", "purge", "force")
    assert {found[name] for name in refusing} == {"INVALID_REQUEST"}
    place.lock_file("a").unlink()
    place.assert_holds({"a": flat_files("a")})
    put(outside.directory / "new", place.lock_file("a"))
    assert every_call(world, place)["touch"] == "INVALID_REQUEST"
    place.lock_file("a").unlink()


@pytest.mark.parametrize("kind", ["directory", "descriptor", "image"])
def test_an_image_directory_that_leads_elsewhere_is_no_image(
    world: World, place: Place, outside: Outside, kind: str
) -> None:
    target = {"directory": outside.directory, "descriptor": outside.image / "a.vmdk", "image": outside.image}[kind]
    place.directory("a").parent.mkdir(parents=True, exist_ok=True)
    place.directory("a").symlink_to(target)
    found = every_call(world, place)
    assert found.pop("list") == "ok"
    if place.layout != "vsan":
        assert found.pop("stage") == "ok"  # it does not look where the image would be
    assert set(found.values()) <= {"IMAGE_NOT_FOUND", "INVALID_REQUEST"}
    assert world.listed() == {}


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "file"])
@pytest.mark.parametrize(
    ("name", "directory"), [("one", "deleted_images"), ("two", "deleted_images"), ("two", "tmp_images"),
                            ("two", "images/co"), ("two", "images/ta")]
)  # fmt: skip
def test_a_directory_of_the_layout_that_leads_elsewhere_takes_nothing_there(
    world: World, outside: Outside, name: str, directory: str, kind: str
) -> None:
    place = world.places[name]
    place.plant("a1")
    place.plant("tarnish")
    world.wait_listed(f"{name}/a1", f"{name}/tarnish")
    path = place.root / directory
    kept = path.with_name(f"kept-{path.name}")
    if path.exists():
        path.rename(kept)
    if kind == "file":
        path.write_text("")
    else:
        put({"link": outside.directory, "dangling": outside.directory / "new"}.get(kind, FIFO), path)
    try:
        found = every_call(world, place, "a1")
        assert found["touch"] == "ok"
        if directory == "images/ta":
            every_call(world, place, "tarnish")
        if directory == "tmp_images":
            assert found["copy"] == found["stage"] == "INVALID_REQUEST"
        if directory == "images/co":
            assert found["copy"] == "INVALID_REQUEST"
        if directory == "deleted_images":
            assert found["purge"] == found["force"] == "INVALID_REQUEST"
            assert place.file("a1", "a1-flat.vmdk").stat().st_size == 2 * MIB
    finally:
        path.unlink()
        if kept.exists():
            kept.rename(path)


def test_a_root_of_images_that_leads_elsewhere_shows_nothing_of_it(world: World, tmp_path: Path) -> None:
    place = world.places["two"]
    place.plant("a1")
    world.wait_listed("two/a1")
    (tmp_path / "outside" / "a1").mkdir(parents=True)
    (tmp_path / "outside" / "a1" / "a1").symlink_to("../image")
    outside = Outside(tmp_path / "outside")
    images, kept = place.root / "images", place.root / "kept"
    images.rename(kept)
    images.symlink_to(outside.directory)
    try:
        every_call(world, place, "a1")
        every_call(world, place, "se")
    finally:
        images.unlink()
        kept.rename(images)
    outside.assert_untouched()


def test_the_other_name_of_a_hard_linked_extent_outlives_the_image(
    world: World, place: Place, outside: Outside
) -> None:
    place.plant("a")
    for name in ("a-flat.vmdk", "a.vmdk"):
        place.file("a", name).unlink()
        os.link(outside.image / name, place.file("a", name))
    outside.may_be_read(outside.image / "a-flat.vmdk", outside.image / "a.vmdk")
    world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
    assert place.file("b", "b-flat.vmdk").stat().st_nlink == 1
    assert_same_disk(outside.image / "a.vmdk", place.descriptor("b"))
    every_call(world, place)
    place.assert_holds({"b": flat_files("b")})


@pytest.mark.parametrize("name", ["disk.vmdk", "disk-flat.vmdk", "notes.txt", TIMESTAMP])
def test_a_staged_file_with_another_name_outside_is_neither_written_nor_published(
    world: World, place: Place, outside: Outside, name: str
) -> None:
    """Whoever has the other name could change the image; and the sidecar, writing the descriptor, would change that."""
    outside.may_be_read(outside.image / "a.vmdk", outside.image / "a-flat.vmdk")
    place.plant("src")
    with world.client.create_staging(f"{place.name}/a") as staging:
        directory = place.root / staging.directory
        target = outside.image / {"disk.vmdk": "a.vmdk", TIMESTAMP: TIMESTAMP}.get(name, "a-flat.vmdk")
        for staged, size in (("disk.vmdk", 0), ("disk-flat.vmdk", 2 * MIB)):
            staging.write_file(staged, [], size=size)
        staging.write_file("disk.vmdk", [(0, flat_descriptor("disk-flat.vmdk", 2 * MIB).encode())])
        (directory / name).unlink(missing_ok=True)
        os.link(target, directory / name)
        if name != TIMESTAMP:
            with pytest.raises(errors.InvalidRequest, match="another name"):
                staging.write_file(name, [(0, b"overwritten")])
            with pytest.raises(errors.InvalidRequest, match="another name"):
                staging.clone_range(f"{place.name}/src", "src.vmdk", 0, name, 0, 10)
        with pytest.raises(errors.InvalidDisk, match="another name"):
            staging.commit()
    place.assert_holds({"src": flat_files("src")})


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_staged_timestamp_that_is_none_is_not_written(
    world: World, place: Place, outside: Outside, kind: str
) -> None:
    with world.client.create_staging(f"{place.name}/a") as staging, bounded(world.sidecar.pid):
        directory = place.root / staging.directory
        staging.write_file("disk-flat.vmdk", [], size=2 * MIB)
        staging.write_file("disk.vmdk", [(0, flat_descriptor("disk-flat.vmdk", 2 * MIB).encode())])
        put(SPECIAL[kind] or outside.secret, directory / TIMESTAMP)
        with pytest.raises(errors.InvalidDisk, match=TIMESTAMP):
            staging.commit()
    place.assert_holds({})


@pytest.mark.parametrize(
    "name", ["a.vmdk", "a.ecv", "a.manifest", "notes", TIMESTAMP, TOMBSTONE, MARKER, "lock", "extent"]
)
def test_a_file_of_a_gigabyte_is_not_read_into_memory(world: World, place: Place, name: str) -> None:
    place.plant("a")
    path = {"lock": place.lock_file("a"), "extent": place.file("a", "a-flat.vmdk")}.get(name, place.file("a", name))
    with path.open("ab") as file:
        file.write(b"# \n" if name == "a.vmdk" else b"")
        file.truncate(GIGABYTE)
    if name == "extent":
        place.descriptor("a").write_text(flat_descriptor("a-flat.vmdk", GIGABYTE))
    if name in ("notes", "extent"):  # a gigabyte of holes is read, in pieces
        with bounded(world.sidecar.pid):
            world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()
            world.client.delete(f"{place.name}/b", force=True)
    found = {} if name in ("notes", "extent") else every_call(world, place)
    if name == "a.vmdk":
        assert {found[call] for call in OF_THE_DISK} == {"IMAGE_INCOMPLETE"}
    if name in ("a.ecv", "a.manifest"):
        assert found["validate"] == "INVALID_METADATA"
    if name == "lock":  # what a dead process left
        assert found["touch"] == "ok"


def test_a_staged_descriptor_or_metadata_of_a_gigabyte_is_refused(world: World, place: Place) -> None:
    for name in ("disk.vmdk", "disk.ecv", "other.vmdk"):
        with world.client.create_staging(f"{place.name}/a") as staging, bounded(world.sidecar.pid):
            staging.write_file("disk-flat.vmdk", [], size=2 * MIB)
            staging.write_file("disk.vmdk", [(0, flat_descriptor("disk-flat.vmdk", 2 * MIB).encode())])
            staging.write_file(name, [], size=GIGABYTE)
            with pytest.raises((errors.InvalidDisk, errors.InvalidMetadata)):
                staging.commit()


def test_many_large_descriptors_are_not_held_in_memory_together(world: World) -> None:
    place = world.places["one"]
    extents = "\n".join(f'RW 1 FLAT "{number:05}" 0' for number in range(25_000))
    text = flat_descriptor("x", 512).replace('RW 1 FLAT "x" 0', extents).encode()
    assert MIB // 3 < len(text) < MIB
    with world.client.create_staging(f"{place.name}/a") as staging:
        directory = place.root / staging.directory
        for number in range(40):
            (directory / f"{number}.vmdk").write_bytes(text)
        with bounded(world.sidecar.pid, seconds=20), pytest.raises(errors.InvalidDisk, match="more than one disk"):
            staging.commit()


def test_thousands_of_pipes_in_an_image_fit_into_what_is_told_of_it(world: World, place: Place) -> None:
    """An answer has at most 8 MiB: with more to tell, nothing could be told of it, nor of those listed with it."""
    place.plant("a")
    for number in range(1_000):
        os.mkfifo(place.file("a", f"{number:05}" + "\N{SNOWMAN}" * 83))  # 254 bytes
    image = world.client.image(f"{place.name}/a")
    assert "is not a plain file" in image.problems[0]
    assert "900 more are not plain files" in image.problems
    assert image.ByteSize() < 64 << 10


def test_directories_nested_deeper_than_a_path_is_long_are_told_and_hang_nothing(world: World, place: Place) -> None:
    place.plant("a")
    path = os.open(place.directory("a"), os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d" * 200, dir_fd=path)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=path)
        os.close(path)
        path = below
    os.close(path)
    found = every_call(world, place)
    assert found["list"] == found["image"] == "ok"
    assert found["copy"] == "IMAGE_INCOMPLETE"


def test_a_pipe_that_took_the_place_of_an_extent_does_not_hang_the_mount(tmp_path: Path) -> None:
    """Between what the sidecar told of it and the opening."""
    put(FIFO, tmp_path / "pipe")
    raised: list[BaseException] = []

    def read() -> None:
        try:
            LocalReader(str(tmp_path / "pipe"), Generation(2 * MIB, 0, 0))
        except FileNotFoundError as error:
            raised.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert raised
