"""A caller says how long it waits for an image's lock: never longer than the sidecar would, and 30 s by itself."""

import math
import time
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from protos.images.v1 import image_service_pb2 as wire
from protos.images.v1 import staging_service_pb2 as staging_wire
from sidecar import errors
from tests.images.test_locking import CHANGES, Change, plant_all
from tests.support.places import Place, flat_files
from tests.support.world import World, fault, make_ref

CONFIG = "[limits]\nlock_timeout_seconds = 30\n"
SOON = 10.0  # seconds, on a machine that is busy with other tests


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_who_waits_less_is_refused_sooner_and_nothing_is_changed(world: World, place: Place, change: Change) -> None:
    image_id, call = change
    ref = f"{place.name}/{image_id}"
    there = plant_all(place)
    with place.locked(image_id):
        for wait in (0.2, 0.0):
            begun = time.monotonic()
            with pytest.raises(errors.LockTimeout, match=rf"is held by .* gave up after {wait:g} s"):
                call(world.client, ref, wait)
            assert time.monotonic() - begun < SOON
    place.assert_holds(there)
    call(world.client, ref, 0.0)  # a lock that nobody holds is not waited for


INVALID = {
    "negative": Duration(seconds=-1),
    "negative part": Duration(nanos=-1),
    "more than a second of ns": Duration(nanos=10**9),
    "not of this world": Duration(seconds=1 << 62),
}
CALLS: dict[str, Callable[[World, Duration], object]] = {
    "touch": lambda world, wait: world.images.TouchImage(
        wire.TouchImageRequest(ref=make_ref("one/a"), lock_timeout=wait)
    ),
    "delete": lambda world, wait: world.images.DeleteImage(
        wire.DeleteImageRequest(ref=make_ref("one/a"), lock_timeout=wait)
    ),
    "update": lambda world, wait: world.images.UpdateMetadata(
        wire.UpdateMetadataRequest(ref=make_ref("one/a"), files={"x": b"x"}, lock_timeout=wait)
    ),
    "restore": lambda world, wait: world.images.RestoreImage(
        wire.RestoreImageRequest(ref=make_ref("one/a"), lock_timeout=wait)
    ),
    "purge": lambda world, wait: world.images.PurgeImage(
        wire.PurgeImageRequest(ref=make_ref("one/a"), lock_timeout=wait)
    ),
    "validate": lambda world, wait: world.images.ValidateImage(
        wire.ValidateImageRequest(ref=make_ref("one/a"), repair=True, lock_timeout=wait)
    ),
    "copy": lambda world, wait: list(
        world.images.CopyImage(
            wire.CopyImageRequest(source=make_ref("one/a"), destination=make_ref("one/b"), lock_timeout=wait)
        )
    ),
    "commit": lambda world, wait: world.staging.CommitStaging(
        staging_wire.CommitStagingRequest(staging_id="x", lock_timeout=wait)
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("wait", INVALID.values(), ids=INVALID)
def test_what_is_no_length_of_time_is_refused(
    world: World, wait: Duration, call: Callable[[World, Duration], object]
) -> None:
    place = world.places["one"]
    place.plant("a")
    with pytest.raises(grpc.RpcError) as refused:
        call(world, wait)
    code, reason, message = fault(refused.value)
    assert (code, reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert "lock_timeout is" in message
    place.assert_holds({"a": flat_files("a")})


@pytest.mark.parametrize("wait", [-1.0, math.inf, math.nan, 1e300])
def test_the_client_says_so_too(world: World, wait: float) -> None:
    world.places["one"].plant("a")
    with pytest.raises(errors.InvalidRequest):
        world.client.touch("one/a", lock_timeout=wait)
