"""A datastore that is slow and does not hang: what takes long there is no reason to refuse what does not."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from protos.images.v1 import image_service_pb2 as image_wire
from protos.images.v1.image_service_pb2_grpc import ImageServiceStub
from protos.images.v1.types_pb2 import ImageRef
from sidecar.client import SidecarClient, Staging
from sidecar.datastores.posix import PosixDatastore
from tests.support.inside import serving
from tests.support.places import Place, flat_files, write_flat_disk
from tests.support.processes import wait_until

QUICK = 4.0  # seconds: less than after which the sidecar takes small calls that do not come back for hanging
LIMIT = 30.0


class Slow(PosixDatastore):
    """Makes nothing durable and frees nothing below the paths that begin so, until it is let go on."""

    slow = "nothing"

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name, path)
        self.go_on = threading.Event()
        self.waiting = threading.Semaphore(0)

    def sync_file(self, path: str) -> None:
        self._wait(path)
        super().sync_file(path)

    def remove_tree(self, path: str) -> int:
        self._wait(path)
        return super().remove_tree(path)

    def _wait(self, path: str) -> None:
        if path.startswith(self.slow):
            self.waiting.release()
            assert self.go_on.wait(LIMIT)


class Inside:
    def __init__(self, place: Place, datastore: Slow, client: SidecarClient, quick: SidecarClient) -> None:
        self.place, self.datastore, self.client, self.quick = place, datastore, client, quick

    def staged(self, image_id: str) -> Staging:
        staging = self.client.create_staging(f"one/{image_id}")
        write_flat_disk(self.place.root / staging.directory, image_id)
        return staging

    def wait_slow(self) -> None:
        assert self.datastore.waiting.acquire(timeout=LIMIT)


@pytest.fixture
def pool(stack: ExitStack) -> ThreadPoolExecutor:
    return stack.enter_context(ThreadPoolExecutor(8))


@pytest.fixture(params=[1])
def inside(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack, pool: ThreadPoolExecutor) -> Inside:
    """A sidecar with the image one/a, and as many places for calls as the parameter says."""
    place = Place("one", "compound", tmp_path / "one")
    place.root.mkdir()
    place.plant("a")
    datastores: list[Slow] = []

    def make(name: str, path: str) -> Slow:
        datastores.append(Slow(name, path))
        return datastores[0]

    address = stack.enter_context(serving(tmp_path, [place], make, max_calls=request.param))
    clients = [stack.enter_context(SidecarClient(address, timeout=timeout)) for timeout in (LIMIT, QUICK)]
    stack.callback(datastores[0].go_on.set)
    return Inside(place, datastores[0], *clients)


def test_commits_that_take_long_are_no_reason_to_refuse_other_calls(inside: Inside, pool: ThreadPoolExecutor) -> None:
    staging = inside.staged("b")
    inside.datastore.slow = staging.directory
    commit = pool.submit(staging.commit)
    inside.wait_slow()
    inside.quick.image("one/a")
    inside.quick.touch("one/a")
    other = inside.quick.create_staging("one/c")
    other.abort()
    assert not commit.done()
    inside.datastore.go_on.set()
    commit.result(LIMIT)


@pytest.mark.parametrize("force", (False, True))
def test_a_purge_that_takes_long_is_no_reason_to_refuse_other_calls(
    inside: Inside, pool: ThreadPoolExecutor, force: bool
) -> None:
    inside.place.plant("b")
    inside.datastore.slow = "deleted_images/"
    if not force:
        inside.client.delete("one/b")
    purge: Callable[[], object] = (
        (lambda: inside.client.delete("one/b", force=True)) if force else (lambda: inside.client.purge("one/b"))
    )
    running = pool.submit(purge)
    inside.wait_slow()
    inside.quick.image("one/a")
    assert not running.done()
    inside.datastore.go_on.set()
    running.result(LIMIT)


@pytest.mark.parametrize("inside", [2], indirect=True)
@pytest.mark.parametrize("request_ids", (("x", "x"), ("x", "y")))
def test_who_waits_for_the_commit_of_another_call_holds_up_no_third_one(
    inside: Inside, pool: ThreadPoolExecutor, request_ids: tuple[str, str]
) -> None:
    staging, third = inside.staged("b"), inside.staged("c")
    inside.datastore.slow = staging.directory
    first = pool.submit(staging.commit, request_id=request_ids[0])
    inside.wait_slow()
    second = pool.submit(staging.commit, request_id=request_ids[1])
    wait_until(lambda: waits_in("_wait" if request_ids[0] == request_ids[1] else "_outcome"), "it waits for the first")
    pool.submit(third.commit).result(QUICK)
    assert not (first.done() or second.done())
    inside.datastore.go_on.set()
    assert first.result(LIMIT) == second.result(LIMIT)
    inside.place.assert_holds({name: flat_files(name) for name in "abc"})


def waits_in(function: str) -> bool:
    """Whether some thread is in that function of the services or of the staging sessions."""
    return any(function == name for frame in sys._current_frames().values() for name in functions(frame))


def functions(frame: object) -> Iterator[str]:
    while frame is not None:
        code = frame.f_code  # type: ignore[attr-defined]
        if code.co_filename.endswith(("services/requests.py", "images/sessions.py")):
            yield code.co_name
        frame = frame.f_back  # type: ignore[attr-defined]


@pytest.mark.parametrize("inside", [2], indirect=True)
def test_who_waits_for_the_change_of_another_call_holds_up_no_third_one(
    inside: Inside, pool: ThreadPoolExecutor, stack: ExitStack, tmp_path: Path
) -> None:
    inside.place.plant("b")
    channel = stack.enter_context(grpc.insecure_channel(inside.client.address))
    stub = ImageServiceStub(channel)
    touch = image_wire.TouchImageRequest(ref=ImageRef(datastore="one", image_id="b"), request_id="x")
    with inside.place.locked("b"):
        touches = [pool.submit(stub.TouchImage, touch) for _ in range(3)]
        wait_until(lambda: waits_in("_wait"), "they wait for the first")
        for _ in range(5):
            inside.quick.image("one/a")
    assert len({touched.result(LIMIT).touch_time.nanos for touched in touches}) == 1
