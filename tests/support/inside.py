"""A sidecar in the process of the test, for what only its inside can be made to do: a disk that fails or is slow."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from sidecar.config import DatastoreConfig, Limits, SidecarConfig
from sidecar.datastores.interface import Datastore
from sidecar.datastores.kinds import DATASTORE_TYPES
from sidecar.server import SidecarServer
from sidecar.wiring import build
from tests.support.places import Place


@contextmanager
def serving(
    directory: Path, places: Iterable[Place], make: Callable[[str, str], Datastore], **limits: Any
) -> Iterator[str]:
    """The address of one that serves these datastores, each opened by `make` with its name and path."""
    for place in places:
        place.root.mkdir(exist_ok=True)
    config = SidecarConfig(
        listen=f"unix:{directory}/inside.sock",
        datastores=tuple(
            DatastoreConfig.model_validate({"name": p.name, "path": str(p.root), "layout": p.layout}) for p in places
        ),
        limits=Limits(**{"shutdown_seconds": 10.0, **limits}),
    )
    with mock.patch.dict(DATASTORE_TYPES, {"local": lambda name, path, *_: make(name, path)}):
        parts = build(config)
    server = SidecarServer(parts.services, config, interrupt=parts.interrupt)
    try:
        server.start()
        try:
            yield server.address
        finally:
            parts.end_streams()
            server.stop()
    finally:
        parts.close()
