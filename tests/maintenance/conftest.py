"""A store of each layout on a real directory, under a clock that the test moves, and VMs that the test makes up."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sidecar.datastores.posix import PosixDatastore
from sidecar.errors import ImagesError
from sidecar.images.image import ImageKey
from sidecar.images.layouts import LAYOUTS as LAYOUTS_BY_ID
from sidecar.images.runs import Clock, Run, Runs, RunStatus
from sidecar.images.scan import ScanTally, scan
from sidecar.images.store import ImageStore
from sidecar.images.sweep import SweepResult, SweepTally, sweep
from sidecar.images.vm_scan import Uses, VmSource
from tests.support.places import LAYOUTS, MARKER, TIMESTAMP, Place

NOW = 2_000_000_000  # seconds; files that a test makes are of the real time, which is earlier
DAY = 86_400


@dataclass
class OwnClock:
    """Time passes when somebody waits for it, or the test says so."""

    seconds: float = float(NOW)
    waits: list[float] = field(default_factory=list)
    on_wait: Callable[[], object] = lambda: None

    def now_ns(self) -> int:
        return int(self.seconds * 1e9)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        self.seconds += seconds
        self.on_wait()
        return event.is_set()

    def as_clock(self) -> Clock:
        return Clock(self.now_ns, lambda: self.seconds, self.wait)


@dataclass
class Vms:
    """VMs by datastore and directory, each with the images that it uses, or with the error that reading it gives."""

    found: dict[tuple[str, str], Sequence[str] | ImagesError] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    on_read: Callable[[str], object] = lambda directory: None

    def directories(self, store: ImageStore) -> list[str]:
        return [directory for name, directory in self.found if name == store.datastore.name]

    def uses(self, stores: Sequence[ImageStore], store: ImageStore, directory: str) -> Uses:
        self.read.append(directory)
        self.on_read(directory)
        images = self.found.get((store.datastore.name, directory), ())
        if isinstance(images, ImagesError):
            raise images
        return {ImageKey(*image.split("/")): [f"VM {directory}"] for image in images}

    def source(self) -> VmSource:
        return VmSource(self.directories, self.uses)


@dataclass
class Site:
    """One datastore, as the maintenance sees it and as it is on the disk."""

    place: Place
    store: ImageStore
    clock: OwnClock
    vms: Vms

    def plant(self, image_id: str, *, used_ago: float = DAY, marked_ago: float | None = None) -> Path:
        """An image that was touched, and marked, so many seconds ago; its directory."""
        self.place.plant(image_id, size=128 << 10, data=((0, 4096),))
        self.set_used(image_id, used_ago)
        if marked_ago is not None:
            self.place.file(image_id, MARKER).write_text(str(int(self.clock.seconds - marked_ago)))
        return self.place.directory(image_id)

    def set_used(self, image_id: str, ago: float, name: str = TIMESTAMP) -> None:
        path = self.place.file(image_id, name)
        path.touch()
        os.utime(path, (self.clock.seconds - ago, self.clock.seconds - ago))

    def set_age(self, path: Path, ago: float) -> None:
        """Of all that is below, too."""
        for each in [*path.rglob("*"), path]:
            os.utime(each, (self.clock.seconds - ago, self.clock.seconds - ago))

    def run(self, timeout: float = 10 * DAY) -> Run:
        return Run("run", timeout, self.clock.as_clock())

    def scan(self, run: Run | None = None, *, rate: float = 1e6, others: Sequence["Site"] = ()) -> ScanTally:
        self.store.share_host([self.store, *(other.store for other in others)])
        tally = ScanTally()
        scan(self.store, self.vms.source(), run or self.run(), tally, vm_rate=rate, image_rate=rate)
        return tally

    def sweep(
        self, *targets: str, run: Run | None = None, rate: float = 1e6, grace: float = 60, dry_run: bool = False
    ) -> dict[str, SweepResult]:
        tally = SweepTally(dry_run)
        sweep(
            self.store,
            self.vms.source(),
            run or self.run(),
            tally,
            targets=targets,
            rate=rate,
            grace=grace,
        )
        assert tally.deleted == sum(result.deleted for result in tally.results)
        return {result.image_id: result for result in tally.results}

    def marker(self, image_id: str) -> str | None:
        path = self.place.file(image_id, MARKER)
        return path.read_text() if path.exists() else None


@pytest.fixture
def clock() -> OwnClock:
    return OwnClock()


@pytest.fixture
def make_site(tmp_path: Path, clock: OwnClock) -> Iterator[Callable[[str], Site]]:
    datastores: list[PosixDatastore] = []
    vms = Vms()

    def make(name: str) -> Site:
        place = Place(name, LAYOUTS[name], tmp_path / name)
        place.root.mkdir()
        datastores.append(PosixDatastore(name, str(place.root)))
        layout = LAYOUTS_BY_ID[place.layout]
        layout.prepare(datastores[-1])
        store = ImageStore(datastores[-1], layout, lock_timeout=0, clock=clock.now_ns)
        return Site(place, store, clock, vms)

    yield make
    for datastore in datastores:
        datastore.close()


@pytest.fixture(params=LAYOUTS)
def site(request: pytest.FixtureRequest, make_site: Callable[[str], Site]) -> Site:
    """Of each layout in turn."""
    return make_site(request.param)


def wait_ended(runs: Runs[object]) -> RunStatus:
    """Joins the thread of the run: it ends by itself, or was told to."""
    assert runs._thread
    runs._thread.join(10)
    current = runs.current()
    assert current
    return current[0]
