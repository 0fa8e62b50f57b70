"""What is done without being asked for: in its time, again after an error, and not after the end."""

import threading
from collections.abc import Callable

from sidecar.errors import DatastoreUnavailable
from sidecar.images.keeping import RETRY_SECONDS, Keeper, Task
from sidecar.images.maintenance import FIRST_PURGE_SECONDS, Maintenance, Plan
from sidecar.images.runs import Outcome
from tests.maintenance.conftest import DAY, NOW, OwnClock, Site, wait_ended
from tests.support.places import TOMBSTONE, flat_files

Check = Callable[[], None]


def run(clock: OwnClock, tasks: list[Task], seconds: float) -> None:
    """Until the clock has gone on by so much."""
    keeper: Keeper
    over = threading.Event()

    def tick() -> None:
        if clock.seconds - NOW > seconds:
            keeper._stop.set()
            over.set()

    clock.on_wait = tick
    keeper = Keeper("one", tasks, clock.as_clock())
    keeper.start()
    assert over.wait(10)
    keeper.close()


def test_tasks_are_done_when_they_are_due_first_and_then_at_their_intervals(clock: OwnClock) -> None:
    done: list[tuple[str, float]] = []
    tasks = [
        Task("a", 10, lambda check: done.append(("a", clock.seconds - NOW))),
        Task("b", 25, lambda check: done.append(("b", clock.seconds - NOW))),
        Task("c", 50, lambda check: done.append(("c", clock.seconds - NOW)), first=15),
    ]
    run(clock, tasks, 40)
    assert done == [("a", 0), ("b", 0), ("a", 10), ("c", 15), ("a", 20), ("b", 25), ("a", 30), ("a", 40)]


def test_a_task_that_fails_is_done_again_soon_and_keeps_no_other(clock: OwnClock) -> None:
    done: list[tuple[str, float]] = []

    def fail(check: Check) -> None:
        done.append(("fails", clock.seconds - NOW))
        raise DatastoreUnavailable("it is away")

    def defect(check: Check) -> None:
        done.append(("defect", clock.seconds - NOW))
        raise ZeroDivisionError

    run(clock, [Task("fails", DAY, fail), Task("defect", 100, defect)], 120)
    assert done == [("fails", 0), ("defect", 0), ("fails", RETRY_SECONDS), ("defect", 100), ("fails", 120)]


def test_the_end_of_the_sidecar_ends_a_task_that_runs() -> None:
    reached = threading.Event()

    def work(check: Check) -> None:
        reached.set()
        while True:
            check()

    keeper = Keeper("one", [Task("a", 10, work)], OwnClock().as_clock())
    keeper.start()
    assert reached.wait(10)
    keeper.close()


def maintained(site: Site, plan: Plan) -> Maintenance:
    return Maintenance(site.store, site.vms.source(), plan, site.clock.as_clock())


def test_nothing_is_done_by_itself_that_is_switched_off(site: Site) -> None:
    site.plant("a")
    site.set_used("a", 10 * DAY, TOMBSTONE)
    maintenance = maintained(site, Plan())
    maintenance.start()
    maintenance.close()
    assert site.clock.waits == []
    site.place.assert_holds({"a": flat_files("a", TOMBSTONE)})


def test_a_scan_of_its_own_is_followed_by_a_sweep_that_leaves_what_was_used_lately(site: Site) -> None:
    site.plant("old", used_ago=8 * DAY)
    site.plant("lately", used_ago=6 * DAY)
    site.plant("vm", used_ago=8 * DAY)
    site.vms.found = {(site.place.name, "vm_1"): [f"{site.place.name}/vm"]}
    maintenance = maintained(site, Plan(sweep_interval=DAY, sweep_grace=7 * DAY, rate=1e6))
    maintenance._sweep_by_itself(lambda: None)  # nothing to follow yet
    assert maintenance.sweeps.current() is None
    maintenance._scan_by_itself(lambda: None)
    assert wait_ended(maintenance.scans).outcome is Outcome.DONE  # type: ignore[arg-type]
    maintenance._sweep_by_itself(lambda: None)
    assert wait_ended(maintenance.sweeps).outcome is Outcome.DONE  # type: ignore[arg-type]
    maintenance.close()
    site.place.assert_holds({"lately": flat_files("lately"), "vm": flat_files("vm")})


def test_a_sweep_leaves_mounts_the_time_to_have_held_what_is_open_in_them(site: Site) -> None:
    maintenance = maintained(site, Plan(sweep_interval=DAY, rate=1e6))

    def tick() -> None:
        """The scan is never what the sweep waits for."""
        scanning = maintenance.scans._thread
        if scanning and scanning is not threading.current_thread():
            scanning.join(10)
        if maintenance.sweeps.current():
            maintenance._keeper._stop.set()

    site.clock.on_wait = tick
    maintenance.start()
    maintenance._keeper._thread.join(10)
    current = maintenance.sweeps.current()
    assert current
    assert current[0].started_ns >= (NOW + FIRST_PURGE_SECONDS) * 1e9
    maintenance.close()


def test_no_sweep_follows_a_scan_that_failed(site: Site) -> None:
    site.plant("old", used_ago=8 * DAY, marked_ago=3600)
    site.vms.found = {(site.place.name, "vm_1"): DatastoreUnavailable("vm_1: EIO")}
    maintenance = maintained(site, Plan(rate=1e6))
    maintenance._scan_by_itself(lambda: None)
    assert wait_ended(maintenance.scans).outcome is Outcome.FAILED  # type: ignore[arg-type]
    maintenance._sweep_by_itself(lambda: None)
    assert maintenance.sweeps.current() is None
    maintenance.close()
