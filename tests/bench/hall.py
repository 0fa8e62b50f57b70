"""Where a load takes place: a sidecar with two datastores, on one of which copies share their extents."""

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from sidecar.client import SidecarClient
from tests.bench.command import progress
from tests.bench.disks import Disk, read_data
from tests.bench.filesystems import file_system
from tests.bench.planted import PREFIX, plant
from tests.bench.sizes import LoadSizes
from tests.support.places import Place, flat_files
from tests.support.processes import Sidecar, run, wait_until

# The datastores, named for their file systems.
SHARED, WRITTEN = "xfs", "ext4"


class Hall:
    """A running sidecar; each datastore has the disks, and many small images that can be touched."""

    def __init__(self, sidecar: Sidecar, client: SidecarClient, roots: dict[str, Path], images: int) -> None:
        self.sidecar = sidecar
        self.client = client
        self.places = {name: Place(name, "compound", root) for name, root in roots.items()}
        # For copies without the sidecar.
        self.raw_directory = roots[WRITTEN].parent / "raw"
        self.raw_directory.mkdir()
        self._planted = [f"{PREFIX}{number:06d}" for number in range(images)]
        self._disks: list[str] = []

    def make_image(self, disk: Disk) -> None:
        """On both datastores."""
        for name, place in self.places.items():
            with self.client.create_staging(f"{name}/{disk.name}") as staging:
                disk.make(place.root / staging.directory)
                staging.commit()
        self._disks.append(disk.name)

    def planted(self, datastore: str) -> dict[str, Path]:
        """The directories of the small images."""
        return {f"{datastore}/{image_id}": self.places[datastore].directory(image_id) for image_id in self._planted}

    def image_directory(self, datastore: str, image_id: str) -> Path:
        return self.places[datastore].directory(image_id)

    def settle(self) -> None:
        """Nothing is left to write, and what is copied is in the page cache."""
        for place in self.places.values():
            run("sync", "-f", place.root)
            for name in self._disks:
                read_data(place.directory(name))

    def copies_run(self, raw: bool) -> bool:
        return any(self.raw_directory.iterdir()) if raw else bool(self.places[WRITTEN].staging_directories())

    def assert_tidy(self) -> None:
        """The datastores hold what was put there, and nothing that a client left."""
        for place in self.places.values():
            expected = {image_id: flat_files(image_id) for image_id in (*self._planted, *self._disks)}
            with contextlib.suppress(AssertionError):
                wait_until(partial(place.holds, expected), "nothing else is there", 10)
            place.assert_holds(expected)


def _knows(client: SidecarClient, datastore: str, images: int) -> bool:
    return client.datastore(datastore).image_count == images


@contextlib.contextmanager
def hall(parent: Path, sizes: LoadSizes) -> Iterator[Hall]:
    """On new file systems, in a directory below `parent`; all gone afterwards."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="images-bench-", dir=parent)))
        roots = {}
        for kind, size in ((SHARED, sizes.shared_bytes), (WRITTEN, sizes.written_bytes)):
            progress(f"{kind}: making the file system")
            roots[kind] = stack.enter_context(file_system(kind, directory, size)) / "images"
            roots[kind].mkdir()
            plant(roots[kind], sizes.images)
        sidecar = Sidecar(directory / "run", *(f"{name}={root}" for name, root in roots.items()), log_level="info")
        stack.callback(sidecar.stop)  # also when something ends the start
        sidecar.start()
        client = stack.enter_context(sidecar.client(timeout=60.0))
        for name in roots:
            wait_until(partial(_knows, client, name, sizes.images), f"all of {name} is known", 60)
        made = Hall(sidecar, client, roots, sizes.images)
        made.make_image(sizes.small)
        made.make_image(sizes.large)
        yield made
