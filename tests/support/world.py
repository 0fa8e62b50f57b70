"""A running sidecar with a datastore of each layout, looked at from both sides: its API, and the disk."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from protos.images.v1.datastore_service_pb2_grpc import DatastoreServiceStub
from protos.images.v1.image_service_pb2_grpc import ImageServiceStub
from protos.images.v1.staging_service_pb2_grpc import StagingServiceStub
from protos.images.v1.types_pb2 import (
    IMAGE_STATE_INCOMPLETE,
    IMAGE_STATE_TOMBSTONED,
    IMAGE_STATE_VALID,
    Image,
    ImageRef,
)
from sidecar.client import SidecarClient
from tests.support.places import LAYOUTS, Place
from tests.support.processes import Sidecar, wait_until

ALL_STATES = (IMAGE_STATE_VALID, IMAGE_STATE_INCOMPLETE, IMAGE_STATE_TOMBSTONED)
# The promise about changes that others make to a local datastore.
NOTICED_SECONDS = 5.0


def make_places(directory: Path) -> dict[str, Place]:
    places = {name: Place(name, layout, directory / name) for name, layout in LAYOUTS.items()}
    for place in places.values():
        place.root.mkdir(parents=True)
    return places


def datastore_flags(places: Iterable[Place]) -> list[str]:
    return [f"{place.name}={place.root},layout={place.layout}" for place in places]


@dataclass
class World:
    """The sidecar, its client, raw stubs for what the client would not send, and the datastores' roots."""

    sidecar: Sidecar
    client: SidecarClient
    channel: grpc.Channel
    places: dict[str, Place]
    images: ImageServiceStub = field(init=False)
    staging: StagingServiceStub = field(init=False)
    datastores: DatastoreServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.images = ImageServiceStub(self.channel)
        self.staging = StagingServiceStub(self.channel)
        self.datastores = DatastoreServiceStub(self.channel)

    def listed(self, datastore: str = "") -> dict[str, Image]:
        """What the sidecar lists now, of all states, by DATASTORE/IMAGE."""
        return {text(image.ref): image for image in self.client.images(datastore, states=ALL_STATES)}

    def wait_listed(self, *refs: str) -> None:
        """Waits until images that were put there by hand are known."""
        wait_until(lambda: all(self._is_known(ref) for ref in refs), f"{refs} are listed", NOTICED_SECONDS)

    def _is_known(self, ref: str) -> bool:
        image = self.listed().get(ref)
        if image is None or image.state != IMAGE_STATE_VALID:
            return False
        return image.details_known or self.places[image.ref.datastore].layout == "vsan"

    def open_datastore_files(self) -> list[str]:
        """What the sidecar has open on the datastores, but for their roots."""
        found = []
        directory = f"/proc/{self.sidecar.pid}/fd"
        for number in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                path = os.readlink(f"{directory}/{number}")
                found += [path for place in self.places.values() if path.startswith(f"{place.root}/")]
        return found

    def snapshot(self) -> dict[str, Mapping[str, object]]:
        return {name: place.snapshot() for name, place in self.places.items()}

    def assert_tidy(self) -> None:
        """Nothing is left of any operation: on the disk, and of open files. Calls that were cancelled may still end."""
        leftovers = {name: place.leftovers() for name, place in self.places.items()}
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not any(place.leftovers() for place in self.places.values()), "no leftovers", 5)
        leftovers = {name: found for name, place in self.places.items() if (found := place.leftovers())}
        assert not leftovers
        wait_until(lambda: not self.open_datastore_files(), f"no open files, now {self.open_datastore_files()}", 5)

    def clear(self) -> None:
        """Takes every image away by hand, and waits until the sidecar knows."""
        for place in self.places.values():
            place.clear()
        wait_until(lambda: not self.listed(), "the datastores are empty")


@contextlib.contextmanager
def running_world(directory: Path, *, config: str = "") -> Iterator[World]:
    """`config`: TOML besides the datastores, such as `[limits]`."""
    places = make_places(directory)
    with running_sidecar(directory, places, config, datastore_flags(places.values())) as world:
        yield world


@contextlib.contextmanager
def running_sidecar(
    directory: Path, places: dict[str, Place], config: str, datastores: Iterable[str] = ()
) -> Iterator[World]:
    """A sidecar of these places, which are among `config` and the flags `datastores`."""
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(directory / "run", *datastores, config=config))
        client = stack.enter_context(sidecar.client())
        channel = stack.enter_context(grpc.insecure_channel(sidecar.address))
        yield World(sidecar, client, channel, places)


def text(ref: ImageRef) -> str:
    return f"{ref.datastore}/{ref.image_id}"


def make_ref(name: str) -> ImageRef:
    """Of any DATASTORE/IMAGE, also one that the client would refuse to send."""
    datastore, _, image_id = name.partition("/")
    return ImageRef(datastore=datastore, image_id=image_id)


def fault(call: object) -> tuple[str, str, str]:
    """The gRPC code, the reason and the message of a call that failed: an RpcError."""
    assert isinstance(call, grpc.RpcError) and isinstance(call, grpc.Call)
    status = rpc_status.from_call(call)
    info = error_details_pb2.ErrorInfo()
    if status is None or not status.details or not status.details[0].Unpack(info):
        return call.code().name, "", call.details() or ""
    assert info.domain == "images.v1"
    return call.code().name, info.reason, call.details() or ""


class Watcher:
    """Follows the images in a thread of its own, as a client does that shows what there is."""

    def __init__(self, client: SidecarClient, datastore: str = "", resume_token: str = "") -> None:
        self._call = client.watch(datastore, resume_token=resume_token)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.images: dict[str, Image] = {}
        self.seen: list[str] = []  # every image told, in order
        self.removed: list[str] = []
        self.datastores: set[str] = set()
        self.snapshots = 0
        self.answers = 0
        self.token = ""

    def _run(self) -> None:
        for answer in self._call:
            if answer.snapshot_start:
                self.images.clear()
            for image in answer.images:
                self.images[text(image.ref)] = image
                self.seen.append(text(image.ref))
            for ref in answer.removed:
                self.images.pop(text(ref), None)
                self.removed.append(text(ref))
            self.datastores |= {datastore.name for datastore in answer.datastores}
            self.token = answer.resume_token or self.token
            self.snapshots += answer.snapshot_complete
            self.answers += 1

    def state(self, name: str) -> int:
        image = self.images.get(name)
        return image.state if image is not None else 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call.cancel()
        self._thread.join(10)
        assert not self._thread.is_alive()
