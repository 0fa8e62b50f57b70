"""The life of an image from its import to its end, on every layout, with nothing on the disk but what must be there."""

from pathlib import Path

from protos.images.v1.types_pb2 import IMAGE_STATE_TOMBSTONED, IMAGE_STATE_VALID
from sidecar.services.messages import timestamp
from tests.support.disks import assert_same_disk, import_image, make_disk
from tests.support.places import LAYOUTS, TIMESTAMP, TOMBSTONE, Place, flat_files
from tests.support.world import World


def test_an_image_lives_from_its_import_to_its_purge(world: World, place: Place, scratch: Path) -> None:
    ref = f"{place.name}/debian-12"
    disk = make_disk(scratch)
    import_image(world.client, ref, disk, companions={"disk.ecv": b'{"os": "debian"}'})
    files = flat_files("debian-12", "debian-12.ecv")
    place.assert_holds({"debian-12": files})
    assert place.file("debian-12", TIMESTAMP).read_bytes() == b""
    assert_same_disk(disk, place.descriptor("debian-12"))
    world.client.touch(ref)
    world.client.update_metadata(ref, files={"debian-12.manifest": b'{"imageType": "CLOUD"}'})
    files |= {"debian-12.manifest"}
    place.assert_holds({"debian-12": files})
    copies = {}
    for name in LAYOUTS:
        assert world.client.copy(ref, f"{name}/copy").wait().state == IMAGE_STATE_VALID
        copies[name] = {"copy": flat_files("copy", "copy.ecv", "copy.manifest")}
    copies[place.name]["debian-12"] = files
    for name, images in copies.items():
        world.places[name].assert_holds(images)
    world.client.delete(ref)
    copies[place.name]["debian-12"] = files | {TOMBSTONE}
    assert world.client.image(ref).state == IMAGE_STATE_TOMBSTONED
    place.assert_holds(copies[place.name])
    world.client.restore(ref)
    world.client.validate(ref)
    world.client.delete(ref)
    place.assert_holds(copies[place.name])
    assert world.client.purge(ref) > 0
    del copies[place.name]["debian-12"]
    for name, images in copies.items():
        world.places[name].assert_holds(images)
        assert_same_disk(disk, world.places[name].descriptor("copy"))


def test_a_time_that_no_message_can_hold_is_told_as_the_nearest() -> None:
    # tmpfs and NFS take any time that they are given; the image must be listed all the same.
    assert timestamp(300_000_000_000 * 10**9).ToJsonString() == "9999-12-31T23:59:59.999999999Z"
    assert timestamp(-(2**63)).ToNanoseconds() == -(2**63)
    assert timestamp(-(10**30)).ToJsonString() == "0001-01-01T00:00:00Z"
