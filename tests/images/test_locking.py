"""While somebody else holds an image's lock nothing of it changes, and who waits is told who holds it."""

import threading
from collections.abc import Callable

import pytest

from sidecar import errors
from sidecar.client import SidecarClient
from tests.support.places import MIB, TOMBSTONE, Place, flat_descriptor, flat_files
from tests.support.processes import wait_until
from tests.support.world import World

CONFIG = "[limits]\nlock_timeout_seconds = 0.3\n"


# Of an image by its id: a change, and how long it is ready to wait for the lock.
Change = tuple[str, Callable[[SidecarClient, str, float | None], object]]


def commit(client: SidecarClient, ref: str, wait: float | None) -> None:
    with client.create_staging(ref) as staging:
        staging.write_file("disk.vmdk", [(0, flat_descriptor("disk-flat.vmdk", MIB).encode())])
        staging.write_file("disk-flat.vmdk", [], size=MIB)
        staging.commit(lock_timeout=wait)


def copy(client: SidecarClient, ref: str, wait: float | None) -> None:
    client.copy(ref.replace("/new", "/a"), ref, lock_timeout=wait).wait()


CHANGES: dict[str, Change] = {
    "touch": ("a", lambda client, ref, wait: client.touch(ref, lock_timeout=wait)),
    "delete": ("a", lambda client, ref, wait: client.delete(ref, lock_timeout=wait)),
    "force": ("a", lambda client, ref, wait: client.delete(ref, force=True, lock_timeout=wait)),
    "update": ("a", lambda client, ref, wait: client.update_metadata(ref, files={"x": b"x"}, lock_timeout=wait)),
    "restore": ("dead", lambda client, ref, wait: client.restore(ref, lock_timeout=wait)),
    "purge": ("dead", lambda client, ref, wait: client.purge(ref, lock_timeout=wait)),
    "repair": ("lost", lambda client, ref, wait: client.validate(ref, repair=True, lock_timeout=wait)),
    "copy": ("new", copy),
    "commit": ("new", commit),
}


def plant_all(place: Place) -> dict[str, set[str]]:
    place.plant("a")
    place.plant("dead")
    place.file("dead", TOMBSTONE).touch()
    place.plant("lost", timestamp=False)
    return {"a": flat_files("a"), "dead": flat_files("dead", TOMBSTONE), "lost": {"lost.vmdk", "lost-flat.vmdk"}}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_changes_an_image_whose_lock_somebody_else_holds(world: World, place: Place, change: Change) -> None:
    # The harms in the origin: a directory that was removed after its lock was given back; locks that were not taken.
    image_id, call = change
    ref = f"{place.name}/{image_id}"
    there = plant_all(place)
    with place.locked(image_id):
        before = place.snapshot()
        with pytest.raises(errors.LockTimeout, match="is held by a process that left no name") as refused:
            call(world.client, ref, None)
        assert str(place.lock_file(image_id)) in refused.value.message
        # Of a copy or an import that could not be published there is nothing left either.
        after = {path: found for path, found in place.snapshot().items() if not path.endswith(".ec_lock")}
        assert after == {path: found for path, found in before.items() if not path.endswith(".ec_lock")}
    place.assert_holds(there)
    call(world.client, ref, None)
    assert place.snapshot() != before


def test_nobody_waits_longer_than_the_sidecar_is_told_to(world: World, place: Place) -> None:
    place.plant("a")
    with place.locked("a"), pytest.raises(errors.LockTimeout, match=r"gave up after 0\.3 s"):
        world.client.touch(f"{place.name}/a", lock_timeout=3600)


def test_who_waits_is_told_which_operation_it_waits_for(world: World, place: Place) -> None:
    place.plant("a")
    place.plant("b")
    with place.locked("a"):
        place.lock_file("a").write_text(
            '{"host": "esx7", "pid": 4711, "process": "image-agent", "operation": "sweep a", '
            '"since": "2026-01-02T03:04:05+00:00"}\n'
        )
        with pytest.raises(errors.LockTimeout) as refused:
            world.client.touch(f"{place.name}/a")
        assert "image-agent (pid 4711 on esx7) for sweep a, since 2026-01-02 03:04:05 UTC" in refused.value.message
        world.client.touch(f"{place.name}/b")  # another image's lock is another lock


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"{}", b'{"host": 1}', b"\xff"])
def test_a_lock_file_that_a_dead_process_left_holds_nobody_up(world: World, place: Place, content: bytes) -> None:
    place.plant("a")
    place.lock_file("a").write_bytes(content)
    world.client.touch(f"{place.name}/a")
    place.assert_holds({"a": flat_files("a")})


def test_looking_takes_no_lock(world: World, place: Place) -> None:
    place.plant("a")
    world.wait_listed(f"{place.name}/a")
    with place.locked("a"):
        assert list(world.listed()) == [f"{place.name}/a"]
        world.client.image(f"{place.name}/a")
        world.client.validate(f"{place.name}/a")
        assert sum(len(answer.data) for answer in world.client.read_file(f"{place.name}/a", "a.vmdk")) > 0
        world.client.copy(f"{place.name}/a", f"{place.name}/b").wait()


def test_changes_of_one_image_by_many_at_once_leave_it_in_one_state(world: World, place: Place) -> None:
    ref = f"{place.name}/a"
    place.plant("a")
    faults: list[BaseException] = []

    def change(number: int) -> None:
        client = world.client
        calls: list[Callable[[], object]] = [
            lambda: client.delete(ref),
            lambda: client.restore(ref),
            lambda: client.touch(ref),
            lambda: client.update_metadata(ref, files={f"f{number}": b"x"}),
        ]
        for round_number in range(6):
            try:
                calls[(number + round_number) % 4]()
            except (errors.ImageTombstoned, errors.ImageNotTombstoned, errors.LockTimeout):
                pass
            except BaseException as error:
                faults.append(error)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    left = place.contents()
    assert {name for name in left if "ec_lock" in name or "/." in name} == set()
    tombstoned = place.file("a", TOMBSTONE).exists()
    if tombstoned:
        world.client.restore(ref)
    world.client.validate(ref)
    wait_until(lambda: world.listed()[ref].state == world.client.image(ref).state, "the listing is true")
