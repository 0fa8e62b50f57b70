"""A file lock has one holder, whatever happens to its file, its holder or the disk. Real processes, real flocks."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sidecar
from sidecar.errors import LockTimeout
from sidecar.locks.files import FileLocks
from sidecar.locks.interface import MAX_HOLDER_BYTES, DatastoreLocks, LockHolder

REPOSITORY = Path(sidecar.__file__).parents[1]
SINCE = datetime(2016, 1, 2, 3, 4, 5, tzinfo=UTC)
LOCK = "images/ab.ec_lock"

HOLD = """
import os, sys
from sidecar.locks.files import FileLocks
held = FileLocks(os.open(sys.argv[1], os.O_RDONLY), host="otherhost").acquire(sys.argv[2], "copy image ab", 10)
print("held", flush=True)
sys.stdin.read()
held.release()
"""

INCREMENT = """
import os, sys, threading, time
from sidecar.locks.files import FileLocks
root, threads, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
locks = FileLocks(os.open(root, os.O_RDONLY))
def increment():
    for _ in range(times):
        with locks.acquire("images/ab.ec_lock", "increment", 100):
            os.close(os.open(f"{root}/alone", os.O_CREAT | os.O_EXCL))  # fails when there is another holder
            with open(f"{root}/counter") as file:
                value = int(file.read())
            os.sched_yield()
            with open(f"{root}/counter", "w") as file:
                file.write(str(value + 1))
            os.unlink(f"{root}/alone")
running = [threading.Thread(target=increment) for _ in range(threads)]
print("ready", flush=True)
sys.stdin.readline()
for thread in running: thread.start()
for thread in running: thread.join()
"""

BEYOND_FILE_SIZE_LIMIT = """
import errno, os, resource, sys
from sidecar.locks.files import FileLocks
locks = FileLocks(os.open(sys.argv[1], os.O_RDONLY))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
before = os.listdir("/proc/self/fd")
try:
    locks.acquire(sys.argv[2], "fail", 0)
except OSError as error:
    print(errno.errorcode[error.errno], os.listdir("/proc/self/fd") == before, os.path.exists(sys.argv[2]))
"""


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path


@pytest.fixture
def root_fd(root: Path) -> Iterator[int]:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    before = open_descriptors()
    yield fd
    assert open_descriptors() == before, "a descriptor was leaked"
    os.close(fd)


@pytest.fixture
def locks(root_fd: int) -> DatastoreLocks:
    return FileLocks(root_fd)


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


@contextmanager
def other_process_holding(root: Path, path: str = LOCK) -> Iterator[subprocess.Popen[str]]:
    with start(HOLD, str(root), path) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


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


def test_another_process_excludes_and_is_named(root: Path, locks: DatastoreLocks) -> None:
    with other_process_holding(root) as other:
        message = refused(locks)
        assert str(root / LOCK) in message
        for part in (f"pid {other.pid} on otherhost", "python", "copy image ab", f"since {datetime.now(UTC):%Y}"):
            assert part in message
        assert "try again" in message


def test_kill_9_frees_the_lock_and_the_file_left_behind_is_taken(root: Path, root_fd: int) -> None:
    locks = FileLocks(root_fd)
    with other_process_holding(root) as other:
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


def test_a_lock_waited_for_is_got_when_it_is_released(root: Path, root_fd: int) -> None:
    with other_process_holding(root) as other:

        def release_it(_: float) -> None:
            other.communicate()

        with FileLocks(root_fd, wait=release_it).acquire(LOCK, "after", 10):
            assert other.returncode == 0


def test_every_wait_has_a_limit_and_timeouts_leak_nothing(root: Path, root_fd: int) -> None:
    elapsed = 0.0

    def wait(seconds: float) -> None:
        nonlocal elapsed
        assert seconds > 0
        elapsed += seconds

    with FileLocks(root_fd).acquire(LOCK, "hold", 0):
        before = open_descriptors()
        waiting = FileLocks(root_fd, monotonic=lambda: elapsed, wait=wait)
        with pytest.raises(LockTimeout, match=r"gave up after 30 s"):
            waiting.acquire(LOCK, "wait", 30)
        assert elapsed == pytest.approx(30)
        for _ in range(100):
            refused(waiting)
        assert elapsed == pytest.approx(30), "timeout 0 waited"
        assert open_descriptors() == before


def calling_before_the_first_flock(action: Callable[[], None]) -> Callable[[int, int], None]:
    """The real flock; `action` is what others do between our open of the lock file and our flock."""
    actions = [action]

    def flock(fd: int, operation: int) -> None:
        if actions:
            actions.pop()()
        fcntl.flock(fd, operation)

    return flock


def test_two_holders_when_the_file_is_unlinked_and_recreated_after_our_open(root_fd: int) -> None:
    others = FileLocks(root_fd)
    held = [others.acquire(LOCK, "first", 0)]

    def replace() -> None:
        held.pop().release()
        held.append(others.acquire(LOCK, "third", 0))

    late = FileLocks(root_fd, flock=calling_before_the_first_flock(replace))
    assert "third" in refused(late)
    held.pop().release()
    late.acquire(LOCK, "second", 0).release()


def test_the_file_unlinked_after_our_open_is_not_the_lock_that_we_get(root: Path, root_fd: int) -> None:
    first = FileLocks(root_fd).acquire(LOCK, "first", 0)
    late = FileLocks(root_fd, flock=calling_before_the_first_flock(first.release))
    with late.acquire(LOCK, "second", 0):
        assert (root / LOCK).exists()
        refused(FileLocks(root_fd))


def test_a_file_that_never_stays_at_its_path_is_no_lock_and_no_endless_loop(root: Path, root_fd: int) -> None:
    def flock(fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)
        (root / LOCK).unlink()

    refused(FileLocks(root_fd, flock=flock))


def test_no_update_is_lost_among_processes_and_threads(root: Path) -> None:
    processes, threads, times = 4, 2, 100
    (root / "counter").write_text("0")
    running = [start(INCREMENT, str(root), str(threads), str(times)) for _ in range(processes)]
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


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EIO, errno.EINTR, errno.EBADF, errno.EACCES, errno.ESTALE])
def test_no_flock_error_is_taken_for_success_nor_for_held(root_fd: int, error: int) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    locks = FileLocks(root_fd, flock=flock)
    for attempt in (lambda: locks.acquire(LOCK, "fail", 0), lambda: locks.holder(LOCK)):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == error


def test_the_holder_cannot_be_written_is_an_error_that_leaves_no_lock(root: Path) -> None:
    with start(BEYOND_FILE_SIZE_LIMIT, str(root), str(root / LOCK).removeprefix(f"{root}/")) as process:
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


def test_a_fifo_or_a_directory_at_the_lock_path_is_refused_without_hanging(root: Path, root_fd: int) -> None:
    locks = FileLocks(root_fd)
    os.mkfifo(root / LOCK)
    with pytest.raises(OSError, match="not a regular file"):
        locks.acquire(LOCK, "try", 0)
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


def test_release_does_not_unlink_the_file_of_another(root: Path, root_fd: int) -> None:
    locks = FileLocks(root_fd)
    with locks.acquire(LOCK, "first", 0):
        (root / LOCK).unlink()
        second = locks.acquire(LOCK, "second", 0)
    assert (root / LOCK).exists()
    refused(locks)
    second.release()


def test_a_forked_child_neither_frees_nor_keeps_the_lock(root: Path, root_fd: int) -> None:
    locks = FileLocks(root_fd)
    end_read, end_write = os.pipe()
    left_read, left_write = os.pipe()
    held = locks.acquire(LOCK, "parent", 0)
    (root / "alias").hardlink_to(root / LOCK)
    copy = os.dup(held._fd)  # type: ignore[attr-defined]  # the child keeps this one, as a library's fork might
    child = os.fork()
    if child == 0:
        try:
            os.close(end_write)
            held.release()
            os.write(left_write, b"x")
            os.read(end_read, 1)
        finally:
            os._exit(0)
    os.close(copy)
    os.read(left_read, 1)
    assert "parent" in refused(locks)
    held.release()
    with (root / "alias").open("rb") as same_file:
        fcntl.flock(same_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free, though the child has its copy
    for fd in (end_read, end_write, left_read, left_write):
        os.close(fd)
    os.waitpid(child, 0)


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


def test_a_lock_of_another_program_is_held_by_an_unknown(root: Path, root_fd: int) -> None:
    locks = FileLocks(root_fd)
    (root / LOCK).write_bytes(b"\xff not ours")
    assert locks.holder(LOCK) is None
    with (root / LOCK).open("rb") as foreign:
        fcntl.flock(foreign, fcntl.LOCK_EX)
        assert "left no name" in refused(locks)
        holder = locks.holder(LOCK)
        assert holder is not None
        assert holder.process == "unknown"
        assert abs(holder.since - datetime.now(UTC)) < timedelta(minutes=5)
    (root / LOCK).unlink()


def test_the_holder_s_process_host_and_time(root_fd: int) -> None:
    locks = FileLocks(root_fd, host="here", now=lambda: SINCE)
    with locks.acquire(LOCK, "sweep image ab", 0):
        holder = locks.holder(LOCK)
        assert holder == LockHolder("here", os.getpid(), holder.process if holder else "", "sweep image ab", SINCE)


@pytest.fixture
def full_datastore(tmp_path: Path) -> Iterator[Path]:
    mountpoint = tmp_path / "full"
    mountpoint.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mountpoint)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("may not mount")
    try:
        (mountpoint / "images").mkdir()
        with pytest.raises(OSError) as caught, (mountpoint / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        assert caught.value.errno == errno.ENOSPC
        yield mountpoint
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)


def test_a_full_datastore_can_still_be_locked(full_datastore: Path) -> None:
    root_fd = os.open(full_datastore, os.O_RDONLY | os.O_DIRECTORY)
    try:
        locks = FileLocks(root_fd)
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
    root: Path, root_fd: int, caplog: pytest.LogCaptureFixture
) -> None:
    locks = FileLocks(root_fd)
    held = locks.acquire(LOCK, "first", 0)
    (root / "images").rename(root / "moved")
    (root / "images").write_text("not a directory any more")
    held.release()
    assert f"lock file left behind path={LOCK}" in caplog.text
    (root / "images").unlink()
    (root / "moved").rename(root / "images")
    locks.acquire(LOCK, "second", 0).release()


@given(st.binary(max_size=300))
def test_any_bytes_give_a_holder_or_none(content: bytes) -> None:
    assert LockHolder.from_bytes(content) is None


@pytest.mark.parametrize(
    "content",
    [b"[" * 4000, b"1" * 4096, b"null", b"[]", b'"host"', b"{}",
     b'{"host":"h","pid":true,"process":"p","operation":"o","since":"2016-01-02T03:04:05+00:00"}',
     b'{"host":"h","pid":1.0,"process":"p","operation":"o","since":"2016-01-02T03:04:05+00:00"}',
     b'{"host":"h","pid":0,"process":"p","operation":"o","since":"2016-01-02T03:04:05+00:00"}',
     b'{"host":7,"pid":1,"process":"p","operation":"o","since":"2016-01-02T03:04:05+00:00"}',
     b'{"host":"h","pid":1,"process":"p","operation":"o","since":"2016-01-02T03:04:05"}',
     b'{"host":"h","pid":1,"process":"p","operation":"o","since":"0001-01-01T00:00:00+23:59"}',
     b'{"host":"h","pid":1,"process":"p","operation":"o","since":5}'],
)  # fmt: skip
def test_bytes_that_are_nearly_a_holder_give_none(content: bytes) -> None:
    assert LockHolder.from_bytes(content) is None


texts = st.text(st.characters(), max_size=2000)


@given(texts, st.integers(1, 2**31), texts, texts, st.datetimes(timezones=st.just(UTC)))
def test_a_holder_survives_its_bytes_within_the_bound(
    host: str, pid: int, process: str, operation: str, since: datetime
) -> None:
    holder = LockHolder(host, pid, process, operation, since)
    content = holder.to_bytes()
    assert len(content) <= MAX_HOLDER_BYTES
    assert LockHolder.from_bytes(content) == holder
    assert LockHolder.from_bytes(content + b" " * MAX_HOLDER_BYTES) is None
    assert str(holder).isprintable()
