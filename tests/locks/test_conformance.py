"""What every kind of lock promises: one holder, whatever happens to its file, its holder or the disk.

Real processes, and real exclusion by the kernel; of the open flag of ESX, which Linux does not have, emulated.
"""

import contextlib
import errno
import fcntl
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sidecar.errors import LockTimeout, OperationCancelled
from sidecar.locks.files import ASKED_SECONDS, FileLocks
from sidecar.locks.interface import DatastoreLocks, LockHolder
from sidecar.locks.kinds import LOCK_KINDS
from tests.locks.support import (
    KINDS,
    LOCK,
    Kind,
    forked_with_a_copy_of,
    open_descriptors,
    other_process_holding,
    start,
)
from tests.support.processes import loop_mount

SINCE = datetime(2016, 1, 2, 3, 4, 5, tzinfo=UTC)

INCREMENT = """
import os, sys, threading, time
from sidecar.locks.files import FileLocks
from tests.locks.support import KINDS
_, kind, root, threads, times = sys.argv
locks = FileLocks(os.open(root, os.O_RDONLY), KINDS[kind].make())
def increment():
    for _ in range(int(times)):
        with locks.acquire("images/ab.ec_lock", "increment", 100):
            os.close(os.open(f"{root}/alone", os.O_CREAT | os.O_EXCL))  # fails when there is another holder
            with open(f"{root}/counter") as file:
                value = int(file.read())
            os.sched_yield()
            with open(f"{root}/counter", "w") as file:
                file.write(str(value + 1))
            os.unlink(f"{root}/alone")
running = [threading.Thread(target=increment) for _ in range(int(threads))]
print("ready", flush=True)
sys.stdin.readline()
for thread in running: thread.start()
for thread in running: thread.join()
"""

ASK_AGAIN_AND_AGAIN = """
import os, sys
from sidecar.locks.files import FileLocks
from tests.locks.support import KINDS
_, kind, root, path = sys.argv
locks = FileLocks(os.open(root, os.O_RDONLY), KINDS[kind].make())
print("asking", flush=True)
while True:
    locks.holder(path)
"""

BEYOND_FILE_SIZE_LIMIT = """
import errno, os, resource, sys
from sidecar.locks.files import FileLocks
from tests.locks.support import KINDS
_, kind, root, path = sys.argv
locks = FileLocks(os.open(root, os.O_RDONLY), KINDS[kind].make())
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
before = os.listdir("/proc/self/fd")
try:
    locks.acquire(path, "fail", 0)
except OSError as error:
    print(errno.errorcode[error.errno], os.listdir("/proc/self/fd") == before, os.path.exists(path))
"""


@pytest.fixture(params=KINDS.values(), ids=lambda kind: kind.id)
def kind(request: pytest.FixtureRequest) -> Kind:
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture
def locks(root_fd: int, kind: Kind) -> DatastoreLocks:
    return FileLocks(root_fd, kind.make())


def refused(locks: DatastoreLocks, path: str = LOCK) -> str:
    with pytest.raises(LockTimeout) as caught:
        locks.acquire(path, "try", 0)
    return caught.value.message


def test_acquire_release_and_acquire_again(root: Path, locks: DatastoreLocks) -> None:
    for _ in range(3):
        with locks.acquire(LOCK, "publish image ab", 0) as held:
            assert held.path == LOCK
            assert (root / LOCK).exists()
        assert not (root / LOCK).exists()
        held.release()  # a second time: nothing


def test_the_block_s_error_passes_and_the_lock_is_free(locks: DatastoreLocks) -> None:
    with pytest.raises(ZeroDivisionError), locks.acquire(LOCK, "fail", 0):
        raise ZeroDivisionError
    locks.acquire(LOCK, "again", 0).release()


def test_two_threads_of_one_process_exclude_each_other(locks: DatastoreLocks) -> None:
    has_it, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with locks.acquire(LOCK, "hold", 0):
            has_it.set()
            let_go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert has_it.wait(30)
    refused(locks)
    let_go.set()
    locks.acquire(LOCK, "after", 30).release()
    thread.join()


def test_another_process_excludes_and_is_named(root: Path, locks: DatastoreLocks, kind: Kind) -> None:
    with other_process_holding(root, kind=kind.id) as other:
        message = refused(locks)
        assert str(root / LOCK) in message
        for part in (f"pid {other.pid} on otherhost", "python", "copy image ab", f"since {datetime.now(UTC):%Y}"):
            assert part in message
        assert "try again" in message


def test_kill_9_frees_the_lock_and_the_file_left_behind_is_taken(root: Path, locks: DatastoreLocks, kind: Kind) -> None:
    with other_process_holding(root, kind=kind.id) as other:
        holder = locks.holder(LOCK)
        assert holder is not None
        assert (holder.pid, holder.operation) == (other.pid, "copy image ab")
        other.kill()
        other.wait()
        assert (root / LOCK).exists()
        assert locks.holder(LOCK) is None
        locks.acquire(LOCK, "after", 0).release()
    assert not (root / LOCK).exists()
    assert locks.holder(LOCK) is None


def test_a_lock_waited_for_is_got_when_it_is_released(root: Path, root_fd: int, kind: Kind) -> None:
    with other_process_holding(root, kind=kind.id) as other:

        def release_it(_: float) -> None:
            other.communicate()

        with FileLocks(root_fd, kind.make(), wait=release_it).acquire(LOCK, "after", 10):
            assert other.returncode == 0


def test_every_wait_has_a_limit_and_timeouts_leak_nothing(root_fd: int, locks: DatastoreLocks, kind: Kind) -> None:
    elapsed = 0.0

    def wait(seconds: float) -> None:
        nonlocal elapsed
        assert seconds > 0
        elapsed += seconds

    with locks.acquire(LOCK, "hold", 0):
        before = open_descriptors()
        waiting = FileLocks(root_fd, kind.make(), monotonic=lambda: elapsed, wait=wait)
        with pytest.raises(LockTimeout, match=r"gave up after 30 s"):
            waiting.acquire(LOCK, "wait", 30)
        assert elapsed == pytest.approx(30)
        for _ in range(100):
            refused(waiting)
        assert elapsed <= 30 + 100 * ASKED_SECONDS + 1e-6, "timeout 0 waited for the holder"
        assert open_descriptors() == before


def test_who_waits_can_be_called_off_at_every_step(root_fd: int, locks: DatastoreLocks, kind: Kind) -> None:
    waits = 0

    def wait(_: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 8:
            raise OperationCancelled("interrupted")

    def check() -> None:
        if waits == 3:
            raise ZeroDivisionError

    with locks.acquire(LOCK, "hold", 0):
        before = open_descriptors()
        waiting = FileLocks(root_fd, kind.make(), wait=wait)
        with pytest.raises(ZeroDivisionError):
            waiting.acquire(LOCK, "wait", 30, check)
        assert waits == 3
        with pytest.raises(OperationCancelled):
            waiting.acquire(LOCK, "wait", 30)
        assert open_descriptors() == before
    waiting.acquire(LOCK, "a free lock is not waited for", 30, check).release()
    assert waits == 8


def test_nobody_is_refused_because_others_ask_who_holds_it(root: Path, locks: DatastoreLocks, kind: Kind) -> None:
    with start(ASK_AGAIN_AND_AGAIN, kind.id, str(root), LOCK) as asking:
        try:
            assert asking.stdout
            assert asking.stdout.readline() == "asking\n"
            for _ in range(500):
                (root / LOCK).touch()  # left behind by a dead process: who asks has to try it
                locks.acquire(LOCK, "try", 0).release()
        finally:
            asking.kill()


def once(action: Callable[[], None]) -> Callable[[], None]:
    """`action`, when it is called first; nothing after that."""
    actions = [action]
    return lambda: actions.pop()() if actions else None


def test_two_holders_when_the_file_is_unlinked_and_recreated_after_our_open(
    root_fd: int, locks: DatastoreLocks, kind: Kind
) -> None:
    held = [locks.acquire(LOCK, "first", 0)]

    def replace() -> None:
        held.pop().release()
        held.append(locks.acquire(LOCK, "third", 0))

    late = FileLocks(root_fd, kind.make(before=once(replace)))
    assert "third" in refused(late)
    held.pop().release()
    late.acquire(LOCK, "second", 0).release()


def test_the_file_unlinked_after_our_open_is_not_the_lock_that_we_get(
    root: Path, root_fd: int, locks: DatastoreLocks, kind: Kind
) -> None:
    first = locks.acquire(LOCK, "first", 0)
    late = FileLocks(root_fd, kind.make(before=once(first.release)))
    with late.acquire(LOCK, "second", 0):
        assert (root / LOCK).exists()
        refused(locks)


def test_a_file_that_never_stays_at_its_path_is_no_lock_and_no_endless_loop(
    root: Path, root_fd: int, kind: Kind
) -> None:
    refused(FileLocks(root_fd, kind.make(after=lambda: (root / LOCK).unlink(missing_ok=True))))


def test_no_update_is_lost_among_processes_and_threads(root: Path, kind: Kind) -> None:
    processes, threads, times = 4, 2, 100
    (root / "counter").write_text("0")
    running = [start(INCREMENT, kind.id, str(root), str(threads), str(times)) for _ in range(processes)]
    for process in running:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.communicate()
        assert process.returncode == 0
    assert (root / "counter").read_text() == str(processes * threads * times)
    assert list((root / "images").iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [errno.EIO, errno.ENOSPC, errno.ESTALE, errno.ENOLCK, errno.EINTR, errno.EBADF, errno.EACCES, errno.EAGAIN,
     errno.EBUSY],
    ids=errno.errorcode.get,
)  # fmt: skip
def test_no_error_is_taken_for_success_and_none_but_one_for_held(
    root: Path, root_fd: int, kind: Kind, error: int
) -> None:
    def fail() -> None:
        raise OSError(error, os.strerror(error))

    (root / LOCK).touch()
    locks = FileLocks(root_fd, kind.make(before=fail))
    if error == kind.held:
        assert "left no name" in refused(locks)
        assert locks.holder(LOCK) is not None
        return
    for attempt in (lambda: locks.acquire(LOCK, "fail", 0), lambda: locks.holder(LOCK)):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == error


def test_the_holder_cannot_be_written_is_an_error_that_leaves_no_lock(root: Path, kind: Kind) -> None:
    with start(BEYOND_FILE_SIZE_LIMIT, kind.id, str(root), str(root / LOCK).removeprefix(f"{root}/")) as process:
        output, _ = process.communicate()
    assert output == "EFBIG True False\n"
    assert list((root / "images").iterdir()) == []


def test_a_missing_directory_is_file_not_found(locks: DatastoreLocks) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        locks.acquire("image_a/lock.ec_lock", "delete", 10)
    assert caught.value.filename == "image_a/lock.ec_lock"


@pytest.mark.parametrize("target", ["victim", "absent"])
def test_a_link_planted_at_the_lock_path_is_refused(root: Path, locks: DatastoreLocks, target: str) -> None:
    (root / "images" / "victim").write_text("precious")
    (root / LOCK).symlink_to(target)
    with pytest.raises(OSError) as caught:
        locks.acquire(LOCK, "try", 0)
    assert caught.value.errno == errno.ELOOP
    assert (root / "images" / "victim").read_text() == "precious"
    assert not (root / "images" / "absent").exists()


def test_a_link_planted_as_a_parent_is_refused(root: Path, locks: DatastoreLocks) -> None:
    (root / "link").symlink_to("images")
    with pytest.raises(NotADirectoryError):
        locks.acquire("link/ab.ec_lock", "try", 0)


def test_a_fifo_or_a_directory_at_the_lock_path_is_refused_without_hanging(root: Path, locks: DatastoreLocks) -> None:
    os.mkfifo(root / LOCK)
    with pytest.raises(OSError) as caught:
        locks.acquire(LOCK, "try", 0)
    assert caught.value.errno in (errno.EISDIR, errno.EINVAL)  # the latter: no direct I/O with it
    with contextlib.suppress(OSError):
        assert locks.holder(LOCK) is None
    (root / LOCK).unlink()
    (root / LOCK).mkdir()
    with pytest.raises(IsADirectoryError):
        locks.acquire(LOCK, "try", 0)


def test_a_directory_removed_while_locked_releases_quietly(root: Path, locks: DatastoreLocks) -> None:
    (root / "image_a").mkdir()
    with locks.acquire("image_a/lock.ec_lock", "purge", 0):
        (root / "image_a" / "lock.ec_lock").unlink()
        (root / "image_a").rmdir()


def test_release_does_not_unlink_the_file_of_another(root: Path, locks: DatastoreLocks) -> None:
    with locks.acquire(LOCK, "first", 0):
        (root / LOCK).unlink()
        second = locks.acquire(LOCK, "second", 0)
    assert (root / LOCK).exists()
    refused(locks)
    second.release()


def test_a_forked_child_neither_frees_nor_keeps_the_lock(locks: DatastoreLocks) -> None:
    held = locks.acquire(LOCK, "parent", 0)
    with forked_with_a_copy_of(held):
        assert "parent" in refused(locks)
        held.release()
        locks.acquire(LOCK, "free, though the child has its copy", 0).release()


def test_a_program_that_we_start_does_not_inherit_the_lock(root: Path, locks: DatastoreLocks) -> None:
    held = locks.acquire(LOCK, "parent", 0)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as program:
        assert program.stdin
        assert program.stdout
        program.stdin.write(b"running\n")
        program.stdin.flush()
        program.stdout.readline()
        targets = [os.readlink(f"/proc/{program.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{program.pid}/fd")]
        assert not any(target.startswith(str(root / "images")) for target in targets)
        program.stdin.close()
    held.release()


def test_a_lock_of_another_program_is_held_by_an_unknown(root: Path, locks: DatastoreLocks) -> None:
    (root / LOCK).write_bytes(b"\xff not ours")
    assert locks.holder(LOCK) is None
    with (root / LOCK).open("rb") as foreign:
        fcntl.flock(foreign, fcntl.LOCK_EX)  # what the emulated open is made of, too
        assert "left no name" in refused(locks)
        holder = locks.holder(LOCK)
        assert holder is not None
        assert holder.process == "unknown"
        assert abs(holder.since - datetime.now(UTC)) < timedelta(minutes=5)
    (root / LOCK).unlink()


def test_the_holder_s_process_host_and_time(root_fd: int, kind: Kind) -> None:
    locks = FileLocks(root_fd, kind.make(), host="here", now=lambda: SINCE)
    with locks.acquire(LOCK, "sweep image ab", 0):
        holder = locks.holder(LOCK)
        assert holder == LockHolder("here", os.getpid(), holder.process if holder else "", "sweep image ab", SINCE)


def test_what_a_dead_holder_wrote_is_not_read_after_a_shorter_name(root: Path, locks: DatastoreLocks) -> None:
    (root / LOCK).write_bytes(LockHolder("h" * 253, 1, "p" * 64, "o" * 512, SINCE).to_bytes() + b"x" * 8000)
    with locks.acquire(LOCK, "touch ab", 0):
        holder = locks.holder(LOCK)
        assert holder is not None
        assert holder.operation == "touch ab"


@pytest.fixture
def full_datastore(tmp_path: Path) -> Iterator[Path]:
    with loop_mount(tmp_path / "full", 4 << 20, ("mkfs.ext4", "-q")) as mountpoint:
        (mountpoint / "images").mkdir()
        with pytest.raises(OSError) as caught, (mountpoint / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        assert caught.value.errno == errno.ENOSPC
        yield mountpoint


def test_a_full_datastore_can_still_be_locked(full_datastore: Path, kind: Kind) -> None:
    root_fd = os.open(full_datastore, os.O_RDONLY | os.O_DIRECTORY)
    try:
        locks = FileLocks(root_fd, kind.make())
        with locks.acquire(LOCK, "delete image ab", 0):
            assert (full_datastore / LOCK).read_bytes() == b""
            assert "left no name" in refused(locks)
            holder = locks.holder(LOCK)
            assert holder is not None
            assert holder.process == "unknown"
        assert not (full_datastore / LOCK).exists()
    finally:
        os.close(root_fd)


def test_a_file_that_cannot_be_removed_is_logged_and_harms_nobody(
    root: Path, locks: DatastoreLocks, caplog: pytest.LogCaptureFixture
) -> None:
    held = locks.acquire(LOCK, "first", 0)
    (root / "images").rename(root / "moved")
    (root / "images").write_text("not a directory any more")
    held.release()
    assert f"lock file left behind path={LOCK}" in caplog.text
    (root / "images").unlink()
    (root / "moved").rename(root / "images")
    locks.acquire(LOCK, "second", 0).release()


def test_every_kind_that_can_be_configured_is_in_this_suite() -> None:
    assert set(KINDS) == set(LOCK_KINDS)
