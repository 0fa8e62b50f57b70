"""ListLocks tells who holds which lock now, and is in nobody's way."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.client import Lock, LockKind
from tests.locks.support import other_process_holding
from tests.support.places import MIB, Place, flat_descriptor
from tests.support.processes import Sidecar, wait_until
from tests.support.world import World

IMAGE, STAGING = LockKind.LOCK_KIND_IMAGE, LockKind.LOCK_KIND_STAGING


def lock_path(place: Place, image_id: str) -> str:
    return str(place.lock_file(image_id).relative_to(place.root))


def only(locks: list[Lock]) -> Lock:
    (lock,) = locks
    return lock


def test_the_lock_of_another_process_is_listed_with_its_holder(world: World, place: Place) -> None:
    place.plant("a")
    place.plant("b")
    assert world.client.locks(place.name) == []
    path = lock_path(place, "a")
    with other_process_holding(place.root, path) as other:
        lock = only(world.client.locks(place.name))
        assert (lock.datastore, lock.path, lock.kind, lock.image_id) == (place.name, path, IMAGE, "a")
        assert (lock.host, lock.pid, lock.operation) == ("otherhost", other.pid, "copy image ab")
        assert lock.process.startswith("python")
        assert abs(lock.since_time.ToNanoseconds() - os.stat(place.root / path).st_mtime_ns) < 60e9
        other.communicate()
    assert world.client.locks(place.name) == []


def test_what_a_killed_process_left_behind_is_not_listed(world: World, place: Place) -> None:
    place.plant("a")
    with other_process_holding(place.root, lock_path(place, "a")) as other:
        other.kill()
        other.wait()
        assert place.lock_file("a").exists()
        assert world.client.locks(place.name) == []
    world.client.touch(f"{place.name}/a", lock_timeout=0)


def test_a_staging_directory_is_listed_while_it_is_being_made(world: World, place: Place) -> None:
    with world.client.create_staging(f"{place.name}/new") as staging:
        lock = only(world.client.locks(place.name))
        assert (lock.kind, lock.pid, lock.process) == (STAGING, world.sidecar.pid, "image-sidecar")
        assert lock.image_id == ("new" if place.layout == "vsan" else "")
        assert lock.operation.endswith(" new")
        assert (place.root / lock.path).exists()
        staging.write_file("disk.vmdk", [(0, flat_descriptor("disk-flat.vmdk", MIB).encode())])
        staging.write_file("disk-flat.vmdk", [], size=MIB)
        staging.commit()
    assert world.client.locks(place.name) == []


def test_the_locks_of_all_are_listed_by_path(world: World, place: Place) -> None:
    for image_id in ("b", "a", "c"):
        place.plant(image_id)
    with place.locked("c"), place.locked("a"):
        locks = world.client.locks(place.name)
        assert [lock.image_id for lock in locks] == ["a", "c"]
        # By a program that writes no name.
        assert [(lock.host, lock.pid, lock.process, lock.operation) for lock in locks] == [("", 0, "", "")] * 2
        assert all(lock.since_time.seconds for lock in locks)
    other = "two" if place.name == "one" else "one"
    assert world.client.locks(other) == []


def test_what_is_no_lock_file_is_passed_over(world: World, place: Place) -> None:
    place.plant("a")
    lock = place.lock_file("a")
    makers: list[Callable[[], object]] = [
        lock.mkdir,
        lambda: os.mkfifo(lock),
        lambda: lock.symlink_to(place.descriptor("a")),
        lambda: lock.write_bytes(b"\xff" * 10_000),
    ]
    for make in makers:
        make()
        assert world.client.locks(place.name) == []
        lock.rmdir() if lock.is_dir() else lock.unlink()
    strays = [place.root / "image_x", place.root / "x.ec_lock", place.root / "image_.ec_lock"]
    if place.layout == "sharded":
        strays += [place.root / "images" / "ab", place.root / "images" / "xy"]
        strays[-1].mkdir()
        strays[-1:] = [strays[-1] / "ab.ec_lock", strays[-1]]
    for stray in strays:
        if not stray.is_dir():
            stray.write_bytes(b"")
    assert world.client.locks(place.name) == []
    for stray in strays:
        stray.rmdir() if stray.is_dir() else stray.unlink()


def test_no_change_is_refused_because_the_locks_are_listed(world: World, place: Place) -> None:
    place.plant("a")
    done = threading.Event()
    listed = 0

    def list_again_and_again() -> None:
        nonlocal listed
        while not done.is_set():
            world.client.locks(place.name)
            listed += 1

    threads = [threading.Thread(target=list_again_and_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with suppress(FileExistsError):
                place.lock_file("a").touch(exist_ok=False)  # left behind by a dead process: the listing has to try it
            world.client.touch(f"{place.name}/a", lock_timeout=0)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert listed > 10


def test_a_datastore_that_is_not_there(world: World) -> None:
    for name in ("nope", ""):
        with pytest.raises(errors.DatastoreNotFound):
            world.client.locks(name)


def test_locks_that_this_system_does_not_have_are_given_to_nobody(tmp_path: Path) -> None:
    """On Linux, which ignores the open flag of ESX without a word, two sidecars would hold one lock."""
    place = Place("esx", "compound", tmp_path / "esx")
    place.plant("a")
    with Sidecar(tmp_path / "run", f"esx={place.root},type=vmfs") as sidecar, sidecar.client() as client:
        wait_until(lambda: bool(list(client.images("esx"))), "the image is listed")
        for call in (lambda: client.touch("esx/a"), lambda: client.delete("esx/a")):
            with pytest.raises(errors.DatastoreUnavailable, match='no exclusive open; on Linux, use locks = "flock"'):
                call()
        assert not place.file("a", "image_tombstone.txt").exists()
        assert client.datastore("esx").type == "vmfs"
    with Sidecar(tmp_path / "run", f"esx={place.root},type=vmfs,locks=flock") as sidecar, sidecar.client() as client:
        client.touch("esx/a")
        assert client.datastore("esx").shared
