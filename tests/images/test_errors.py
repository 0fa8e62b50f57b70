"""Each fault has its gRPC code and reason, in google.rpc.ErrorInfo, for clients in any language."""

import fcntl
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from protos.images.v1 import datastore_service_pb2 as datastore_wire
from protos.images.v1 import image_service_pb2 as wire
from protos.images.v1 import staging_service_pb2 as staging_wire
from sidecar import errors
from tests.support.disks import pseudo_random
from tests.support.places import LAYOUTS, MIB, TIMESTAMP, Place, flat_files
from tests.support.processes import Sidecar, loop_mount, run, wait_until
from tests.support.world import World, datastore_flags, fault, make_ref

Call = Callable[[World, str], object]


def copy(world: World, source: str, destination: str) -> list[wire.CopyImageResponse]:
    return list(
        world.images.CopyImage(wire.CopyImageRequest(source=make_ref(source), destination=make_ref(destination)))
    )


def commit_nothing(world: World, name: str) -> object:
    staging = world.staging.CreateStaging(staging_wire.CreateStagingRequest(ref=make_ref(f"{name}/c")))
    try:
        return world.staging.CommitStaging(staging_wire.CommitStagingRequest(staging_id=staging.staging_id))
    finally:
        world.staging.AbortStaging(staging_wire.AbortStagingRequest(staging_id=staging.staging_id))


FAULTS: dict[str, tuple[str, str, Call]] = {
    "no image": (
        "NOT_FOUND", "IMAGE_NOT_FOUND", lambda w, n: w.images.GetImage(wire.GetImageRequest(ref=make_ref(f"{n}/none")))
    ),
    "no source": ("NOT_FOUND", "IMAGE_NOT_FOUND", lambda w, n: copy(w, f"{n}/none", f"{n}/c")),
    "no datastore": (
        "NOT_FOUND",
        "DATASTORE_NOT_FOUND",
        lambda w, n: w.datastores.GetDatastore(datastore_wire.GetDatastoreRequest(name="none")),
    ),
    "no file": (
        "NOT_FOUND",
        "FILE_NOT_FOUND",
        lambda w, n: list(w.staging.ReadFile(staging_wire.ReadFileRequest(ref=make_ref(f"{n}/valid"), name="none"))),
    ),
    "no staging": (
        "NOT_FOUND",
        "STAGING_NOT_FOUND",
        lambda w, n: w.staging.CommitStaging(staging_wire.CommitStagingRequest(staging_id="none")),
    ),
    "there already": ("ALREADY_EXISTS", "IMAGE_ALREADY_EXISTS", lambda w, n: copy(w, f"{n}/valid", f"{n}/valid")),
    "there, deleted": ("ALREADY_EXISTS", "IMAGE_ALREADY_EXISTS", lambda w, n: copy(w, f"{n}/valid", f"{n}/dead")),
    "tombstoned": (
        "FAILED_PRECONDITION",
        "IMAGE_TOMBSTONED",
        lambda w, n: w.images.TouchImage(wire.TouchImageRequest(ref=make_ref(f"{n}/dead"))),
    ),
    "not tombstoned": (
        "FAILED_PRECONDITION",
        "IMAGE_NOT_TOMBSTONED",
        lambda w, n: w.images.PurgeImage(wire.PurgeImageRequest(ref=make_ref(f"{n}/valid"))),
    ),
    "incomplete": ("FAILED_PRECONDITION", "IMAGE_INCOMPLETE", lambda w, n: copy(w, f"{n}/broken", f"{n}/c")),
    "corrupt metadata": (
        "FAILED_PRECONDITION",
        "INVALID_METADATA",
        lambda w, n: w.images.ValidateImage(wire.ValidateImageRequest(ref=make_ref(f"{n}/corrupt"))),
    ),
    "no id": (
        "INVALID_ARGUMENT",
        "INVALID_IMAGE_ID",
        lambda w, n: w.images.GetImage(wire.GetImageRequest(ref=make_ref(f"{n}/.."))),
    ),
    "no disk": ("INVALID_ARGUMENT", "INVALID_DISK", commit_nothing),
    "no page": (
        "INVALID_ARGUMENT", "INVALID_REQUEST", lambda w, n: w.images.ListImages(wire.ListImagesRequest(page_size=-1))
    ),
    "no space": (
        "RESOURCE_EXHAUSTED",
        "NO_SPACE",
        lambda w, n: w.staging.CreateStaging(
            staging_wire.CreateStagingRequest(ref=make_ref(f"{n}/c"), expected_bytes=1 << 60)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_a_fault_has_its_code_and_reason_and_changes_nothing(
    world: World, place: Place, case: tuple[str, str, Call]
) -> None:
    code, reason, call = case
    place.plant("valid")
    place.plant("dead")
    place.file("dead", "image_tombstone.txt").touch()
    place.plant("broken")
    place.file("broken", TIMESTAMP).unlink()
    place.plant("corrupt", companions={"corrupt.ecv": b"{"})
    before = world.snapshot()
    with pytest.raises(grpc.RpcError) as failed:
        call(world, place.name)
    assert fault(failed.value)[:2] == (code, reason)
    assert fault(failed.value)[2]
    assert world.snapshot() == before


def test_the_client_raises_the_class_of_the_reason(world: World, place: Place) -> None:
    for name, (code, reason, _) in FAULTS.items():
        cls = errors.error_classes()[reason]
        assert (name, cls.code) == (name, code)


def test_a_datastore_that_is_not_there_is_unavailable_and_not_empty(
    world: World, tmp_path: Path, stack: ExitStack
) -> None:
    world.places["one"].plant("a")
    gone = Place("gone", "compound", tmp_path / "gone")
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", *datastore_flags([world.places["one"], gone])))
    client = stack.enter_context(sidecar.client(timeout=5))
    for call in (
        lambda: client.image("gone/a"),
        lambda: client.delete("gone/a"),
        lambda: client.copy("gone/a", "one/b").wait(),
        lambda: client.copy("one/a", "gone/b").wait(),
        lambda: client.create_staging("gone/a"),
    ):
        with pytest.raises(errors.DatastoreUnavailable, match="gone"):
            call()
    page = next(client.image_pages())
    assert [image.ref.image_id for image in page.images] == ["a"]
    assert [text.partition(":")[0] for text in page.incomplete_datastores] == ["gone"]
    datastore = client.datastore("gone")
    assert not datastore.accessible
    assert str(gone.root) in datastore.fault
    assert not gone.root.exists()
    # When it comes, it is used.
    gone.root.mkdir()
    wait_until(lambda: client.datastore("gone").accessible, "it is accessible")
    client.copy("one/a", "gone/b").wait()
    gone.assert_holds({"b": flat_files("b")})
    wait_until(lambda: not next(client.image_pages()).incomplete_datastores, "all is known")


@pytest.fixture(params=LAYOUTS)
def failing(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> Place:
    """A datastore on a file system of its own, of the kind on which no operation succeeds when its device is gone."""
    mountpoint = stack.enter_context(loop_mount(tmp_path / "loop", 320 * MIB, ("mkfs.xfs", "-q")))
    return Place("small", LAYOUTS[request.param], mountpoint)


@pytest.fixture(params=LAYOUTS)
def small(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> Place:
    """A datastore on a small file system of its own."""
    mountpoint = stack.enter_context(loop_mount(tmp_path / "loop", 64 * MIB, ("mkfs.ext4", "-q")))
    run("rmdir", mountpoint / "lost+found")
    return Place("small", LAYOUTS[request.param], mountpoint)


def test_an_outage_of_the_storage_never_reads_as_no_image(
    world: World, failing: Place, tmp_path: Path, stack: ExitStack
) -> None:
    # The harm in the origin: exists() took an I/O error for "no", and an image was made, or deleted, twice.
    small = failing
    small.plant("a")
    world.places["one"].plant("a")
    places = [small, world.places["one"]]
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", *datastore_flags(places)))
    client = stack.enter_context(sidecar.client(timeout=5))
    assert client.image("small/a").files
    known = {image.ref.image_id for image in client.images("small")}
    run("sync", "-f", small.root)
    shut_down(small.root)
    for call in (
        lambda: client.image("small/a"),
        lambda: client.image("small/b"),
        lambda: client.delete("small/a", force=True),
        lambda: client.create_staging("small/c"),
        lambda: client.copy("small/a", "one/b").wait(),
        lambda: client.copy("one/a", "small/d").wait(),
    ):
        with pytest.raises(errors.DatastoreUnavailable, match="small"):
            call()
    # What is known stays known: it is not told that the images are gone.
    assert {image.ref.image_id for image in client.images("small")} == known == {"a"}
    assert [image.ref.image_id for image in client.images("one")] == ["a"]
    world.places["one"].assert_holds({"a": flat_files("a")})


def shut_down(mountpoint: Path) -> None:
    """Makes every operation of the file system fail with EIO, as when its device is pulled."""
    fd = os.open(mountpoint, os.O_RDONLY)
    try:
        # XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32), without flushing the log.
        fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))
    finally:
        os.close(fd)


def test_a_datastore_that_may_not_be_written_says_so(
    world: World, small: Place, tmp_path: Path, stack: ExitStack
) -> None:
    small.plant("a")
    run("mount", "-o", "remount,ro", small.root)
    flags = datastore_flags([small, world.places["one"]])
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", *[f"{flag},reserve=0" for flag in flags]))
    client = stack.enter_context(sidecar.client(timeout=5))
    for call in (
        lambda: client.touch("small/a"),
        lambda: client.delete("small/a"),
        lambda: client.create_staging("small/b"),
        lambda: client.copy("small/a", "small/b").wait(),
    ):
        with pytest.raises(errors.DatastoreDenied, match="small"):
            call()
    # What is there can be read.
    assert client.image("small/a").files
    client.copy("small/a", "one/b").wait()
    world.places["one"].assert_holds({"b": flat_files("b")})


def test_a_full_datastore_gets_no_half_an_image(world: World, small: Place, tmp_path: Path, stack: ExitStack) -> None:
    world.places["one"].plant("large", size=80 * MIB, data=[(0, 80 * MIB)])
    flags = datastore_flags([small, world.places["one"]])
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", *[f"{flag},reserve=0" for flag in flags]))
    client = stack.enter_context(sidecar.client())
    with pytest.raises(errors.NoSpace, match="small"):
        client.copy("one/large", "small/b").wait()
    staging = stack.enter_context(client.create_staging("small/b"))
    with pytest.raises(errors.NoSpace, match="small"):
        staging.write_file("b-flat.vmdk", ((offset * MIB, pseudo_random(MIB, offset)) for offset in range(80)))
    staging.abort()
    wait_until(lambda: small.contents() <= {"lost+found"}, "nothing is left")
