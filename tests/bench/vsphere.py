"""What a vSphere server is asked for, counted by the server, and the time of it against a plain client of its API."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sidecar.client import SidecarClient
from sidecar.datastores.vsphere_api import VsphereApiDatastore
from sidecar.vsphere.connection import Connection, Server
from sidecar.vsphere.credentials import from_file
from sidecar.vsphere.disks import DatastoreAddress
from tests.bench import command, plain
from tests.bench.command import GIB
from tests.bench.counting import COLUMNS, Counted, count, least, settled, without_status
from tests.bench.machine import describe_machine
from tests.bench.planted import plant
from tests.bench.report import Report, Section
from tests.bench.results import COLUMNS as TIME_COLUMNS
from tests.bench.results import Result, at_most, seconds
from tests.bench.rounds import Contender, by_measure, take_turns
from tests.bench.server import Served, knows, served
from tests.bench.sizes import ServerSizes
from tests.support.processes import Mount, imagectl, run, wait_until

NEEDED_BYTES = 2 * GIB
LISTED, COPIED = "listed", "copied"
SEARCHES = "a search for each image"
STREAMED = "download and upload"
OURS = "image-sidecar"


def main(arguments: list[str]) -> int:
    options = command.parser("vsphere", __doc__ or "", needed_bytes=NEEDED_BYTES)
    parsed = command.parse(options, arguments, needed_bytes=NEEDED_BYTES)
    command.raise_priority()
    command.give(measure(parsed.directory, ServerSizes(), parsed.runs), parsed)
    return 0


def measure(parent: Path, sizes: ServerSizes, runs: int) -> Report:
    machine = describe_machine(parent)
    few, many = sizes.files
    counted = count_listing(parent, sizes.images, few, rescans=True)
    counted += count_listing(parent, sizes.images, many, rescans=False)
    counted += count_operations(parent, sizes)
    times = [time_listing(parent, sizes, runs), time_copy(parent, sizes, runs)]
    return Report(
        "vsphere",
        "Requests to a vSphere server",
        COLUMNS,
        [each.row() for each in counted],
        [
            "Datastores that are reached by the API alone, of govmomi's simulator as a vCenter, which counts what it "
            "is asked. It ends a task within the call that begins it, so that one look at each is enough: a real one "
            f"takes some. The least of {sizes.times} times; a copy, an import and a cp -r are of {sizes.small.title}, "
            "two files.",
            f"Times: medians of {runs} runs, the contenders in turn, after a round that does not count. On one "
            "machine: a server that is some milliseconds away makes more of each request.",
            "Listing: from the start of image-sidecar until all images can be listed, its own start among it; the "
            "plain client is pyvmomi in a process that runs, which logs in and asks for one directory after the other.",
            f"Copy of {sizes.large.title}: CopyImage from a client that is connected; the plain client sends on what "
            "it receives, 1 MiB at a time, of descriptor and data.",
        ],
        machine,
        [Section("Times", TIME_COLUMNS, [row for each in times for row in each.rows()])],
    )


def count_listing(parent: Path, images: int, files: int, *, rescans: bool) -> list[Counted]:
    what = f"{images:,} images with {files} files each"
    with served(parent, "one") as where:
        plant(where.places["one"].root, images, files)
        command.progress(f"{what}: made")
        with where.sidecar() as sidecar, sidecar.client() as client:
            wait_until(lambda: knows(client, images), "all are listed", 300)
            listing = without_status(where.simulator.requests())
            del listing["GET /folder"]
            wait_until(lambda: knows(client, images, details=True), "all details are known", 300)
            details = without_status(settled(where.simulator)) - listing
            ls = without_status(count(where.simulator, lambda: imagectl(sidecar.address, "ls")))
        found = [Counted(f"first listing, {what}", listing), Counted("their details, once, afterwards", details)]
        if not rescans:
            return found
        with where.sidecar(rescan=2) as sidecar, sidecar.client() as client:
            wait_until(lambda: knows(client, images, details=True), "all details are known", 300)
            rescan = least([_rescan(where) for _ in range(3)])
        return [*found, Counted("a rescan without changes", rescan), Counted("imagectl ls", ls)]


def _rescan(where: Served) -> Counter[str]:
    def listings() -> int:
        return where.simulator.requests()["SearchDatastoreSubFolders_Task"]

    before, seen = settled(where.simulator), listings()
    wait_until(lambda: listings() > seen, "all is listed again")
    return without_status(settled(where.simulator) - before)


def count_operations(parent: Path, sizes: ServerSizes) -> list[Counted]:
    """In the order of an image's life."""
    with served(parent, "one", "two") as where, where.sidecar() as sidecar, sidecar.client() as client:
        disk = where.directory / sizes.small.name
        disk.mkdir()
        sizes.small.make(disk)
        descriptor = disk / f"{sizes.small.name}.vmdk"
        wait_until(lambda: bool(where.simulator.requests()["SearchDatastoreSubFolders_Task"]), "they are looked at")
        found: dict[str, list[Counter[str]]] = {}
        with Mount(where.directory / "mnt", sidecar.address) as mount:
            images = mount.path / "one"

            def operate(what: str, operation: Callable[[], object]) -> None:
                found.setdefault(what, []).append(count(where.simulator, operation))

            def ctl(*arguments: str | Path) -> None:
                operate(f"imagectl {arguments[0]}", lambda: imagectl(sidecar.address, *arguments))

            def copy_through(source: str, name: str) -> None:
                run("cp", "-r", images / source, images / name)
                wait_until(lambda: _is_known(client, name), "the copy is published")

            for number in range(sizes.times):
                name = f"i{number}"
                ctl("import", descriptor, f"one/{name}")
                ctl("show", f"one/{name}")
                ctl("cp", f"one/{name}", f"two/{name}")
                operate("cp -r through a mount", lambda: copy_through(name, f"{name}-copy"))  # noqa: B023
                ctl("touch", f"one/{name}")
                ctl("rm", f"one/{name}")
                ctl("restore", f"one/{name}")
                imagectl(sidecar.address, "rm", f"one/{name}")
                ctl("purge", f"one/{name}")
                command.progress(f"requests: {number + 1} of {sizes.times}")
        counted = [Counted(what, least(counts)) for what, counts in found.items()]
        state = settled(where.simulator)
        refreshed = state["RefreshDatastore"]
        wait_until(lambda: where.simulator.requests()["RefreshDatastore"] > refreshed + 1, "the state is looked at")
        looked = settled(where.simulator) - state
        each = Counter({name: round(n / looked["RefreshDatastore"]) for name, n in looked.items()})
    counted.append(Counted("a lock, and its release", _count_lock(parent)))
    return [*counted, Counted("a look at a datastore's state, every 5 s", each)]


def _is_known(client: SidecarClient, image_id: str) -> bool:
    return any(image.ref.image_id == image_id for image in client.images())


def _count_lock(parent: Path) -> Counter[str]:
    with served(parent, "one") as where:
        server = Server(
            *("sim", "127.0.0.1", where.simulator.port), from_file(str(where.simulator.credentials)), insecure=True
        )
        with closing(Connection(server)) as connection:
            datastore = VsphereApiDatastore("one", DatastoreAddress(connection, "one"))
            datastore.check()
            before = where.simulator.requests()
            datastore.lock("image_a.ec_lock", "count", 0).release()
            return where.simulator.requests() - before


def time_listing(parent: Path, sizes: ServerSizes, runs: int) -> Result:
    with served(parent, "one") as where:
        plant(where.places["one"].root, sizes.images)

        def ours(first: bool) -> dict[str, float]:
            start = time.perf_counter()
            with where.sidecar() as sidecar, sidecar.client() as client:
                wait_until(lambda: knows(client, sizes.images), "all are listed", 300)
                return {LISTED: time.perf_counter() - start}

        def searches(first: bool) -> dict[str, float]:
            start = time.perf_counter()
            found = plain.list_each(where.simulator, "one")
            assert found == sizes.images * 3, found
            return {LISTED: time.perf_counter() - start}

        contenders: dict[str, Contender] = {SEARCHES: searches, OURS: ours}
        values = by_measure(take_turns("listing", contenders, runs), LISTED)
    return Result(f"listing of {sizes.images:,} images", values, seconds, [at_most(1, SEARCHES)], OURS)


def time_copy(parent: Path, sizes: ServerSizes, runs: int) -> Result:
    disk, numbers = sizes.large, itertools.count()
    with served(parent, "one") as where, where.sidecar() as sidecar, sidecar.client(timeout=60.0) as client:
        source = where.directory / disk.name
        source.mkdir()
        disk.make(source)
        imagectl(sidecar.address, "import", source / f"{disk.name}.vmdk", f"one/{disk.name}")

        def ours(first: bool) -> dict[str, float]:
            ref = f"one/copy-{next(numbers)}"
            run("sync", "-f", where.places["one"].root)
            start = time.perf_counter()
            client.copy(f"one/{disk.name}", ref).wait()
            taken = time.perf_counter() - start
            client.delete(ref, force=True)
            return {COPIED: taken}

        def streamed(first: bool) -> dict[str, float]:
            directory, name = f"plain-{next(numbers)}", where.places["one"].directory(disk.name).name
            (where.places["one"].root / directory).mkdir()
            run("sync", "-f", where.places["one"].root)
            start = time.perf_counter()
            for file in (f"{disk.name}.vmdk", f"{disk.name}-flat.vmdk"):
                plain.stream(where.simulator, "one", f"{name}/{file}", f"{directory}/{file}")
            taken = time.perf_counter() - start
            run("rm", "-r", where.places["one"].root / directory)
            return {COPIED: taken}

        contenders: dict[str, Contender] = {STREAMED: streamed, OURS: ours}
        values = by_measure(take_turns("copy", contenders, runs), COPIED)
    return Result(f"copy of {disk.title}", values, seconds, [at_most(1, STREAMED)], OURS)
