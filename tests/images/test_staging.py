"""StagingService: an image made by its client, call by call, private until it is committed and nothing if it is not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.images.v1 import staging_service_pb2 as wire
from protos.images.v1.types_pb2 import IMAGE_STATE_VALID, ImageFile
from sidecar import errors
from sidecar.client import Hole, Staging
from tests.support.disks import allocated, assert_same_disk, pseudo_random
from tests.support.places import KIB, LAYOUTS, MIB, TIMESTAMP, Place, flat_descriptor, flat_files, write_flat_disk
from tests.support.world import World


@pytest.fixture
def disk(scratch: Path) -> Path:
    """The descriptor of a flat disk that is no image yet."""
    write_flat_disk(scratch, "disk", seed=5)
    return scratch / "disk.vmdk"


def write_disk(staging: Staging, disk: Path) -> None:
    for path in (disk, disk.with_name("disk-flat.vmdk")):
        staging.write_file(path.name, [(0, path.read_bytes())])


def read(world: World, source: str | Staging, name: str, offset: int = 0, length: int = 0) -> bytes:
    """The bytes of a range; every answer in its place, none missing."""
    content = b""
    for answer in world.client.read_file(source, name, offset, length):
        assert answer.offset == offset + len(content)
        assert len(answer.data) <= 1 * MIB
        content += answer.data + bytes(answer.hole_bytes)
    return content


def test_what_is_staged_is_nobodys_image_until_it_is_committed(world: World, place: Place, disk: Path) -> None:
    ref = f"{place.name}/a"
    with world.client.create_staging(ref) as staging:
        assert place.staging_directories() == [place.root / staging.directory]
        write_disk(staging, disk)
        staging.write_file("disk.ecv", [(0, b'{"os": "x"}')])
        with pytest.raises(errors.ImageNotFound):
            world.client.image(ref)
        assert world.listed() == {}
        answer = staging.commit()
    assert answer.image.state == IMAGE_STATE_VALID
    assert dict(answer.renamed_files) == {
        "disk.vmdk": "a.vmdk",
        "disk-flat.vmdk": "a-flat.vmdk",
        "disk.ecv": "a.ecv",
    }
    assert answer.publish_time == answer.image.touch_time
    assert place.file("a", TIMESTAMP).stat().st_mtime_ns == answer.publish_time.ToNanoseconds()
    place.assert_holds({"a": flat_files("a", "a.ecv")})
    assert_same_disk(disk, place.descriptor("a"))
    assert world.client.image(ref).metadata_json == '{"os": "x"}'
    assert list(world.listed()) == [ref]
    world.client.validate(ref)


def test_an_aborted_staging_directory_is_gone_and_may_be_aborted_again(world: World, place: Place, disk: Path) -> None:
    staging = world.client.create_staging(f"{place.name}/a")
    write_disk(staging, disk)
    staging.abort()
    place.assert_holds({})
    world.staging.AbortStaging(wire.AbortStagingRequest(staging_id=staging.id))
    world.staging.AbortStaging(wire.AbortStagingRequest(staging_id="nobody's"))
    for call in (
        lambda: staging.write_file("x", [(0, b"x")]),
        lambda: read(world, staging, "x"),
        staging.commit,
        lambda: list(staging.clone_disk(f"{place.name}/b")),
        lambda: staging.clone_range(f"{place.name}/b", "b.vmdk", 0, "x", 0, 1),
    ):
        with pytest.raises((errors.StagingNotFound, errors.ImageNotFound)):
            call()
    place.assert_holds({})


def test_data_and_holes_are_read_back_as_they_were_written(world: World, place: Place) -> None:
    # Longer than one message, out of order, overlapping, a hole over data and one at the end.
    first, second = pseudo_random(3 * MIB, 1), pseudo_random(64 * KIB, 2)
    with world.client.create_staging(f"{place.name}/a") as staging:
        answer = staging.write_file(
            "x", [(8 * MIB, second), (0, first), (1 * MIB, second), Hole(2 * MIB, 512 * KIB), Hole(9 * MIB, 55 * MIB)]
        )
        expected = bytearray(64 * MIB)
        expected[: 3 * MIB] = first
        expected[1 * MIB : 1 * MIB + 64 * KIB] = second
        expected[2 * MIB : 2 * MIB + 512 * KIB] = bytes(512 * KIB)
        expected[8 * MIB : 8 * MIB + 64 * KIB] = second
        assert answer.size_bytes == 64 * MIB
        assert answer.written_bytes == 3 * MIB + 2 * 64 * KIB
        assert read(world, staging, "x") == bytes(expected)
        for offset, length in ((0, 1), (1 * MIB - 1, 2), (2 * MIB - 7, 600_000), (5 * MIB, 4 * MIB), (64 * MIB - 1, 9)):
            assert read(world, staging, "x", offset, length) == bytes(expected[offset : offset + length])
        assert read(world, staging, "x", 64 * MIB) == b""
        assert read(world, staging, "x", 65 * MIB, 5) == b""
        holes = [answer for answer in world.client.read_file(staging, "x") if answer.hole_bytes]
        assert sum(answer.hole_bytes for answer in holes) >= 60 * MIB
        assert allocated(place.root / staging.directory / "x") <= 3 * MIB + 256 * KIB


def test_the_first_answer_of_a_read_tells_the_size(world: World, place: Place) -> None:
    place.plant("a")
    for name, offset in (("a-flat.vmdk", 0), ("a-flat.vmdk", 1 * MIB), ("a.vmdk", 0)):
        answers = list(world.client.read_file(f"{place.name}/a", name, offset))
        size = place.file("a", name).stat().st_size
        assert [answer.size_bytes for answer in answers] == [size] + [0] * (len(answers) - 1)
        assert read(world, f"{place.name}/a", name, offset) == place.file("a", name).read_bytes()[offset:]


def test_a_size_cuts_or_extends_a_file(world: World, place: Place) -> None:
    with world.client.create_staging(f"{place.name}/a") as staging:
        assert staging.write_file("x", [(0, b"abcdef")], size=3).size_bytes == 3  # at the end, whatever was written
        requests = [
            wire.WriteFileRequest(staging_id=staging.id, name="x", offset=0, data=b"abcdef"),
            wire.WriteFileRequest(size_bytes=3),
        ]
        assert world.staging.WriteFile(iter(requests)).size_bytes == 3
        assert read(world, staging, "x") == b"abc"
        assert staging.write_file("x", [], size=1 << 40).size_bytes == 1 << 40
        assert allocated(place.root / staging.directory / "x") <= 8 * KIB
        assert staging.write_file("x", [], size=0).size_bytes == 0
        assert staging.write_file("empty", []).size_bytes == 0
        assert read(world, staging, "empty") == b""


def test_a_file_is_written_in_several_calls(world: World, place: Place) -> None:
    with world.client.create_staging(f"{place.name}/a") as staging:
        for number in reversed(range(5)):
            staging.write_file("x", [(number * 3, b"%03d" % number)])
        assert read(world, staging, "x") == b"000001002003004"


@pytest.mark.parametrize(
    ("offset", "data", "hole", "size"),
    [(-1, b"x", 0, None), (0, b"", -1, None), (0, b"", 0, -1), (1 << 62, b"x", 0, None), (0, b"", 1 << 62, None),
     (0, b"", 0, 1 << 62), (2**63 - 1, b"x", 2**63 - 1, None)],
)  # fmt: skip
def test_ranges_that_no_file_has_are_refused(
    world: World, place: Place, offset: int, data: bytes, hole: int, size: int | None
) -> None:
    with world.client.create_staging(f"{place.name}/a") as staging:
        request = wire.WriteFileRequest(
            staging_id=staging.id, name="x", offset=offset, data=data, hole_bytes=hole, size_bytes=size
        )
        with pytest.raises(Exception, match="are not in a file"):
            world.staging.WriteFile(iter([request]))
        for read_offset, length in ((-1, 0), (0, -1), (1 << 62, 1)):
            with pytest.raises(errors.InvalidRequest):
                read(world, staging, "x", read_offset, length)


def test_a_stream_without_a_message_is_an_error(world: World) -> None:
    with pytest.raises(Exception, match="before its first message"):
        world.staging.WriteFile(iter([]))


def test_a_reader_asks_for_a_file_that_is_there(world: World, place: Place) -> None:
    place.plant("a")
    with world.client.create_staging(f"{place.name}/b") as staging:
        for source in (f"{place.name}/a", staging):
            with pytest.raises(errors.FileNotInImage, match="'none'"):
                read(world, source, "none")
        # The sidecar's own files are nobody's data.
        with pytest.raises((errors.InvalidRequest, errors.FileNotInImage)):
            read(world, f"{place.name}/a", TIMESTAMP)
    with pytest.raises(errors.ImageNotFound):
        read(world, f"{place.name}/none", "none.vmdk")


def test_staged_files_are_renamed_in_place_of_others_and_removed(world: World, place: Place, disk: Path) -> None:
    ref = f"{place.name}/a"
    with world.client.create_staging(ref) as staging:
        for name in ("old.vmdk", "disk.vmdk", "notes"):
            staging.write_file(name, [(0, b"old")])
        for path in (disk, disk.with_name("disk-flat.vmdk")):
            staging.write_file(f".{path.name}.Ab12Cd", [(0, path.read_bytes())])
            staging.rename_file(f".{path.name}.Ab12Cd", path.name)
        staging.rename_file("disk.vmdk", "disk.vmdk")
        staging.rename_file("notes", "notes.txt")
        staging.remove_file("old.vmdk")
        assert read(world, staging, "notes.txt") == b"old"
        staging.write_file("old.vmdk", [(0, b"new")])
        assert read(world, staging, "old.vmdk") == b"new"
        staging.remove_file("old.vmdk")
        staging.commit()
    place.assert_holds({"a": flat_files("a", "notes.txt")})
    assert_same_disk(disk, place.descriptor("a"))


def test_what_is_not_staged_is_neither_renamed_nor_removed(world: World, place: Place) -> None:
    with world.client.create_staging(f"{place.name}/a") as staging:
        staging.write_file("kept", [(0, b"kept")])
        for new_name in ("other", "kept", "missing"):
            with pytest.raises(errors.FileNotInImage, match="has no file 'missing'"):
                staging.rename_file("missing", new_name)
        with pytest.raises(errors.FileNotInImage, match="has no file 'missing'"):
            staging.remove_file("missing")
        for name, new_name in (("kept", "../a"), ("kept", TIMESTAMP), ("kept", "lock.ec_lock"), ("", "kept")):
            with pytest.raises(errors.InvalidRequest):
                staging.rename_file(name, new_name)
        with pytest.raises(errors.InvalidRequest):
            staging.remove_file("../kept")
        assert read(world, staging, "kept") == b"kept"
        staging.abort()
        with pytest.raises(errors.StagingNotFound):
            staging.remove_file("kept")


def test_the_same_request_finds_the_same_staging_directory(world: World, place: Place, disk: Path) -> None:
    request_id = f"stage-{place.name}"
    first = world.client.create_staging(f"{place.name}/a", request_id=request_id)
    write_disk(first, disk)
    second = world.client.create_staging(f"{place.name}/a", request_id=request_id)
    assert second.id == first.id
    assert second.directory == first.directory
    assert len(place.staging_directories()) == 1
    first.renew()
    with pytest.raises(errors.InvalidRequest, match=request_id):
        world.client.create_staging(f"{place.name}/b", request_id=request_id)
    with world.client.create_staging(f"{place.name}/a") as other:
        assert other.id != first.id
    second.commit()
    place.assert_holds({"a": flat_files("a")})


def test_a_renewal_of_what_is_gone_says_so_and_leaves_nothing(world: World, place: Place) -> None:
    staging = world.client.create_staging(f"{place.name}/a")
    world.staging.AbortStaging(wire.AbortStagingRequest(staging_id=staging.id))
    with pytest.raises(errors.StagingNotFound):
        staging.renew()
    place.assert_holds({})


def test_a_commit_that_is_repeated_because_its_answer_was_lost_succeeds(world: World, place: Place, disk: Path) -> None:
    staging = world.client.create_staging(f"{place.name}/a")
    write_disk(staging, disk)
    request = wire.CommitStagingRequest(staging_id=staging.id, request_id=f"commit-{place.name}")
    first = world.staging.CommitStaging(request)
    before = place.snapshot()
    assert world.staging.CommitStaging(request) == first
    assert place.snapshot() == before
    with pytest.raises(errors.StagingNotFound):
        staging.commit()


def test_an_image_that_is_there_is_not_staged_again(world: World, place: Place) -> None:
    place.plant("a")
    before = place.snapshot()
    with pytest.raises(errors.ImageAlreadyExists):
        world.client.create_staging(f"{place.name}/a")
    assert place.snapshot() == before


def test_whoever_commits_second_is_told_so_and_the_first_keeps_its_image(
    world: World, place: Place, disk: Path
) -> None:
    source = place.plant("source", seed=8)
    first, second = (world.client.create_staging(f"{place.name}/a") for _ in range(2))
    for staging in (first, second):
        write_disk(staging, disk)
    world.client.copy(f"{place.name}/source", f"{place.name}/a").wait()
    for staging in (first, second):
        with pytest.raises(errors.ImageAlreadyExists, match=f"{place.name}/a"):
            staging.commit()
    place.assert_holds({"source": flat_files("source"), "a": flat_files("a")})
    assert_same_disk(source, place.descriptor("a"))


def test_a_wreck_in_the_images_place_goes_to_the_trash(world: World, place: Place, disk: Path) -> None:
    place.plant("a", timestamp=False, companions={"old": b"old"})
    place.descriptor("a").unlink()
    with world.client.create_staging(f"{place.name}/a") as staging:
        write_disk(staging, disk)
        staging.commit()
    place.assert_holds({"a": flat_files("a")})
    assert_same_disk(disk, place.descriptor("a"))


@pytest.mark.parametrize("source", LAYOUTS)
def test_a_disk_is_cloned_into_a_staging_directory_without_its_companions(
    world: World, place: Place, source: str
) -> None:
    original = world.places[source].plant("src", companions={"src.ecv": b"{}"}, size=64 * MIB)
    with world.client.create_staging(f"{place.name}/a") as staging:
        answers = list(staging.clone_disk(f"{source}/src"))
        assert answers[-1].done_bytes == answers[-1].total_bytes > 64 * MIB
        staging.write_file("a.ecv", [(0, b'{"mine": 1}')])
        staging.commit(copied_from=f"{source}/src")
    assert f"published image={place.name}/a copied_from={source}/src\n" in world.sidecar.log.read_text()
    expected = {"a": flat_files("a", "a.ecv")}
    if source == place.name:
        expected["src"] = flat_files("src", "src.ecv")
    place.assert_holds(expected)
    assert_same_disk(original, place.descriptor("a"))
    assert allocated(place.directory("a")) <= allocated(original.parent) + 64 * KIB


def ranges(size: int, piece: int) -> Iterator[tuple[int, int]]:
    yield from ((offset, piece) for offset in range(0, size, piece))


@pytest.mark.parametrize("piece", [64 * MIB, 1 * MIB, 777_777])
def test_a_file_cloned_by_ranges_is_the_file_with_its_holes(world: World, place: Place, piece: int) -> None:
    size = 16 * MIB
    place.plant("src", size=size, data=[(0, 64 * KIB), (5 * MIB + 512, 100_000), (size - 4096, 4096)])
    with world.client.create_staging(f"{place.name}/a") as staging:
        for offset, length in ranges(size, piece):
            done = 0
            while done < min(length, size - offset):
                answer = staging.clone_range(
                    f"{place.name}/src", "src-flat.vmdk", offset + done, "any name", offset + done, length - done
                )
                assert answer.done_bytes > 0
                done += answer.done_bytes
        answer = staging.clone_range(f"{place.name}/src", "src-flat.vmdk", size, "any name", size, 5)
        assert answer.done_bytes == 0
        copy = place.root / staging.directory / "any name"
        assert copy.read_bytes() == place.file("src", "src-flat.vmdk").read_bytes()
        assert allocated(copy) <= allocated(place.file("src", "src-flat.vmdk")) + 64 * KIB


def test_a_range_goes_where_it_is_asked_to_and_replaces_what_was_there(world: World, place: Place) -> None:
    place.plant("src", data=[(0, 64 * KIB)])
    original = place.file("src", "src-flat.vmdk").read_bytes()
    with world.client.create_staging(f"{place.name}/a") as staging:
        staging.write_file("x", [(0, b"\xff" * 2 * MIB)])
        answer = staging.clone_range(f"{place.name}/src", "src-flat.vmdk", 100, "x", 5000, 100_000)
        assert answer.done_bytes == 100_000
        expected = bytearray(b"\xff" * 2 * MIB)
        expected[5000:105_000] = original[100:100_100]  # data, and a hole that was data
        assert read(world, staging, "x") == bytes(expected)
        answer = staging.clone_range(f"{place.name}/src", "src-flat.vmdk", 2 * MIB - 10, "x", 0, 1 << 40)
        assert answer.done_bytes == 10


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("src-flat.vmdk", -1, "x", 0, 1), errors.InvalidRequest),
        (("src-flat.vmdk", 0, "x", -1, 1), errors.InvalidRequest),
        (("src-flat.vmdk", 0, "x", 0, -1), errors.InvalidRequest),
        (("src-flat.vmdk", 0, "../x", 0, 1), errors.InvalidRequest),
        (("../src/src-flat.vmdk", 0, "x", 0, 1), errors.InvalidRequest),
        (("none", 0, "x", 0, 1), errors.FileNotInImage),
    ],
)
def test_a_range_that_is_none_is_refused(
    world: World, place: Place, arguments: tuple[str, int, str, int, int], error: type[errors.ImagesError]
) -> None:
    place.plant("src")
    with world.client.create_staging(f"{place.name}/a") as staging, pytest.raises(error):
        staging.clone_range(f"{place.name}/src", *arguments)


def test_only_a_whole_image_is_cloned(world: World, place: Place) -> None:
    place.plant("src", timestamp=False)
    with world.client.create_staging(f"{place.name}/a") as staging:
        with pytest.raises(errors.ImageIncomplete):
            list(staging.clone_disk(f"{place.name}/src"))
        with pytest.raises(errors.ImageIncomplete):
            staging.clone_range(f"{place.name}/src", "src-flat.vmdk", 0, "x", 0, 1)
        assert list((place.root / staging.directory).glob("*.vmdk")) == []


def test_what_cannot_fit_is_refused_before_it_is_written(world: World, place: Place) -> None:
    before = place.snapshot()
    with pytest.raises(errors.NoSpace):
        world.client.create_staging(f"{place.name}/a", expected_bytes=1 << 60)
    with pytest.raises(errors.InvalidRequest):
        world.client.create_staging(f"{place.name}/a", expected_bytes=-1)
    assert place.snapshot() == before


def test_a_staging_directory_is_locked_and_its_client_may_write_into_it(world: World, place: Place, disk: Path) -> None:
    # A client on the same host that was told the directory writes by itself.
    with world.client.create_staging(f"{place.name}/a") as staging:
        directory = place.root / staging.directory
        (directory / "disk.vmdk").write_bytes(disk.read_bytes())
        (directory / "disk-flat.vmdk").write_bytes(disk.with_name("disk-flat.vmdk").read_bytes())
        staging.commit()
    place.assert_holds({"a": flat_files("a")})
    assert_same_disk(disk, place.descriptor("a"))


def test_a_descriptor_of_the_right_name_stays_as_it_is(world: World, place: Place) -> None:
    text = flat_descriptor("a-flat.vmdk", 1 * MIB)
    with world.client.create_staging(f"{place.name}/a") as staging:
        staging.write_file("a.vmdk", [(0, text.encode())])
        staging.write_file("a-flat.vmdk", [], size=1 * MIB)
        assert staging.commit().renamed_files == {"a.vmdk": "a.vmdk", "a-flat.vmdk": "a-flat.vmdk"}
    assert place.descriptor("a").read_text() == text


def test_not_one_byte_is_read_or_copied_of_another_file_than_the_caller_knows(world: World, place: Place) -> None:
    place.plant("src")
    name = f"{place.name}/src"
    known = next(file for file in world.client.image(name).files if file.name == "src-flat.vmdk")
    assert list(world.client.read_file(name, known.name, expected=known))
    others = [
        ImageFile(inode=known.inode + 1, modify_time=known.modify_time, size_bytes=known.size_bytes),
        ImageFile(inode=known.inode, size_bytes=known.size_bytes),
        ImageFile(inode=known.inode, modify_time=known.modify_time, size_bytes=known.size_bytes - 1),
    ]
    for other in others:
        with pytest.raises(errors.FileChanged, match="look at the image again"):
            list(world.client.read_file(name, known.name, expected=other))
        with world.client.create_staging(f"{place.name}/a") as staging:
            with pytest.raises(errors.FileChanged):
                staging.clone_range(name, known.name, 0, "x", 0, 1, other)
            assert not (place.root / staging.directory / "x").exists()
            assert staging.clone_range(name, known.name, 0, "x", 0, 1, known).done_bytes == 1
