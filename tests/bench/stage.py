"""Where a benchmark takes place: a datastore on a file system of its own, and the ways to see it."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from sidecar.client import SidecarClient
from tests.bench.command import progress
from tests.bench.disks import Disk
from tests.bench.filesystems import file_system
from tests.support.processes import Mount, Sidecar, is_mounted, run, wait_until

OURS, BINDFS, RAW = "image-mount", "bindfs", "raw directory"


class Stage:
    """The datastore is called as the kind of its file system is, in the layout that a new one has."""

    def __init__(self, stack: ExitStack, directory: Path, kind: str) -> None:
        self._stack = stack
        self.directory = directory
        self.kind = kind
        self.file_system = directory / kind
        self.root = self.file_system / "images"
        self.root.mkdir()
        self.sidecar = Sidecar(directory / "run", f"{kind}={self.root}")
        self.client: SidecarClient

    def start(self, images: int = 0) -> None:
        """Starts the sidecar, and waits until it knows so many images, which other programs made."""
        self._stack.callback(self.sidecar.stop)  # also when something ends the start
        self.sidecar.start()
        self.client = self._stack.enter_context(self.sidecar.client())
        wait_until(lambda: self.client.datastore(self.kind).image_count == images, f"{images} images are known", 300)

    def make_image(self, disk: Disk) -> None:
        with self.client.create_staging(self.ref(disk.name)) as staging:
            disk.make(self.root / staging.directory)
            staging.commit()

    def ref(self, image_id: str) -> str:
        return f"{self.kind}/{image_id}"

    def image_directory(self, image_id: str) -> Path:
        return self.root / self.client.image(self.ref(image_id)).directory

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Mount]:
        """A new mount of the images."""
        mount = Mount(self.directory / "mnt", self.sidecar.address)
        with ExitStack() as stack:
            stack.callback(mount.stop)
            yield mount.start()

    @contextlib.contextmanager
    def shown(self, how: str) -> Iterator[Path]:
        """The datastore's directory as it is seen that way, in a new mount where it takes one."""
        if how == OURS:
            with self.mounted() as mount:
                yield mount.path / self.kind
        elif how == BINDFS:
            with _bindfs(self.file_system, self.directory / "bindfs") as path:
                yield path / self.root.name
        else:
            yield self.root

    def settle(self) -> None:
        """Nothing is left to write."""
        subprocess.run(["sync", "-f", self.root], check=True)


@contextlib.contextmanager
def stage(kind: str, parent: Path, size: int) -> Iterator[Stage]:
    """A stage on a new file system of that kind and size, in a directory below `parent`; all gone afterwards."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="images-bench-", dir=parent)))
        progress(f"{kind}: making the file system")
        stack.enter_context(file_system(kind, directory, size))
        yield Stage(stack, directory, kind)


@contextlib.contextmanager
def _bindfs(source: Path, mountpoint: Path) -> Iterator[Path]:
    """As it comes: with no option that would make it faster or slower."""
    mountpoint.mkdir(exist_ok=True)
    process = subprocess.Popen(["bindfs", "-f", source, mountpoint], stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_mounted(mountpoint), "bindfs has mounted")
        yield mountpoint
    finally:
        if is_mounted(mountpoint):
            run("umount", mountpoint, check=False)
        if is_mounted(mountpoint):
            run("umount", "--lazy", mountpoint)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
