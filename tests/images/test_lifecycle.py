"""The life of an image, on every layout, through the real API of a real sidecar."""

from collections.abc import Callable
from pathlib import Path

import pytest

from protos.images.v1.types_pb2 import IMAGE_STATE_TOMBSTONED, IMAGE_STATE_VALID
from sidecar import errors
from sidecar.client import SidecarClient
from tests.support.disks import assert_same_disk

DATASTORES = ("one", "two", "three")


def exported(client: SidecarClient, tmp_path: Path, ref: str) -> Path:
    datastore = {store.name: Path(store.root_path) for store in client.datastores()}[ref.split("/")[0]]
    return datastore / client.image(ref).directory / f"{ref.split('/')[1]}.vmdk"


@pytest.mark.parametrize("source", DATASTORES)
@pytest.mark.parametrize("destination", DATASTORES)
def test_a_copy_has_the_bytes_of_its_source(
    client: SidecarClient, make_image: Callable[[str], Path], tmp_path: Path, source: str, destination: str
) -> None:
    original = make_image(f"{source}/a")
    image = client.copy(f"{source}/a", f"{destination}/b").wait()
    assert image.state == IMAGE_STATE_VALID
    assert_same_disk(original, exported(client, tmp_path, f"{destination}/b"))


@pytest.mark.parametrize("datastore", DATASTORES)
def test_a_deleted_image_is_hidden_restorable_and_then_purged(
    client: SidecarClient, make_image: Callable[[str], Path], tmp_path: Path, datastore: str
) -> None:
    original = make_image(f"{datastore}/a")
    client.delete(f"{datastore}/a")
    assert list(client.images(datastore)) == []
    assert [image.ref.image_id for image in client.images(datastore, states=[IMAGE_STATE_TOMBSTONED])] == ["a"]
    with pytest.raises(errors.ImageTombstoned):
        client.touch(f"{datastore}/a")
    with pytest.raises(errors.ImageTombstoned):
        client.copy(f"{datastore}/a", f"{datastore}/b").wait()
    client.restore(f"{datastore}/a")
    assert_same_disk(original, exported(client, tmp_path, f"{datastore}/a"))
    client.delete(f"{datastore}/a")
    assert client.purge(f"{datastore}/a") > 0
    with pytest.raises(errors.ImageNotFound):
        client.image(f"{datastore}/a")
    assert [image.ref.image_id for image in client.images(datastore, states=[IMAGE_STATE_TOMBSTONED])] == []
