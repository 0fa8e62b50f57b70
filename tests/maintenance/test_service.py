"""Through a real sidecar: the contract's calls, imagectl, and what the sidecar does by itself."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.images.v1 import maintenance_service_pb2 as wire
from protos.images.v1.maintenance_service_pb2_grpc import MaintenanceServiceStub
from sidecar import errors
from tests.ctl.conftest import Imagectl
from tests.support.places import LAYOUTS, MARKER, RENAMED, TIMESTAMP, TOMBSTONE, Place, flat_files
from tests.support.processes import run, wait_until
from tests.support.world import World, running_world

FAST = 1e6
QUIET = "[maintenance]\nreap_interval_seconds = 0\npurge_interval_seconds = 0\n"


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running_world(tmp_path_factory.mktemp("world"), config=QUIET) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    try:
        yield shared_world
        shared_world.assert_tidy()
    finally:
        for name in LAYOUTS:
            shared_world.client.maintenance.stop_scan(name)
            shared_world.client.maintenance.stop_sweep(name)
        shared_world.clear()


@pytest.fixture(params=LAYOUTS)
def place(request: pytest.FixtureRequest, world: World) -> Place:
    return world.places[request.param]


@pytest.fixture
def imagectl(world: World) -> Imagectl:
    return Imagectl(world.sidecar.address)


def plant(place: Place, image_id: str, used_ago: float = 3600) -> None:
    place.plant(image_id)
    age(place.file(image_id, TIMESTAMP), used_ago)


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def scanned(world: World, datastore: str) -> wire.Scan:
    maintenance = world.client.maintenance
    run_id = maintenance.start_scan(datastore, vm_rate=FAST, image_rate=FAST).run.run_id
    return maintenance.wait_scan(datastore, run_id, lambda scan: None, pause=0.01)


def test_a_scan_and_a_sweep_from_the_start_to_what_is_left(world: World, place: Place) -> None:
    maintenance = world.client.maintenance
    for image_id in ("a", "b", "c"):
        plant(place, image_id)
    other = world.places["one"]
    other.root.joinpath("vm_1").mkdir()
    try:
        # A linked clone on another datastore, of a VM that does not run.
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "vmdk",
            "-b",
            place.descriptor("b"),
            other.root / "vm_1/d.qcow2",
        )
        before = int(time.time())
        scan = scanned(world, place.name)
    finally:
        (other.root / "vm_1/d.qcow2").unlink(missing_ok=True)
        (other.root / "vm_1").rmdir()
    assert (scan.read_vms, scan.marked_images, scan.used_images) == (1, 2, 1)
    assert (scan.run.state, scan.run.outcome) == (wire.RUN_STATE_IDLE, wire.RUN_OUTCOME_DONE)
    unused = list(maintenance.unused(place.name))
    assert [image.ref.image_id for image in unused] == ["a", "c"]
    assert all(before <= image.marked_unused_time.ToSeconds() <= time.time() for image in unused)
    world.client.touch(f"{place.name}/c")
    results: list[wire.SweepResult] = []
    run_id = maintenance.start_sweep(place.name, rate=FAST).run.run_id
    sweep = maintenance.wait_sweep(place.name, run_id, lambda _, more: results.extend(more), pause=0.01)
    assert (sweep.deleted_images, sweep.total_results) == (1, 3)
    assert [(result.image_id, result.deleted) for result in results] == [("a", True), ("b", False), ("c", False)]
    place.assert_holds({"b": flat_files("b"), "c": flat_files("c")})
    wait_until(lambda: set(world.listed(place.name)) == {f"{place.name}/{i}" for i in "bc"}, "the listing follows")


def test_a_vm_that_cannot_be_read_fails_the_scan_and_says_which(world: World, imagectl: Imagectl) -> None:
    place = world.places["one"]
    plant(place, "a")
    vm = place.root / "vm_broken"
    vm.mkdir()
    try:
        (vm / "disk.vmdk").symlink_to("/nowhere/disk.vmdk")
        error = imagectl.error("scan", "one", "--rate", FAST.__str__(), code=5)
    finally:
        (vm / "disk.vmdk").unlink()
        vm.rmdir()
    assert "broken" in error
    assert not place.file("a", MARKER).exists()


def test_a_second_start_is_refused_and_a_repeated_one_is_the_first(world: World) -> None:
    place = world.places["one"]
    for image_id in ("a", "b"):
        plant(place, image_id)
    maintenance = world.client.maintenance
    first = maintenance.start_scan("one", image_rate=0.01, request_id="first")
    assert first.run.run_id == "first"
    with pytest.raises(errors.TaskAlreadyRunning, match="is running"):
        maintenance.start_scan("one")
    assert maintenance.start_scan("one", image_rate=0.01, request_id="first").run.run_id == "first"
    # Another datastore, and a sweep, are others' affairs.
    scanned(world, "two")
    run_id = maintenance.start_sweep("one", dry_run=True).run.run_id
    maintenance.wait_sweep("one", run_id, lambda sweep, results: None, pause=0.01)
    maintenance.stop_scan("one", "another")
    assert maintenance.scan("one").run.state != wire.RUN_STATE_IDLE
    maintenance.stop_scan("one", "first")
    with pytest.raises(errors.OperationCancelled, match="was stopped"):
        maintenance.wait_scan("one", "first", lambda scan: None, pause=0.01)


def test_what_cannot_be_meant_is_refused(world: World) -> None:
    maintenance = world.client.maintenance
    stub = MaintenanceServiceStub(world.channel)
    for call in (
        lambda: maintenance.start_scan("one", vm_rate=-1),
        lambda: maintenance.start_scan("one", image_rate=float("nan")),
        lambda: maintenance.start_scan("one", timeout=1e12),
        lambda: maintenance.start_sweep("one", rate=1e9),
        lambda: maintenance.start_sweep("one", grace=-1),
        lambda: maintenance.reap("one", grace=-1),
        lambda: maintenance.sweep("one", -1),
    ):
        with pytest.raises(errors.InvalidRequest):
            call()
    with pytest.raises(errors.InvalidImageId):
        maintenance.start_sweep("one", ["../x"])
    for name in ("none", ""):
        with pytest.raises(errors.DatastoreNotFound):
            maintenance.scan(name)
    assert stub.GetScan(wire.GetScanRequest(datastore="three")).scan.run.datastore == "three"


def test_imagectl_scans_lists_and_sweeps(world: World, imagectl: Imagectl) -> None:
    place = world.places["two"]
    for image_id in ("a", "b"):
        plant(place, image_id)
    assert imagectl("scan", "two", "--rate", "60000") == (
        "two scanned: 0 VMs read, 2 images unused, 0 in use, 0 neither\n"
    )
    lines = imagectl("unused").splitlines()
    assert re.split("  +", lines[0]) == ["IMAGE", "ALLOCATED", "LAST USED", "UNUSED SINCE"]
    assert [line.split()[0] for line in lines[1:]] == ["two/a", "two/b"]
    assert [image["image_id"] for image in imagectl.json("unused", "two")] == ["a", "b"]
    imagectl("touch", "two/b")
    dry = imagectl("sweep", "two", "--dry-run")
    assert "two/a  would be deleted  unused since" in dry
    assert "two/b  stays             it was used at" in dry
    assert place.file("a", MARKER).exists()
    assert "not on two" in imagectl.error("sweep", "two", "one/a", code=2)
    document = imagectl.json("sweep", "two", "two/a", "b", "--rate", "60000")
    assert (document["outcome"], document["deleted_images"]) == ("DONE", 1)
    assert [(result["image_id"], result["deleted"]) for result in document["results"]] == [("a", True), ("b", False)]
    place.assert_holds({"b": flat_files("b")})
    assert imagectl("unused") == "IMAGE  ALLOCATED  LAST USED  UNUSED SINCE\n"


@pytest.mark.parametrize("kind", ["scan", "sweep"])
def test_ctrl_c_stops_the_run_on_the_server_and_says_so(world: World, imagectl: Imagectl, kind: str) -> None:
    place = world.places["one"]
    for image_id in ("a", "b", "c"):
        plant(place, image_id)
    if kind == "sweep":
        scanned(world, "one")
    maintenance = world.client.maintenance

    def status() -> wire.MaintenanceRun:
        return maintenance.scan("one").run if kind == "scan" else maintenance.sweep("one")[0].run

    process = imagectl.start(kind, "one", "--rate", "1")
    with process:
        wait_until(lambda: status().done_items == 1 and status().state != wire.RUN_STATE_IDLE, "one item is done")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert told == f"imagectl: the {kind} was stopped, at 1 of 3 items\n"
    assert status().outcome == wire.RUN_OUTCOME_STOPPED


def test_no_wait_leaves_it_running_and_a_timeout_ends_it(world: World, imagectl: Imagectl) -> None:
    plant(world.places["one"], "a")
    plant(world.places["one"], "b")
    assert imagectl("scan", "one", "--rate", "1", "--no-wait") == "scan of one started\n"
    assert "TASK_ALREADY_RUNNING" not in imagectl.error("scan", "one", code=5)
    world.client.maintenance.stop_scan("one")
    wait_until(lambda: world.client.maintenance.scan("one").run.state == wire.RUN_STATE_IDLE, "it is stopped")
    assert imagectl("scan", "one", "--stop") == "no scan of one is running\n"
    assert "longer than its timeout" in imagectl.error("scan", "one", "--rate", "1", "--timeout", "0.3", code=6)


@pytest.mark.parametrize("kind", ["scan", "sweep"])
def test_what_nobody_waits_for_is_stopped_as_the_refusal_says(world: World, imagectl: Imagectl, kind: str) -> None:
    assert imagectl(kind, "one", "--stop") == f"no {kind} of one is running\n"
    for image_id in ("a", "b", "c"):
        plant(world.places["one"], image_id)
    if kind == "sweep":
        scanned(world, "one")
    imagectl(kind, "one", "--rate", "1", "--no-wait")
    assert f"stop it: imagectl {kind} one --stop" in imagectl.error(kind, "one", code=5)
    assert re.fullmatch(rf"the {kind} was stopped, at [01] of 3 items\n", imagectl(kind, "one", "--stop"))
    assert imagectl(kind, "one", "--stop") == f"no {kind} of one is running\n"
    assert imagectl.json(kind, "one", "--stop")["outcome"] == "STOPPED"


def test_progress_is_shown_where_somebody_watches(world: World, imagectl: Imagectl) -> None:
    plant(world.places["one"], "a")
    assert "scan one" in imagectl.on_terminal("scan", "one", "--rate", "600")


def test_imagectl_reaps_and_purges(world: World, imagectl: Imagectl, place: Place) -> None:
    staging = {
        "compound": place.root / "tmp_image_x",
        "sharded": place.root / "tmp_images/x",
        "vsan": place.root / "image_new/tmp_image_x",
    }[place.layout]
    staging.mkdir(parents=True, exist_ok=True)
    (staging / "new.vmdk").write_bytes(b"x" * 4096)
    plant(place, "a")
    place.file("a", TOMBSTONE).touch()
    age(place.file("a", TOMBSTONE), 7200)
    live = world.client.create_staging(f"{place.name}/live")
    live.write_file("live.vmdk", [(0, b"x")])
    assert "0 staging directories" in imagectl.result("reap", place.name).stdout
    result = imagectl.result("reap", place.name, "--grace", "0", "--purge-after", "3600", "-o", "json")
    document = json.loads(result.stdout)
    assert document["staging_directories"] == [str(staging.relative_to(place.root))]
    assert document["purged_images"] == ["a"]
    assert document["freed_bytes"] > 0
    live.abort()
    place.assert_holds({})


def test_deleted_images_are_listed_with_the_time_at_which_they_go(tmp_path: Path) -> None:
    with running_world(tmp_path, config="[maintenance]\ntombstone_grace_seconds = 3600\n") as world:
        plant(world.places["one"], "a")
        world.client.delete("one/a")
        wait_until(lambda: bool(list(world.client.maintenance.deleted())), "it is known")
        (deleted,) = world.client.maintenance.deleted("one")
        assert deleted.purge_time.ToNanoseconds() - deleted.image.tombstone_time.ToNanoseconds() == 3600 * 10**9


def test_what_a_dead_sidecar_left_is_cleaned_up_by_the_next_start(tmp_path: Path) -> None:
    with running_world(tmp_path, config="[maintenance]\nstaging_grace_seconds = 0\n") as world:
        for place in world.places.values():
            plant(place, "a", used_ago=100)
            plant(place, "old")
            world.client.create_staging(f"{place.name}/new").write_file("new.vmdk", [(0, b"x")])
        world.sidecar.kill()
        for place in world.places.values():
            # A sweep had begun, and so had an import; a deletion is two days old.
            place.file("a", TIMESTAMP).rename(place.file("a", RENAMED))
            place.file("old", TOMBSTONE).touch()
            age(place.file("old", TOMBSTONE), 2 * 86400)
            if place.layout != "vsan":
                (place.root / "deleted_images" / "x").mkdir()
        world.sidecar.start()
        expected = {"a": flat_files("a")}
        for place in world.places.values():
            wait_until(lambda place=place: place.holds(expected), f"{place.name}: {place.contents()}")  # type: ignore[misc]


def test_the_sidecar_scans_and_sweeps_by_itself_when_told_to(tmp_path: Path) -> None:
    config = "[maintenance]\nsweep_interval_seconds = 3600\nsweep_grace_seconds = 1800\nrate = 60000\n"
    for name in LAYOUTS:
        (tmp_path / name).mkdir()
    with contextlib.ExitStack() as stack:
        for name, layout in LAYOUTS.items():
            place = Place(name, layout, tmp_path / name)
            plant(place, "old", used_ago=3600)
            plant(place, "young", used_ago=600)
        from tests.support.processes import Sidecar

        flags = [f"{name}={tmp_path / name},layout={layout}" for name, layout in LAYOUTS.items()]
        stack.enter_context(Sidecar(tmp_path / "run", *flags, config=config))
        for name, layout in LAYOUTS.items():
            place = Place(name, layout, tmp_path / name)
            wait_until(lambda place=place: place.holds({"young": flat_files("young")}), "the old one is gone")  # type: ignore[misc]


def test_a_shutdown_ends_a_run_in_good_order(tmp_path: Path) -> None:
    with running_world(tmp_path, config=QUIET) as world:
        plant(world.places["one"], "a")
        plant(world.places["one"], "b")
        world.client.maintenance.start_scan("one", image_rate=0.01)
        wait_until(lambda: world.client.maintenance.scan("one").run.done_items == 1, "it waits for its turn")
        assert world.sidecar.stop() == 0
        log = world.sidecar.log.read_text()
        assert "outcome=STOPPED" in log
        assert "stopped clean=true" in log


def test_a_run_is_forgotten_by_a_restart_and_that_is_told(tmp_path: Path) -> None:
    with running_world(tmp_path, config=QUIET) as world:
        run_id = scanned(world, "one").run.run_id
        world.sidecar.kill()
        world.sidecar.start()
        assert world.client.maintenance.scan("one").run.run_id == ""
        with pytest.raises(errors.OperationCancelled, match="restarted"):
            world.client.maintenance.wait_scan("one", run_id, lambda scan: None)
