"""Work that a server does in the background: followed to its end, cancelled, and never waited for without a bound."""

import threading
import time

import pytest

from sidecar.errors import DatastoreUnavailable, OperationCancelled
from sidecar.vsphere import tasks
from sidecar.vsphere.disks import copy_disk
from tests.support.places import write_flat_disk
from tests.support.processes import wait_until
from tests.vsphere.conftest import PATIENCE, TIMEOUT, MakeSite, Site, end_sessions


@pytest.fixture
def slow_site(make_site: MakeSite, kind: str) -> Site:
    """Copies take two seconds; there is a disk a in one."""
    site = make_site(kind=kind, copy_seconds=2)
    write_flat_disk(site.roots["one"], "a")
    return site


class Copy:
    """One that runs in a thread, with what it told and how it ended."""

    def __init__(self, site: Site, timeout: float = PATIENCE) -> None:
        connection = site.connection(timeout=timeout)
        self.addresses = [site.address(connection, name) for name in ("one", "two")]
        self.told: list[int] = []
        self.error: BaseException | None = None
        self.wanted = True
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            copy_disk(self.addresses[0], "a.vmdk", self.addresses[1], "b.vmdk", self._follow)
        except BaseException as error:
            self.error = error

    def _follow(self, percent: int) -> None:
        self.told.append(percent)
        if not self.wanted:
            raise OperationCancelled("not wanted")

    def start(self) -> None:
        """Returns when it is under way."""
        self.thread.start()
        wait_until(lambda: bool(self.told and self.told[-1]), "the copy makes progress")

    def end(self) -> float:
        start = time.monotonic()
        self.thread.join(30)
        assert not self.thread.is_alive()
        return time.monotonic() - start


def test_it_tells_how_far_it_is(slow_site: Site) -> None:
    copy = Copy(slow_site)
    copy.start()
    copy.end()
    assert copy.error is None
    assert copy.told == sorted(copy.told)
    assert len(set(copy.told)) > 3


def test_what_nobody_wants_any_more_is_cancelled(slow_site: Site) -> None:
    copy = Copy(slow_site)
    copy.start()
    copy.wanted = False
    copy.end()
    assert isinstance(copy.error, OperationCancelled)
    time.sleep(2)  # until it would have been done
    assert list(slow_site.roots["two"].iterdir()) == []


def test_a_session_that_is_ended_meanwhile_is_begun_again(slow_site: Site) -> None:
    copy = Copy(slow_site)
    copy.start()
    end_sessions(slow_site)
    copy.end()
    assert copy.error is None
    assert (slow_site.roots["two"] / "b.vmdk").exists()


def test_a_server_that_pauses_for_a_moment_loses_nothing(slow_site: Site) -> None:
    copy = Copy(slow_site)
    copy.start()
    with slow_site.simulator.hanging():
        time.sleep(1)
    copy.end()
    assert copy.error is None


def test_a_server_that_dies_is_given_up_in_bounded_time(slow_site: Site) -> None:
    copy = Copy(slow_site, TIMEOUT)
    copy.start()
    slow_site.simulator.kill()
    assert copy.end() < TIMEOUT + 3
    assert isinstance(copy.error, DatastoreUnavailable)
    assert "look whether it runs" in copy.error.message


def test_a_server_that_hangs_is_given_up_in_bounded_time(slow_site: Site) -> None:
    copy = Copy(slow_site, TIMEOUT)
    copy.start()
    with slow_site.simulator.hanging():
        assert copy.end() < 2 * TIMEOUT + 3
    assert isinstance(copy.error, DatastoreUnavailable)


def test_a_task_that_a_restart_lost_is_told(slow_site: Site) -> None:
    copy = Copy(slow_site)
    copy.start()
    slow_site.simulator.kill()
    slow_site.simulator.start()
    copy.end()
    assert isinstance(copy.error, DatastoreUnavailable)
    assert "the server has lost it" in copy.error.message


def test_one_without_progress_is_cancelled(make_site: MakeSite, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site(kind=kind, copy_seconds=60)
    write_flat_disk(site.roots["one"], "a")
    monkeypatch.setattr(tasks, "STALLED_SECONDS", 1.0)
    copy = Copy(site)
    copy.thread.start()
    copy.end()
    assert isinstance(copy.error, DatastoreUnavailable)
    assert "no progress in 1 s, at 0 %" in copy.error.message
