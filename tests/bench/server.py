"""Where a server is asked: the simulator with datastores that a sidecar reaches by its API alone."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from sidecar.client import SidecarClient
from tests.support.places import Place
from tests.support.processes import Sidecar
from tests.support.vcsim import Vcsim


class Served:
    """The simulator runs; the sidecar is to be started. `rescan`: seconds between two listings."""

    def __init__(self, stack: ExitStack, directory: Path, names: Sequence[str]) -> None:
        self._stack = stack
        self.directory = directory
        self.places = {name: Place(name, "compound", directory / name) for name in names}
        for place in self.places.values():
            place.root.mkdir()
        self.simulator = stack.enter_context(
            Vcsim(directory / "vcsim", {name: place.root for name, place in self.places.items()})
        )

    @contextlib.contextmanager
    def sidecar(self, rescan: int = 3600) -> Iterator[Sidecar]:
        """Does nothing by itself but list, and look at the state."""
        config = self.simulator.configuration()
        config += "[maintenance]\nreap_interval_seconds = 0\npurge_interval_seconds = 0\n"
        for name in self.places:
            config += f'[datastore.{name}]\ntype = "vsphere"\nserver = "sim"\nlayout = "compound"\nreserve = 0\n'
            config += f"rescan_seconds = {rescan}\n"
        with ExitStack() as stack:
            sidecar = Sidecar(self.directory / "run", config=config, log_level="info")
            stack.callback(sidecar.stop)
            yield sidecar.start()


@contextlib.contextmanager
def served(parent: Path, *names: str) -> Iterator[Served]:
    """In a directory below `parent`, gone afterwards."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="images-bench-", dir=parent))
        yield Served(stack, Path(directory), names)


def knows(client: SidecarClient, images: int, *, details: bool = False) -> bool:
    """Whether so many images are listed, by what is known: to ask for one datastore asks the server."""
    if sum(each.image_count for each in client.datastores()) != images:
        return False
    return not details or all(image.details_known for image in client.images())
