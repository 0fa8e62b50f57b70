"""Locks that are directories: one holder, who is named, and taken from nobody but who has ended for certain."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.renaming import rename_no_replace
from sidecar.errors import DatastoreUnavailable, InvalidRequest, LockTimeout, OperationCancelled
from sidecar.locks import directories as directories_of_locks
from sidecar.locks.directories import PATIENCE_SECONDS, SETTLE_SECONDS, DirectoryLocks
from sidecar.locks.files import FileLocks
from sidecar.locks.flock import Flock
from sidecar.locks.identity import Identity, _own, own_identity

LOCK = "image_a.ec_lock"


class LocalDirectories:
    """What the locks need, on a directory of this host. `away`: calls that are not answered; they are done all the same
    when `late`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.away: set[str] = set()
        self.late = False

    def make_directory(self, path: str) -> None:
        self._call("make_directory", (self.root / path).mkdir)

    def names(self, path: str) -> list[str]:
        def names() -> list[str]:
            try:
                return os.listdir(self.root / path)
            except NotADirectoryError:
                raise InvalidRequest(f"{path} is not a directory") from None

        found: list[str] = []
        self._call("names", lambda: found.extend(names()))
        return found

    def read_file(self, path: str, limit: int) -> bytes:
        return (self.root / path).read_bytes()[:limit]

    def put_file(self, path: str, content: bytes) -> None:
        self._call("put_file", lambda: (self.root / path).write_bytes(content))

    def rename(self, source: str, destination: str) -> None:
        def rename() -> None:
            fd = os.open(self.root, os.O_RDONLY)
            try:
                rename_no_replace(fd, source, fd, destination)
            finally:
                os.close(fd)

        self._call("rename", rename)

    def remove_tree(self, path: str) -> None:
        self._call("remove_tree", lambda: subprocess.run(["rm", "-rf", self.root / path], check=True))

    def _call(self, name: str, work: Callable[[], object]) -> None:
        if name not in self.away:
            work()
            return
        if self.late:
            work()
        raise DatastoreUnavailable("the server did not answer")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def directories(tmp_path: Path) -> LocalDirectories:
    return LocalDirectories(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def locks(directories: LocalDirectories, clock: Clock) -> DirectoryLocks:
    return make_locks(directories, clock)


def make_locks(directories: LocalDirectories, clock: Clock, identity: Identity | None = None) -> DirectoryLocks:
    return DirectoryLocks(directories, "one", identity=identity, monotonic=clock, wait=clock.wait)


def ended() -> Identity:
    """Of a process of this machine that has ended."""
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return replace(own_identity(), pid=int(process.stdout), started=1)


def left_by(directories: LocalDirectories, identity: Identity) -> None:
    """A lock that this process took and never let go of."""
    make_locks(directories, Clock(), identity).acquire(LOCK, "publish a", 0)


def test_a_lock_has_one_holder_who_is_named_to_those_who_wait(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock
) -> None:
    with locks.acquire(LOCK, "publish a", 0):
        holder = locks.holder(LOCK)
        assert holder is not None and (holder.pid, holder.operation) == (os.getpid(), "publish a")
        with pytest.raises(LockTimeout, match=rf"one/{LOCK} is held by .*pid {os.getpid()} .* for publish a"):
            locks.acquire(LOCK, "purge a", 5)
        assert clock.now >= 5
    assert locks.holder(LOCK) is None
    assert list(directories.root.iterdir()) == []


def test_of_many_who_try_at_once_one_has_it_at_a_time(directories: LocalDirectories) -> None:
    locks = DirectoryLocks(directories, "one")
    inside = threading.Lock()

    def work(number: int) -> None:
        with locks.acquire(LOCK, f"work {number}", 60):
            assert inside.acquire(blocking=False), "two holders"
            inside.release()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert list(directories.root.iterdir()) == []


def test_the_lock_of_a_process_that_has_ended_is_taken_over_when_the_server_has_settled(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock
) -> None:
    left_by(directories, ended())
    assert locks.holder(LOCK) is None
    # Not before that: the server may still do what the other one asked it for. Who does not want to wait does so, too.
    with locks.acquire(LOCK, "reap", 0):
        assert SETTLE_SECONDS <= clock.now < PATIENCE_SECONDS
        assert len(list((directories.root / LOCK).iterdir())) == 1
    assert list(directories.root.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(own_identity, id="a living process"),
        pytest.param(lambda: replace(ended(), boot="1" * 16), id="another boot of a machine that cannot be told"),
        pytest.param(lambda: replace(ended(), machine="1" * 16, boot="1" * 16), id="another machine"),
        pytest.param(lambda: replace(ended(), view="1" * 16), id="another namespace"),
    ],
)
def test_the_lock_of_who_may_still_act_is_never_taken(
    directories: LocalDirectories, clock: Clock, other: Callable[[], Identity]
) -> None:
    holder = other()
    left_by(directories, holder)
    locks = make_locks(
        directories, clock, replace(own_identity(), machine="0" * 16, started=own_identity().started + 1)
    )
    for _ in range(3):
        with pytest.raises(LockTimeout, match="remove that directory"):
            locks.acquire(LOCK, "reap", 60)
    assert locks.holder(LOCK) is not None


def test_a_lock_of_the_same_process_is_taken_by_nobody_but_who_took_it(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock
) -> None:
    """One datastore may be configured twice, by its name and by its path in the inventory."""
    with locks.acquire(LOCK, "publish a", 0):
        others = make_locks(directories, clock)
        assert others.holder(LOCK) is not None
        with pytest.raises(LockTimeout, match="for publish a"):
            others.acquire(LOCK, "purge a", 60)


def test_all_locks_of_a_process_that_has_ended_settle_together(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock
) -> None:
    dead = make_locks(directories, Clock(), ended())
    for number in range(5):
        dead.acquire(f"image_{number}.ec_lock", "publish", 0)
    for number in range(5):
        locks.acquire(f"image_{number}.ec_lock", "reap", 0).release()
    assert clock.now < 2 * SETTLE_SECONDS


def test_a_lock_that_cannot_be_taken_over_yet_is_not_said_to_be_of_a_process_that_can_be_ended(
    locks: DirectoryLocks, directories: LocalDirectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(directories, ended())
    monkeypatch.setattr(directories_of_locks, "PATIENCE_SECONDS", 0)
    with pytest.raises(LockTimeout, match="which has ended; gave up after 0 s: try again some seconds later"):
        locks.acquire(LOCK, "reap", 0)


def test_a_host_with_a_path_frees_the_lock_of_a_process_that_has_ended_and_no_other(
    tmp_path: Path, directories: LocalDirectories
) -> None:
    with closing(PosixDatastore("one", str(tmp_path))) as datastore:
        left_by(directories, replace(ended(), machine="1" * 16, boot="1" * 16))
        with pytest.raises(LockTimeout, match="if its host is gone for good, remove that directory"):
            datastore.lock(LOCK, "reap", 0)
        (tmp_path / LOCK).rename(tmp_path / "elsewhere")
        left_by(directories, ended())
        assert datastore.lock_holder(LOCK) is None
        began = time.monotonic()
        with datastore.lock(LOCK, "reap", 0):
            assert time.monotonic() - began >= SETTLE_SECONDS
            assert (tmp_path / LOCK).is_file()
        assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("late", [False, True], ids=["not done", "done"])
def test_a_lock_that_was_freed_without_an_answer_is_nobodys_some_seconds_later(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock, late: bool
) -> None:
    """It may have become this process's, which would never let go of it."""
    left_by(directories, ended())
    assert locks.free_ended(LOCK) is not None  # it settles
    clock.wait(SETTLE_SECONDS)
    directories.away, directories.late = {"rename"}, late
    with pytest.raises(DatastoreUnavailable):
        locks.free_ended(LOCK)
    directories.away = set()
    for _ in range(3):
        locks.let_go_of_left()
        clock.wait(SETTLE_SECONDS)
    assert locks.free_ended(LOCK) is None
    assert list(directories.root.iterdir()) == []


def test_after_a_restart_of_the_machine_its_locks_are_taken_over(directories: LocalDirectories, clock: Clock) -> None:
    own = replace(own_identity(), machine="a" * 16)
    left_by(directories, replace(own, boot="1" * 16, view="1" * 16))
    with make_locks(directories, clock, own).acquire(LOCK, "reap", 30):
        pass
    assert list(directories.root.iterdir()) == []


def test_of_those_who_take_a_lock_over_one_gets_it(directories: LocalDirectories) -> None:
    left_by(directories, ended())
    locks = DirectoryLocks(directories, "one")
    inside = threading.Lock()

    def work(number: int) -> None:
        with locks.acquire(LOCK, f"reap {number}", 60):
            assert inside.acquire(blocking=False), "two holders"
            inside.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list(directories.root.iterdir()) == []


def test_an_unreadable_or_foreign_lock_is_held(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock
) -> None:
    (directories.root / LOCK).mkdir()
    for make in (lambda: None, lambda: (directories.root / LOCK / "somebody").write_text("?")):
        make()
        with pytest.raises(LockTimeout):
            locks.acquire(LOCK, "reap", 60)


def test_the_lock_file_of_a_host_with_a_path_is_a_lock(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock
) -> None:
    (directories.root / LOCK).write_text("")
    with pytest.raises(LockTimeout, match="left no name"):
        locks.acquire(LOCK, "purge a", 1)
    assert (directories.root / LOCK).is_file()


def test_a_host_with_a_path_heeds_the_lock_of_one_without(locks: DirectoryLocks, directories: LocalDirectories) -> None:
    fd = os.open(directories.root, os.O_RDONLY)
    try:
        file_locks = FileLocks(fd, Flock())
        with locks.acquire(LOCK, "publish a", 0):
            assert file_locks.holder(LOCK) == locks.holder(LOCK) is not None
            with pytest.raises(LockTimeout, match="for publish a"):
                file_locks.acquire(LOCK, "purge a", 0)
        with file_locks.acquire(LOCK, "purge a", 0), pytest.raises(LockTimeout, match="for purge a"):
            locks.acquire(LOCK, "publish a", 0)
    finally:
        os.close(fd)


def test_a_directory_lock_that_is_let_go_of_while_a_host_with_a_path_looks_is_no_error(
    locks: DirectoryLocks, directories: LocalDirectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = locks.acquire(LOCK, "publish a", 0)
    listdir = os.listdir

    def let_go_of_first(path: int) -> list[str]:
        held.release()
        return listdir(path)

    fd = os.open(directories.root, os.O_RDONLY)
    try:
        monkeypatch.setattr("sidecar.locks.files.os.listdir", let_go_of_first)
        with FileLocks(fd, Flock()).acquire(LOCK, "purge a", 0):
            assert (directories.root / LOCK).is_file()
    finally:
        os.close(fd)


def test_a_lock_whose_directory_is_not_there_is_told_so(locks: DirectoryLocks) -> None:
    with pytest.raises(FileNotFoundError):
        locks.acquire(f"image_a/{LOCK}", "touch a", 0)


def test_what_ends_the_wait_passes_and_leaves_nothing(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock
) -> None:
    def check() -> None:
        raise OperationCancelled("enough")

    with locks.acquire(LOCK, "publish a", 0):
        with pytest.raises(OperationCancelled):
            locks.acquire(LOCK, "purge a", 100, check)
        assert [path.name for path in directories.root.iterdir()] == [LOCK]


@pytest.mark.parametrize("late", [True, False], ids=["done all the same", "not done"])
def test_a_lock_that_could_not_be_let_go_of_is_let_go_of_later_and_by_nobody_else(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock, late: bool
) -> None:
    held = locks.acquire(LOCK, "publish a", 0)
    directories.away, directories.late = {"rename", "names", "remove_tree"}, late
    held.release()
    locks.let_go_of_left()
    directories.away = set()
    if not late:
        with pytest.raises(LockTimeout):
            locks.acquire(LOCK, "purge a", SETTLE_SECONDS / 2)
    locks.let_go_of_left()
    clock.now += SETTLE_SECONDS
    locks.let_go_of_left()
    with locks.acquire(LOCK, "purge a", 0):
        pass


@pytest.mark.parametrize("late", [True, False], ids=["done all the same", "not done"])
def test_a_lock_of_which_nobody_knows_whether_it_was_taken_is_free_in_the_end(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock, late: bool
) -> None:
    directories.away, directories.late = {"rename", "remove_tree"}, late
    with pytest.raises(DatastoreUnavailable):
        locks.acquire(LOCK, "publish a", 0)
    directories.away = set()
    assert (directories.root / LOCK).exists() == late
    locks.let_go_of_left()
    clock.now += SETTLE_SECONDS
    with locks.acquire(LOCK, "publish a", 0):
        pass
    assert not (directories.root / LOCK).exists()


def test_a_late_answer_to_a_release_takes_nobodys_lock(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock
) -> None:
    held = locks.acquire(LOCK, "publish a", 0)
    directories.away, directories.late = {"rename"}, True  # let go of, and not told so
    held.release()
    directories.away = set()
    with locks.acquire(LOCK, "purge a", 0):
        for _ in range(2):
            locks.let_go_of_left()
            clock.now += SETTLE_SECONDS
        assert (directories.root / LOCK).exists()
        with pytest.raises(LockTimeout):
            locks.acquire(LOCK, "touch a", 0)


def test_a_lock_under_which_the_server_did_not_answer_is_held_until_it_has_settled(
    locks: DirectoryLocks, directories: LocalDirectories, clock: Clock
) -> None:
    """What it was asked for may be done yet: not to what the next holder makes."""
    with pytest.raises(DatastoreUnavailable), locks.acquire(LOCK, "purge a", 0):
        raise DatastoreUnavailable("the server did not answer")
    assert locks.holder(LOCK) is not None
    with pytest.raises(LockTimeout, match="for purge a"):
        locks.acquire(LOCK, "publish a", SETTLE_SECONDS / 2)
    with locks.acquire(LOCK, "publish a", 30):
        assert SETTLE_SECONDS <= clock.now < 10
    assert list(directories.root.iterdir()) == []


def test_many_locks_that_are_left_cost_one_wait_for_a_server_that_is_away(
    locks: DirectoryLocks, directories: LocalDirectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [locks.acquire(f"image_{number}.ec_lock", "touch", 0) for number in range(5)]
    directories.away = {"rename"}
    for each in held:
        each.release()
    asked: list[str] = []

    def names(path: str) -> list[str]:
        asked.append(path)
        raise DatastoreUnavailable("the server did not answer")

    monkeypatch.setattr(directories, "names", names)
    locks.let_go_of_left()
    assert len(asked) == 1


def test_processes_are_not_told_by_the_numbers_of_another_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that has the /proc of its host: there, this number is another process."""
    readlink = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: "1" if path == "/proc/self" else readlink(path))
    one, other = _own.__wrapped__(os.getpid()), _own.__wrapped__(os.getpid())
    assert not one.is_process_of(other)
    assert not replace(one, pid=ended().pid).has_ended(other)


def test_an_identity_is_read_as_it_was_written() -> None:
    own = own_identity()
    text = own.with_token("0123456789abcdef")
    parsed = Identity.parse(text)
    assert parsed is not None and parsed.is_process_of(own) and str(parsed) == text
    assert len(text) < 120  # what a file's name on VMFS may have
    for foreign in ("", "x", text[:-1], f"{text}0", text.replace("-", "_"), "../x"):
        assert Identity.parse(foreign) is None
