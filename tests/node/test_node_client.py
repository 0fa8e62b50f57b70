"""The contract holds for others than Python: a Node.js client that has no .proto file and asks the server for it."""

import fcntl
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from protos.images.v1.types_pb2 import IMAGE_STATE_TOMBSTONED
from sidecar import errors
from sidecar.client import SidecarClient
from tests.support.disks import assert_same_disk
from tests.support.processes import Sidecar, background, run

CLIENT = Path(__file__).with_name("call.js")
IMAGES = "images.v1.ImageService"

Answers = list[dict[str, Any]]


def ref(name: str) -> dict[str, str]:
    datastore, image_id = name.split("/")
    return {"datastore": datastore, "image_id": image_id}


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    if not (CLIENT.parent / "node_modules").is_dir():
        pytest.fail("tests/node/node_modules is not there: run scripts/setup")


@pytest.fixture
def node(sidecar: Sidecar) -> Callable[..., Answers]:
    """Calls a method; returns the answers. An error of the server is the last of them, {"error": …}."""

    def call(method: str, request: dict[str, Any]) -> Answers:
        result = run("node", CLIENT, sidecar.address, method, json.dumps(request), check=False, timeout=30)
        answers = [json.loads(line) for line in result.stdout.splitlines()]
        failed = bool(answers) and "error" in answers[-1]
        assert result.returncode == int(failed), result.stderr
        return answers

    return call


def test_reflection_offers_every_service_of_the_contract(sidecar: Sidecar) -> None:
    services = json.loads(run("node", CLIENT, sidecar.address).stdout)
    assert {"images.v1.ImageService", "images.v1.StagingService", "images.v1.DatastoreService"} <= set(services)


def test_a_client_that_is_not_python_lists_copies_and_deletes(
    node: Callable[..., Answers], client: SidecarClient, make_image: Callable[[str], Path]
) -> None:
    original = make_image("one/a")
    (page,) = node(f"{IMAGES}/ListImages", {"datastore": "one"})
    assert [image["ref"] for image in page["images"]] == [ref("one/a")]
    assert page["images"][0]["state"] == "IMAGE_STATE_VALID"

    *_, last = node(f"{IMAGES}/CopyImage", {"source": ref("one/a"), "destination": ref("two/b")})
    assert last["done_bytes"] == last["total_bytes"]
    assert int(last["total_bytes"]) == sum(file.size_bytes for file in client.image("one/a").files)
    assert last["image"]["ref"] == ref("two/b")
    root = Path(client.datastore("two").root_path)
    assert_same_disk(original, root / last["image"]["directory"] / "b.vmdk")

    assert node(f"{IMAGES}/DeleteImage", {"ref": ref("two/b")}) == [{}]
    assert client.image("two/b").state == IMAGE_STATE_TOMBSTONED
    assert node(f"{IMAGES}/ListImages", {"datastore": "two"}) == [{}]


def test_progress_arrives_while_the_copy_runs(
    sidecar: Sidecar, client: SidecarClient, make_image: Callable[[str], Path], tmp_path: Path
) -> None:
    make_image("one/a")
    request = json.dumps({"source": ref("one/a"), "destination": ref("one/b")})
    with ExitStack() as stack:
        # Whoever else holds the image's lock keeps the copy from its end.
        lock = stack.enter_context((tmp_path / "one/image_b.ec_lock").open("wb"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        copy = stack.enter_context(background("node", CLIENT, sidecar.address, f"{IMAGES}/CopyImage", request))
        assert copy.stdout is not None
        progress = json.loads(copy.stdout.readline())
        assert "image" not in progress
        with pytest.raises(errors.ImageNotFound):
            client.image("one/b")
        fcntl.flock(lock, fcntl.LOCK_UN)
        *_, last = [json.loads(line) for line in copy.stdout]
    assert last["image"]["ref"] == ref("one/b")
    assert last["done_bytes"] == last["total_bytes"]


@pytest.mark.parametrize(
    ("method", "request_", "code", "reason"),
    [
        ("GetImage", {"ref": ref("one/absent")}, "NOT_FOUND", "IMAGE_NOT_FOUND"),
        ("GetImage", {"ref": ref("elsewhere/a")}, "NOT_FOUND", "DATASTORE_NOT_FOUND"),
        ("DeleteImage", {"ref": ref("one/.a")}, "INVALID_ARGUMENT", "INVALID_IMAGE_ID"),
        ("RestoreImage", {"ref": ref("one/a")}, "FAILED_PRECONDITION", "IMAGE_NOT_TOMBSTONED"),
        # Of a call that streams, the error comes in place of the first answer.
        ("CopyImage", {"source": ref("one/a"), "destination": ref("one/a")}, "ALREADY_EXISTS", "IMAGE_ALREADY_EXISTS"),
    ],
)
def test_a_wrong_call_gets_a_status_and_a_reason_that_another_language_can_read(
    node: Callable[..., Answers],
    make_image: Callable[[str], Path],
    method: str,
    request_: dict[str, Any],
    code: str,
    reason: str,
) -> None:
    make_image("one/a")
    (answer,) = node(f"{IMAGES}/{method}", request_)
    error = answer["error"]
    assert (error["code"], error["reason"], error["domain"]) == (code, reason, "images.v1")
    assert error["message"]


def test_a_sidecar_that_is_away_is_told_from_one_that_refuses(sidecar: Sidecar, node: Callable[..., Answers]) -> None:
    sidecar.stop()
    (answer,) = node(f"{IMAGES}/ListImages", {})
    assert answer["error"]["code"] == "UNAVAILABLE"
    assert "reason" not in answer["error"]
