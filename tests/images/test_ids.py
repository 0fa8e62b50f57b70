"""Image ids: what can be the name of an image, and that nothing else ever touches a datastore."""

from collections.abc import Callable

import grpc
import pytest

from protos.images.v1 import image_service_pb2 as wire
from protos.images.v1 import staging_service_pb2 as staging_wire
from protos.images.v1.types_pb2 import IMAGE_STATE_VALID, ImageRef
from tests.support.disks import assert_same_disk
from tests.support.places import Place, flat_files
from tests.support.world import World, fault

INVALID = {
    "empty": "",
    "dot": ".",
    "dot-dot": "..",
    "hidden": ".a",
    "slash": "a/b",
    "leading-slash": "/a",
    "out": "../../etc",
    "backslash": "a\\b",
    "space": "a b",
    "newline": "a\n",
    "nul": "a\0b",
    "tab": "\ta",
    "quote": 'a"b',
    "percent": "a%2fb",
    "tilde": "~a",
    "colon": "a:b",
    "umlaut": "ä",
    "fullwidth": "\uff41",
    "digits-of-another-script": "\u0663",
    "cyrillic": "\u0430",
    "greek": "\u03bf",
    "long-s": "\u017f",
    "kelvin": "\u212a",
    "accent-of-its-own": "a\u0301",
    "zero-width": "a\u200b",
    "soft-hyphen": "a\u00ad",
    "right-to-left": "a\u202eb",
    "one-dot-leader": "a\u2024b",
    "hyphen-of-another-kind": "a\u2010b",
    "fraction-slash": "a\u2044b",
    "line-separator": "a\u2028",
    "carriage-return": "a\r",
    "escape": "\x1b[2J",
    "129": "a" * 129,
    "300": "a" * 300,
    "a-lock": "a.ec_lock",
}

CALLS: dict[str, Callable[[World, ImageRef], object]] = {
    "GetImage": lambda world, ref: world.images.GetImage(wire.GetImageRequest(ref=ref)),
    "ValidateImage": lambda world, ref: world.images.ValidateImage(wire.ValidateImageRequest(ref=ref)),
    "ValidateImage with repair": lambda world, ref: world.images.ValidateImage(
        wire.ValidateImageRequest(ref=ref, repair=True)
    ),
    "TouchImage": lambda world, ref: world.images.TouchImage(wire.TouchImageRequest(ref=ref)),
    "CopyImage from": lambda world, ref: list(
        world.images.CopyImage(wire.CopyImageRequest(source=ref, destination=there(ref, "b")))
    ),
    "CopyImage to": lambda world, ref: list(
        world.images.CopyImage(wire.CopyImageRequest(source=there(ref, "a"), destination=ref))
    ),
    "DeleteImage": lambda world, ref: world.images.DeleteImage(wire.DeleteImageRequest(ref=ref)),
    "DeleteImage with force": lambda world, ref: world.images.DeleteImage(wire.DeleteImageRequest(ref=ref, force=True)),
    "RestoreImage": lambda world, ref: world.images.RestoreImage(wire.RestoreImageRequest(ref=ref)),
    "PurgeImage": lambda world, ref: world.images.PurgeImage(wire.PurgeImageRequest(ref=ref)),
    "UpdateMetadata": lambda world, ref: world.images.UpdateMetadata(
        wire.UpdateMetadataRequest(ref=ref, files={"x": b"x"})
    ),
    "CreateStaging": lambda world, ref: world.staging.CreateStaging(staging_wire.CreateStagingRequest(ref=ref)),
    "ReadFile": lambda world, ref: list(world.staging.ReadFile(staging_wire.ReadFileRequest(ref=ref, name="a.vmdk"))),
    "CloneRange": lambda world, ref: world.staging.CloneRange(
        staging_wire.CloneRangeRequest(source=ref, source_name="a.vmdk", staging_id="none", name="x", length=1)
    ),
    "CloneDisk": lambda world, ref: list(
        world.staging.CloneDisk(staging_wire.CloneDiskRequest(source=ref, staging_id="none"))
    ),
}


def there(ref: ImageRef, image_id: str) -> ImageRef:
    return ImageRef(datastore=ref.datastore, image_id=image_id)


@pytest.mark.parametrize("image_id", INVALID.values(), ids=INVALID)
def test_what_is_no_image_id_makes_nothing_on_a_datastore(world: World, place: Place, image_id: str) -> None:
    place.plant("a")
    before = world.snapshot()
    for name, call in CALLS.items():
        with pytest.raises(grpc.RpcError) as failed:
            call(world, ImageRef(datastore=place.name, image_id=image_id))
        code, reason, _ = fault(failed.value)
        assert (name, code, reason) == (name, "INVALID_ARGUMENT", "INVALID_IMAGE_ID")
    assert world.snapshot() == before


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_that_names_no_datastore_or_an_unknown_one_says_so(world: World, call: Callable[..., object]) -> None:
    for datastore, expected in (
        ("", ("INVALID_ARGUMENT", "INVALID_REQUEST")),
        ("four", ("NOT_FOUND", "DATASTORE_NOT_FOUND")),
        ("../one", ("NOT_FOUND", "DATASTORE_NOT_FOUND")),
    ):
        with pytest.raises(grpc.RpcError) as failed:
            call(world, ImageRef(datastore=datastore, image_id="a"))
        assert fault(failed.value)[:2] == expected


def test_the_message_says_which_ids_there_may_be(world: World) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        world.images.GetImage(wire.GetImageRequest(ref=ImageRef(datastore="one", image_id="a b")))
    message = fault(failed.value)[2]
    assert "'a b'" in message
    assert "1 to 128 letters, digits, '.', '_' and '-'" in message


@pytest.mark.parametrize(
    "image_id",
    [
        "a",
        "7",
        "_",
        "-rf",
        "a.b.",
        "a..b",
        "debian-12.5_amd64",
        "x" * 128,
        "A",
        # As the project's own names, and as those of other layouts: an image may be called so.
        "tmp_image_1",
        "tmp_images",
        "deleted_images",
        "image_a",
        "lock",
        "lock.vmdk",
        "image_timestamp",
        "image_tombstone",
        "image_timestamp.txt",
    ],
)
def test_every_image_id_can_be_copied_listed_deleted_and_purged(world: World, place: Place, image_id: str) -> None:
    ref = f"{place.name}/{image_id}"
    source = place.plant("source")
    image = world.client.copy(f"{place.name}/source", ref).wait()
    assert image.state == IMAGE_STATE_VALID
    place.assert_holds({"source": flat_files("source"), image_id: flat_files(image_id)})
    assert [file.name for file in image.files] == [f"{image_id}-flat.vmdk", f"{image_id}.vmdk"]
    assert_same_disk(source, place.descriptor(image_id))
    assert [found.ref.image_id for found in world.client.images(place.name, image_id=image_id)] == [image_id]
    world.client.copy(ref, f"{place.name}/again").wait()
    assert_same_disk(source, place.descriptor("again"))
    world.client.delete(ref)
    world.client.purge(ref)
    place.assert_holds({"source": flat_files("source"), "again": flat_files("again")})


def test_ids_that_differ_in_case_are_two_images(world: World, place: Place) -> None:
    upper, lower = place.plant("Ab", seed=1), place.plant("aB", seed=2)
    world.client.copy(f"{place.name}/Ab", f"{place.name}/AB").wait()
    world.client.copy(f"{place.name}/aB", f"{place.name}/ab").wait()
    assert_same_disk(upper, place.descriptor("AB"))
    assert_same_disk(lower, place.descriptor("ab"))
