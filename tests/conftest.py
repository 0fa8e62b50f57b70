"""Fixtures: real sidecars and mounts on temporary directories."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from sidecar.client import SidecarClient
from tests.support.disks import make_disk
from tests.support.processes import Mount, Sidecar

# The same examples in every run, so that CI says the same twice; other ones with --hypothesis-profile=default.
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")

# Ignored where the tests run in the background of a script, and then in all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

LAYOUTS = ("compound", "sharded", "vsan")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opens ends with it, in the opposite order."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def sidecar(tmp_path: Path, stack: ExitStack) -> Sidecar:
    """A sidecar with one datastore of each layout: one (compound), two (sharded), three (vsan)."""
    datastores = []
    for name, layout in zip(("one", "two", "three"), LAYOUTS, strict=True):
        (tmp_path / name).mkdir()
        datastores.append(f"{name}={tmp_path / name},layout={layout}")
    return stack.enter_context(Sidecar(tmp_path / "run", *datastores))


@pytest.fixture
def client(sidecar: Sidecar, stack: ExitStack) -> SidecarClient:
    return stack.enter_context(sidecar.client())


@pytest.fixture
def mount(sidecar: Sidecar, tmp_path: Path, stack: ExitStack) -> Mount:
    return stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The descriptor of a small flat disk with holes."""
    return make_disk(tmp_path / "disk")


@pytest.fixture
def make_image(client: SidecarClient, tmp_path: Path) -> Callable[[str], Path]:
    """Imports a small flat disk as the image of that name; returns the descriptor that it came from."""
    from tests.support.disks import import_image

    def make(ref: str) -> Path:
        descriptor = make_disk(tmp_path / "sources" / ref.replace("/", "-"), "disk.vmdk", seed=sum(ref.encode()))
        import_image(client, ref, descriptor)
        return descriptor

    return make
