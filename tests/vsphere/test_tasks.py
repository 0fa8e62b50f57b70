"""Work that a server does in the background: followed to its end, cancelled, and never waited for without a bound."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from pyVmomi import vim

from sidecar.errors import DatastoreDenied, DatastoreUnavailable, ImagesError, OperationCancelled
from sidecar.vsphere import tasks
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.disks import copy_task, find_all
from tests.support.places import write_flat_disk
from tests.support.processes import wait_until
from tests.support.soap import Answer, Behavior, Call, fault, found, returned, soap_server, thing, value
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
        self.connection = site.connection(timeout=timeout)
        self.addresses = [site.address(self.connection, name) for name in ("one", "two")]
        self.told: list[int] = []
        self.error: BaseException | None = None
        self.wanted = True
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            source, destination = find_all(*self.addresses)
            copy_task(self.connection, source, "a.vmdk", destination, "b.vmdk").run(self._follow)
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


class Scripted:
    """A server that says of a task what a test wants: each look at it takes the next answer, the last one stays."""

    def __init__(self, directory: Path, stack: ExitStack, *looks: Behavior, cancel: Behavior) -> None:
        self._looks = list(looks)
        self.calls: list[str] = []

        def look(call: Call) -> Answer | None:
            self.calls.append("look")
            return (self._looks.pop(0) if len(self._looks) > 1 else self._looks[0])(call)

        def cancelled(call: Call) -> Answer | None:
            self.calls.append("cancel")
            return cancel(call)

        behaviors = {"RetrievePropertiesEx": look, "CancelTask": cancelled}
        server = stack.enter_context(soap_server(directory, behaviors))
        self.connection = stack.enter_context(closing(Connection(server)))

    def run(self, follow: Callable[[int], None] = lambda percent: None, *, size: int = 0) -> None:
        def start(content: vim.ServiceInstanceContent) -> vim.Task:
            return vim.Task("task-1", content.propertyCollector._GetStub())

        self.task = tasks.ServerTask(self.connection, "copy", start, size)
        self.task.run(follow)


def state(state: str, *more: str) -> Behavior:
    return lambda call: found(call, thing("Task", "task-1", value("info.state", state, "TaskInfoState"), *more))


def progress(percent: int) -> str:
    return value("info.progress", str(percent), "xsd:int")


def refuse(name: str) -> Behavior:
    return lambda call: fault(name)


def not_wanted(percent: int) -> None:
    raise OperationCancelled("not wanted")


def test_a_task_that_failed_without_a_reason_is_no_success(tmp_path: Path, stack: ExitStack) -> None:
    scripted = Scripted(tmp_path, stack, state("running"), state("error"), cancel=returned)
    with pytest.raises(DatastoreUnavailable, match="SystemError the task failed, and the server tells no reason"):
        scripted.run()
    assert "cancel" not in scripted.calls


def test_one_answer_that_tells_nothing_does_not_end_it(tmp_path: Path, stack: ExitStack) -> None:
    looks = (state("running"), refuse("HostCommunication"), state("running"), state("success"))
    scripted = Scripted(tmp_path, stack, *looks, cancel=returned)
    scripted.run()
    assert scripted.calls == ["look"] * 4


def test_what_cannot_be_looked_at_is_cancelled(tmp_path: Path, stack: ExitStack) -> None:
    looks = (state("running"), refuse("NoPermission"), state("error"))
    scripted = Scripted(tmp_path, stack, *looks, cancel=returned)
    with pytest.raises(DatastoreDenied, match="NoPermission"):
        scripted.run()
    assert scripted.calls == ["look", "look", "cancel", "look"]


def test_one_that_the_server_has_lost_ends_at_once(tmp_path: Path, stack: ExitStack) -> None:
    scripted = Scripted(tmp_path, stack, state("running"), refuse("ManagedObjectNotFound"), cancel=returned)
    with pytest.raises(DatastoreUnavailable, match="the server has lost it"):
        scripted.run()
    assert scripted.calls == ["look", "look"]


def test_a_server_that_is_given_up_is_told_so_once(tmp_path: Path, stack: ExitStack) -> None:
    """It still answers other calls than looks."""
    garbled = Answer(b"<html>", 503)
    scripted = Scripted(tmp_path, stack, state("running"), lambda call: garbled, cancel=returned)
    scripted.connection.server = replace(scripted.connection.server, timeout=1.0)
    with pytest.raises(DatastoreUnavailable, match="503"):
        scripted.run()
    assert scripted.calls.count("cancel") == 1
    assert scripted.calls[-1] == "cancel"


@pytest.mark.parametrize("cancel", ["NotSupported", "NoPermission", "HostCommunication"])
def test_the_end_of_one_that_is_not_cancelled_is_waited_for(tmp_path: Path, stack: ExitStack, cancel: str) -> None:
    looks = (state("running"), state("running"), refuse("HostCommunication"), state("running"), state("success"))
    scripted = Scripted(tmp_path, stack, *looks, cancel=refuse(cancel))
    with pytest.raises(OperationCancelled):
        scripted.run(not_wanted)
    assert scripted.calls == ["look", "cancel", *["look"] * 4]


def test_the_end_of_one_that_is_not_cancelled_is_waited_for_with_a_bound(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "CANCEL_SECONDS", 1.0)
    scripted = Scripted(tmp_path, stack, state("running"), cancel=refuse("NotSupported"))
    start = time.monotonic()
    with pytest.raises(OperationCancelled):
        scripted.run(not_wanted)
    assert 1 < time.monotonic() - start < 5
    assert "it runs 1 s after it was to be cancelled" in caplog.text


def test_one_that_waits_in_the_servers_queue_is_not_taken_for_one_that_stalls(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "STALLED_SECONDS", 0.0)
    looks = (*[state("queued")] * 5, state("success"))
    scripted = Scripted(tmp_path, stack, *looks, cancel=returned)
    scripted.run()
    assert scripted.calls == ["look"] * 6


def test_the_queue_is_not_waited_for_without_a_bound(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "QUEUED_SECONDS", 0.5)
    scripted = Scripted(tmp_path, stack, state("queued"), cancel=returned)
    monkeypatch.setattr(tasks, "CANCEL_SECONDS", 0.0)
    with pytest.raises(DatastoreUnavailable, match=r"no progress in 0\.5 s, in its queue"):
        scripted.run()
    assert scripted.task.begun


def test_a_large_disk_has_the_time_that_a_percent_of_it_takes(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "STALLED_SECONDS", 0.0)
    monkeypatch.setattr(tasks, "CANCEL_SECONDS", 0.0)
    looks = (*[state("running", progress(1))] * 5, state("success"))
    Scripted(tmp_path, stack, *looks, cancel=returned).run(size=2 << 40)
    with pytest.raises(DatastoreUnavailable, match="no progress in 0 s, at 1 %"):
        Scripted(tmp_path, stack, *looks, cancel=returned).run(size=0)


@pytest.mark.parametrize(
    ("answer", "begun"),
    [
        (refuse("NoPermission"), False),
        (refuse("InvalidDatastore"), False),
        (refuse("InvalidArgument"), False),
        (refuse("SystemError"), True),
        (refuse("HostNotReachable"), True),
        (lambda call: None, True),
        (lambda call: Answer(b"<html>"), True),
    ],
)
def test_whether_the_server_may_have_begun_is_known_by_its_answer(
    tmp_path: Path, stack: ExitStack, answer: Behavior, begun: bool
) -> None:
    server = stack.enter_context(soap_server(tmp_path, {"Destroy_Task": answer}))
    connection = stack.enter_context(closing(Connection(server)))
    task = tasks.ServerTask(connection, "destroy", lambda content: content.rootFolder.Destroy_Task())
    with pytest.raises(ImagesError):
        task.run(lambda percent: None)
    assert task.begun is begun


@pytest.mark.parametrize("changes", [{"Login": refuse("InvalidLogin")}, {"Login": lambda call: None}])
def test_a_task_is_not_begun_without_a_session(tmp_path: Path, stack: ExitStack, changes: dict[str, Behavior]) -> None:
    connection = stack.enter_context(closing(Connection(stack.enter_context(soap_server(tmp_path, changes)))))
    task = tasks.ServerTask(connection, "destroy", lambda content: content.rootFolder.Destroy_Task())
    with pytest.raises(ImagesError, match="cannot log in"):
        task.run(lambda percent: None)
    assert not task.begun


def test_a_task_is_not_begun_where_there_is_no_connection_any_more(make_site: MakeSite) -> None:
    site = make_site()
    connection = site.connection()
    site.address(connection, "one").find()
    site.simulator.kill()
    task = tasks.ServerTask(connection, "destroy", lambda content: content.rootFolder.Destroy_Task())
    with pytest.raises(DatastoreUnavailable, match="cannot destroy: Connection refused"):
        task.run(lambda percent: None)
    assert not task.begun


@pytest.mark.parametrize(
    ("kind", "begun"), [("InvalidDatastore", False), ("InaccessibleDatastore", True), ("NoDiskSpace", True)]
)
def test_one_that_was_refused_by_its_first_look_at_the_datastore_has_done_nothing(
    tmp_path: Path, stack: ExitStack, kind: str, begun: bool
) -> None:
    error = value(
        "info.error", f'<fault xsi:type="{kind}"/><localizedMessage>no</localizedMessage>', "LocalizedMethodFault"
    )
    scripted = Scripted(tmp_path, stack, state("running"), state("error", error), cancel=returned)
    with pytest.raises(ImagesError, match=kind):
        scripted.run()
    assert scripted.task.begun is begun
