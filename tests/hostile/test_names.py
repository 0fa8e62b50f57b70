"""Names that no image and no file of one has, at every door: imagectl, the mount, and what a call only mentions."""

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos.images.v1 import image_service_pb2 as wire
from protos.images.v1 import staging_service_pb2 as staging_wire
from protos.images.v1.types_pb2 import ImageRef
from tests.hostile.support import Outside, bounded
from tests.images.test_ids import INVALID
from tests.images.test_staging_refusals import NAMES
from tests.support.places import MIB, Place, flat_descriptor, flat_files
from tests.support.processes import Mount, imagectl, run, wait_until
from tests.support.world import World, fault

COMMANDS = ("show", "validate", "touch", "rm", "rm --force", "restore", "purge", "cp to", "cp from", "import", "export")
# What a shell can write, and what it means in a path is not the kernel's doing.
TYPED = {name: image_id for name, image_id in INVALID.items() if "\0" not in image_id}


@pytest.mark.parametrize("command", COMMANDS)
def test_imagectl_refuses_every_name_that_is_no_images_with_a_line(
    world: World, outside: Outside, tmp_path: Path, command: str
) -> None:
    place = world.places["one"]
    place.plant("a")
    before = world.snapshot()
    # Each start of it takes a while: the ones in which a path could be hidden.
    for image_id in ("", "..", "../../etc", "a\n", "a/../a", "a" * 300, "\u0430"):
        ref = f"one/{image_id}"
        words = {
            "cp to": ["cp", "one/a", ref],
            "cp from": ["cp", ref, "one/b"],
            "import": ["import", str(outside.image / "a.vmdk"), ref],
            "export": ["export", ref, str(tmp_path / "exported")],
        }.get(command, [*command.split(), ref])
        if command == "import":
            outside.may_be_read(outside.image / "a.vmdk", outside.image / "a-flat.vmdk")
        result = imagectl(world.sidecar.address, *words, check=False)
        assert (result.returncode, result.stdout) == (2, ""), (words, result.stderr)
        assert "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].startswith(("imagectl: ", "Error: "))
        assert not (tmp_path / "exported").exists()
    assert world.snapshot() == before


def test_a_listing_and_a_watch_of_what_is_no_name_show_nothing(world: World) -> None:
    world.places["one"].plant("a")
    for image_id in INVALID.values():
        if image_id:
            assert list(world.images.ListImages(wire.ListImagesRequest(image_id=image_id)).images) == []
        request = wire.ListImagesRequest(page_token=image_id)
        assert len(world.images.ListImages(request).images) <= 1
    for datastore in ("..", "/", "one/", "one/image_a", "a\n", "x" * 300, "\u043ene"):
        for call in (
            lambda datastore=datastore: world.images.ListImages(wire.ListImagesRequest(datastore=datastore)),
            lambda datastore=datastore: list(world.images.WatchImages(wire.WatchImagesRequest(datastore=datastore))),
        ):
            with pytest.raises(grpc.RpcError) as failed:
                call()
            assert fault(failed.value)[:2] == ("NOT_FOUND", "DATASTORE_NOT_FOUND")


@pytest.mark.parametrize("token", ["1" * 5000, "9" * 30, "\u0661", "-1", "1e9", "0x1", " 1"])
def test_a_watch_that_goes_on_from_no_revision_gets_everything(world: World, token: str) -> None:
    """The sidecar's own token, with a number that it never gave."""
    with world.client.watch() as first:
        life = next(iter(answer.resume_token for answer in first if answer.resume_token)).partition(":")[0]
    with world.client.watch(resume_token=f"{life}:{token}") as second:
        assert next(iter(second)).snapshot_start


def test_a_name_that_a_commit_only_mentions_is_a_name_all_the_same(world: World, place: Place) -> None:
    """It ends in the log."""
    with world.client.create_staging(f"{place.name}/a") as staging:
        staging.write_file("disk-flat.vmdk", [], size=2 * MIB)
        staging.write_file("disk.vmdk", [(0, flat_descriptor("disk-flat.vmdk", 2 * MIB).encode())])
        for image_id in ("a\n2026-01-01 published image=forged", "../x", "a b", ""):
            ref = ImageRef(datastore=place.name, image_id=image_id)
            with pytest.raises(grpc.RpcError) as failed:
                world.staging.CommitStaging(staging_wire.CommitStagingRequest(staging_id=staging.id, copied_from=ref))
            assert fault(failed.value)[:2] == ("INVALID_ARGUMENT", "INVALID_IMAGE_ID")
        staging.commit(copied_from=f"{place.name}/b")
    assert "\n2026-01-01 published" not in world.sidecar.log.read_text()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_companion_of_a_name_that_no_file_has_is_refused(world: World, place: Place, name: str) -> None:
    place.plant("a")
    before = world.snapshot()
    ref = ImageRef(datastore=place.name, image_id="a")
    for request in (
        wire.UpdateMetadataRequest(ref=ref, files={name: b"x"}),
        wire.UpdateMetadataRequest(ref=ref, remove_files=[name]),
    ):
        with pytest.raises(grpc.RpcError) as failed:
            world.images.UpdateMetadata(request)
        assert fault(failed.value)[:2] == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert world.snapshot() == before


@pytest.mark.parametrize("staging_id", ["", "..", "../../image_a", "/", "a\n", "x" * 5000, "\u0430"])
def test_a_staging_id_that_is_a_path_finds_nothing(world: World, place: Place, staging_id: str) -> None:
    place.plant("a")
    before = world.snapshot()
    ref = ImageRef(datastore=place.name, image_id="a")
    staging = world.staging
    for call in (
        lambda: staging.WriteFile(iter([staging_wire.WriteFileRequest(staging_id=staging_id, name="x", data=b"x")])),
        lambda: list(staging.ReadFile(staging_wire.ReadFileRequest(staging_id=staging_id, name="x"))),
        lambda: staging.CloneRange(
            staging_wire.CloneRangeRequest(source=ref, source_name="a.vmdk", staging_id=staging_id, name="x", length=1)
        ),
        lambda: list(staging.CloneDisk(staging_wire.CloneDiskRequest(source=ref, staging_id=staging_id))),
        lambda: staging.CommitStaging(staging_wire.CommitStagingRequest(staging_id=staging_id)),
    ):
        with pytest.raises(grpc.RpcError) as failed:
            call()
        assert fault(failed.value)[:2] == ("NOT_FOUND", "STAGING_NOT_FOUND")
    staging.AbortStaging(staging_wire.AbortStagingRequest(staging_id=staging_id))
    assert world.snapshot() == before


# The mount


@pytest.fixture(scope="module")
def mount(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with Mount(tmp_path_factory.mktemp("mount") / "mnt", shared_world.sidecar.address) as mount:
        yield mount


def test_the_mount_makes_nothing_of_a_name_that_is_no_images(world: World, mount: Mount) -> None:
    before = world.snapshot()
    with bounded(world.sidecar.pid):
        for image_id in TYPED.values():
            if "/" in image_id or image_id in ("", ".", ".."):
                continue
            with pytest.raises(OSError) as failed:
                os.mkdir(mount.path / "one" / image_id)
            assert failed.value.strerror in ("Invalid argument", "File name too long"), image_id
            assert not (mount.path / "one" / image_id).exists()
    for path in ("one/../../etc-x", "../x", "one/.deleted/../../x"):
        run("mkdir", "-p", os.path.normpath(mount.path / path), check=False)
    assert world.snapshot() == before


def test_the_mount_stages_no_file_that_no_image_has(world: World, place: Place, mount: Mount) -> None:
    """And what is refused starts no line of its own in a log."""
    directory = mount.path / place.name / "new"
    directory.mkdir()
    try:
        for name in NAMES.values():
            if "/" in name or "\0" in name or name in ("", ".", ".."):
                continue
            with pytest.raises(OSError) as failed:
                (directory / name).write_bytes(b"x")
            assert failed.value.errno is not None
            assert failed.value.strerror != "Input/output error", name
        for link in (directory / "link", directory / "hard"):
            with pytest.raises(OSError):
                link.symlink_to("/etc/shadow") if link.name == "link" else os.link("/etc/shadow", link)
        for kind in ("p", "c"):
            assert run("mknod", directory / "node", kind, *(["1", "5"] if kind == "c" else []), check=False).returncode
        with pytest.raises(OSError):
            (directory / "a\n2026-01-01 00:00:00,000 INFO forged" / "x").mkdir()
        assert os.listdir(directory) == []
    finally:
        run("rm", "-r", directory, check=False)
    assert "\n2026-01-01 00:00" not in mount.log.read_text()
    wait_until(lambda: not place.staging_directories(), "nothing is staged")


def test_the_mount_shows_no_more_of_a_planted_image_than_its_plain_files(
    world: World, place: Place, outside: Outside, mount: Mount
) -> None:
    place.plant("a")
    for name, target in (("shadow", "/etc/shadow"), ("secret", outside.secret), ("a.ecv", outside.secret)):
        place.file("a", name).symlink_to(target)
    os.mkfifo(place.file("a", "fifo"))
    directory = mount.path / place.name / "a"
    wait_until(directory.exists, "the image is shown")
    with bounded(world.sidecar.pid):
        assert set(os.listdir(directory)) <= flat_files("a")
        for name in ("shadow", "secret", "a.ecv", "fifo"):
            result = run("cat", directory / name, check=False, timeout=10)
            assert (result.returncode, result.stdout) == (1, "")
        assert run("cp", "-r", directory, mount.path / place.name / "b", check=False, timeout=20).returncode
    run("rm", "-r", mount.path / place.name / "b", check=False)
    wait_until(lambda: not place.directory("b").exists(), "nothing is made of it")
