"""Open disks are seen, named, and never taken away from under their readers. Real QEMU, real OFD locks."""

import contextlib
import errno
import fcntl
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

import sidecar
from sidecar.cli import raise_open_files_limit
from sidecar.datastores.open_files import (
    UNSEEN_USER,
    FilesInUse,
    FileUser,
    describe,
    exclude_users,
    open_users,
    share_lock,
)
from sidecar.datastores.posix import PosixDatastore
from sidecar.errors import DatastoreUnavailable, InvalidRequest

REPOSITORY = Path(sidecar.__file__).parents[1]

ASK = """
import os, sys
from sidecar.datastores.open_files import describe, open_users
print(describe(open_users([os.open(sys.argv[1], os.O_RDONLY)])))
"""

SHARE = """
import os, sys
from sidecar.datastores.open_files import share_lock
share_lock(os.open(sys.argv[1], os.O_RDONLY))
print("shared", flush=True)
sys.stdin.read()
"""


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{script}", *arguments]


@pytest.fixture
def files() -> Iterator[ExitStack]:
    """Closes what `opened` opens."""
    with ExitStack() as stack:
        yield stack


def opened(files: ExitStack, path: Path, flags: int = os.O_RDWR) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    files.callback(os.close, fd)
    return fd


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    path.write_bytes(bytes(512))
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A VMDK descriptor; its extent is `a-flat.vmdk`."""
    path = tmp_path / "a.vmdk"
    command = ["qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", str(path), "1M"]
    subprocess.run(command, check=True)
    return path


def extent_of(disk: Path) -> Path:
    return disk.with_name("a-flat.vmdk")


@contextmanager
def reading_with_qemu_io(disk: Path) -> Iterator[subprocess.Popen[str]]:
    command = ["qemu-io", "-r", "-f", "vmdk", str(disk)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "1 MiB" in process.stdout.readline()  # it answers: it has opened the disk
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def serving_with_qemu_nbd(disk: Path) -> Iterator[int]:
    pid_file = disk.with_suffix(".pid")
    socket = disk.with_suffix(".socket")
    command = ["qemu-nbd", "--read-only", "--shared=4", "--persistent", "--fork", f"--pid-file={pid_file}"]
    subprocess.run([*command, "--format=vmdk", f"--socket={socket}", str(disk)], check=True)
    pid = int(pid_file.read_text())
    pidfd = os.pidfd_open(pid)
    try:
        yield pid
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], 30)
        os.close(pidfd)


@contextmanager
def sharing_process(path: Path, script: str = SHARE) -> Iterator[subprocess.Popen[str]]:
    command = python(script, str(path))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "shared\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_file_that_nobody_uses(files: ExitStack, plain: Path) -> None:
    fd = opened(files, plain)
    assert open_users([fd]) == ()
    assert open_users([]) == ()
    with exclude_users([fd]):
        pass


def test_qemu_nbd_is_seen_and_named_on_descriptor_and_extent(files: ExitStack, disk: Path) -> None:
    for flags in (os.O_RDONLY, os.O_RDWR):
        descriptor, extent = opened(files, disk, flags), opened(files, extent_of(disk), flags)
        with serving_with_qemu_nbd(disk) as pid:
            for fds in ([descriptor], [extent], [descriptor, extent]):
                (user,) = open_users(fds)
                assert (user.pid, user.process) == (pid, "qemu-nbd")
        assert open_users([descriptor, extent]) == ()


def test_an_overlay_s_backing_image_is_in_use(files: ExitStack, disk: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(disk), "-F", "vmdk", str(overlay)]
    subprocess.run(create, check=True)
    command = ["qemu-io", "-f", "qcow2", str(overlay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("length\n")
        process.stdin.flush()
        process.stdout.readline()
        assert [user.pid for user in open_users([opened(files, extent_of(disk))])] == [process.pid]
        process.kill()


def test_a_disk_is_not_taken_from_under_qemu(files: ExitStack, disk: Path) -> None:
    descriptor, extent = opened(files, disk), opened(files, extent_of(disk))
    with reading_with_qemu_io(disk) as reader, serving_with_qemu_nbd(disk) as server:
        for fds in ([descriptor, extent], [extent, descriptor], [extent]):
            with pytest.raises(FilesInUse) as caught, exclude_users(fds):
                pytest.fail("got it")
            assert {user.pid for user in caught.value.users} == {reader.pid, server}
            assert f"qemu-io (pid {reader.pid})" in str(caught.value)
    with exclude_users([descriptor, extent]):
        pass


@pytest.mark.parametrize("excluded", ["a.vmdk", "a-flat.vmdk"])
def test_no_new_qemu_reader_while_a_disk_is_taken_away(files: ExitStack, disk: Path, excluded: str) -> None:
    read = ["qemu-io", "-r", "-f", "vmdk", "-c", "read 0 512", str(disk)]
    with exclude_users([opened(files, disk.with_name(excluded))]):
        refused = subprocess.run(read, check=False, capture_output=True, text=True)
        assert refused.returncode != 0
        assert "lock" in refused.stderr
    assert subprocess.run(read, check=False, capture_output=True).returncode == 0


def test_no_new_reader_of_ours_while_a_file_is_taken_away(files: ExitStack, plain: Path) -> None:
    reader = opened(files, plain, os.O_RDONLY)
    with exclude_users([opened(files, plain)]):
        with pytest.raises(BlockingIOError):
            share_lock(reader)
        result = subprocess.run(python(SHARE, str(plain)), check=False, capture_output=True, text=True)
        assert "BlockingIOError" in result.stderr
    share_lock(reader)


def test_a_reader_of_ours_is_an_open_user_until_it_ends(files: ExitStack, plain: Path) -> None:
    fd = opened(files, plain)
    with sharing_process(plain) as reader:
        assert [user.pid for user in open_users([fd])] == [reader.pid]
        with pytest.raises(FilesInUse), exclude_users([fd]):
            pytest.fail("got it")
        reader.kill()
        reader.wait()
        with exclude_users([fd]):
            pass


def test_this_process_s_own_readers_count_but_not_the_one_that_asks(files: ExitStack, plain: Path) -> None:
    reader, asking = opened(files, plain, os.O_RDONLY), opened(files, plain)
    share_lock(reader)
    assert open_users([reader]) == ()
    for fd in (asking, opened(files, plain, os.O_RDONLY)):
        assert [user.pid for user in open_users([fd])] == [os.getpid()]
    with pytest.raises(FilesInUse), exclude_users([asking]):
        pytest.fail("got it")


def test_a_reader_s_lock_outlives_other_descriptors_of_the_file(files: ExitStack, plain: Path) -> None:
    share_lock(opened(files, plain, os.O_RDONLY))
    os.close(os.open(plain, os.O_RDWR))  # a record lock of POSIX would be lost here
    assert open_users([opened(files, plain)])


def test_our_reader_and_qemu_s_share(files: ExitStack, disk: Path) -> None:
    for path in (disk, extent_of(disk)):
        share_lock(opened(files, path, os.O_RDONLY))
    with reading_with_qemu_io(disk) as reader:
        users = open_users([opened(files, disk)])
        assert {user.pid for user in users} == {os.getpid(), reader.pid}


def test_readers_share(files: ExitStack, plain: Path) -> None:
    for _ in range(2):
        share_lock(opened(files, plain, os.O_RDONLY))


def test_a_process_that_only_has_the_file_open_is_not_blamed(files: ExitStack, plain: Path) -> None:
    fd = opened(files, plain)
    with plain.open("rb") as bystander, subprocess.Popen(["cat"], stdin=bystander, stdout=subprocess.PIPE) as cat:
        with sharing_process(plain) as reader:
            assert [user.pid for user in open_users([fd])] == [reader.pid]
        cat.communicate()


def test_flock_is_not_taken_for_a_reader(files: ExitStack, plain: Path) -> None:
    fcntl.flock(opened(files, plain), fcntl.LOCK_EX)
    assert open_users([opened(files, plain)]) == ()


def test_a_refusal_half_way_and_an_error_in_the_block_release_everything(files: ExitStack, tmp_path: Path) -> None:
    free, busy = tmp_path / "free", tmp_path / "busy"
    for path in (free, busy):
        path.touch()
    share_lock(opened(files, busy, os.O_RDONLY))
    free_fd = opened(files, free)
    with pytest.raises(FilesInUse), exclude_users([free_fd, opened(files, busy)]):
        pytest.fail("got it")
    share_lock(opened(files, free, os.O_RDONLY))

    other = tmp_path / "other"
    other.touch()
    with pytest.raises(ZeroDivisionError), exclude_users([opened(files, other)]):
        raise ZeroDivisionError
    share_lock(opened(files, other, os.O_RDONLY))


def test_a_refusal_names_the_reader_and_not_the_one_that_was_refused(files: ExitStack, tmp_path: Path) -> None:
    free, busy = tmp_path / "free", tmp_path / "busy"
    for path in (free, busy):
        path.touch()
    with sharing_process(busy) as reader:
        with pytest.raises(FilesInUse) as caught, exclude_users([opened(files, free), opened(files, busy)]):
            pytest.fail("got it")
        assert [user.pid for user in caught.value.users] == [reader.pid]


def test_two_purges_exclude_each_other(files: ExitStack, plain: Path) -> None:
    with exclude_users([opened(files, plain)]):
        with pytest.raises(FilesInUse) as caught, exclude_users([opened(files, plain)]):
            pytest.fail("got it")
        assert [user.pid for user in caught.value.users] == [os.getpid()]


def test_a_read_only_descriptor_cannot_exclude_and_says_so(files: ExitStack, plain: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"), exclude_users([opened(files, plain, os.O_RDONLY)]):
        pytest.fail("got it")


def test_a_reader_out_of_sight_is_still_a_reader(files: ExitStack, plain: Path) -> None:
    hide = ["unshare", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0 or subprocess.run([*hide, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("may not make a PID namespace")
    share_lock(opened(files, plain, os.O_RDONLY))
    answer = subprocess.run([*hide, *python(ASK, str(plain))], check=True, capture_output=True, text=True)
    assert answer.stdout == f"{UNSEEN_USER}\n"


def test_describe() -> None:
    users = [FileUser(pid, "qemu-nbd") for pid in range(1, 8)]
    assert describe(users[:1]) == "qemu-nbd (pid 1)"
    assert describe([users[0], UNSEEN_USER]) == f"qemu-nbd (pid 1), {UNSEEN_USER.process}"
    assert describe(users).endswith("qemu-nbd (pid 5) and 2 more")


def test_a_name_longer_than_the_kernel_keeps_is_completed(files: ExitStack, plain: Path, tmp_path: Path) -> None:
    program = tmp_path / "a-program-with-a-long-name"
    shutil.copy("/bin/cat", program)
    with plain.open("rb") as shared:
        share_lock(shared.fileno())
        with subprocess.Popen([program], stdin=subprocess.PIPE, pass_fds=[shared.fileno()]) as running:
            users = open_users([opened(files, plain)])
            assert [user.process for user in users if user.pid == running.pid] == [program.name]


def test_a_lock_that_cannot_be_undone_does_not_undo_what_was_done_under_it(plain: Path) -> None:
    fd = os.open(plain, os.O_RDWR)
    with exclude_users([fd]):
        os.close(fd)


@pytest.fixture
def datastore(files: ExitStack, tmp_path: Path) -> PosixDatastore:
    (tmp_path / "root" / "image_a").mkdir(parents=True)
    (tmp_path / "root" / "image_a" / "a.vmdk").write_bytes(b"x")
    datastore = files.enter_context(closing(PosixDatastore("one", str(tmp_path / "root"))))
    datastore.check()
    return datastore


def test_a_file_whose_attributes_cannot_be_read_stays_open_in_nobody(
    datastore: PosixDatastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = os.listdir("/proc/self/fd")
    for call in (datastore.open_readable, datastore.open_writable, lambda path: datastore.read_file(path, 1)):
        with monkeypatch.context() as patched, contextlib.suppress(DatastoreUnavailable):
            patched.setattr(os, "fstat", fail)
            call("image_a/a.vmdk")
            raise AssertionError("the fault was met")
    assert os.listdir("/proc/self/fd") == before


def test_too_many_files_are_counted_and_not_listed(datastore: PosixDatastore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        with pytest.raises(DatastoreUnavailable, match="1100 files in image_a") as caught:
            datastore.users(["image_a/a.vmdk"] * 1100, "a")
        assert "a.vmdk" not in str(caught.value)
        raise_open_files_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_tree_without_end_is_refused_before_it_uses_up_the_descriptors(datastore: PosixDatastore) -> None:
    deep = f"trash{'/d' * 200}"
    datastore.make_directory(deep, parents=True)
    with pytest.raises(InvalidRequest, match="nested deeper"):
        datastore.remove_tree("trash")
    datastore.make_directory(f"shallow{'/d' * 50}", parents=True)
    datastore.remove_tree("shallow")
    assert "shallow" not in datastore.names("")


def test_a_file_that_is_just_being_closed_is_waited_for(files: ExitStack, plain: Path) -> None:
    """`cat` through the mount, then a purge: the mount hears of the close when cat has ended."""
    reader = os.open(plain, os.O_RDONLY | os.O_CLOEXEC)
    share_lock(reader)
    waiting = threading.Event()

    def close_it() -> None:
        waiting.wait(10)
        os.close(reader)

    closing = threading.Thread(target=close_it)
    closing.start()
    try:
        with pytest.raises(FilesInUse), exclude_users([opened(files, plain)], patience=0.05):
            pytest.fail("got it")
        waiting.set()
        with exclude_users([opened(files, plain)], patience=10):
            pass
    finally:
        waiting.set()
        closing.join()


@pytest.mark.parametrize("daemon", [False, True], ids=["a process", "a FUSE daemon"])
def test_only_whose_close_is_heard_of_late_is_waited_for(files: ExitStack, plain: Path, daemon: bool) -> None:
    """A purge of what a VM has open took a second longer, to be refused all the same."""
    script = f"import os\nos.open('/dev/fuse', os.O_RDWR)\n{SHARE}" if daemon else SHARE
    with sharing_process(plain, script) as process:
        began = time.monotonic()
        with pytest.raises(FilesInUse, match=rf"pid {process.pid}"), exclude_users([opened(files, plain)], patience=2):
            pytest.fail("got it")
        assert (time.monotonic() - began >= 2) == daemon


def test_whoever_waits_for_one_file_keeps_nobody_out_of_another(files: ExitStack, disk: Path) -> None:
    """A refused purge would else be a second in which no VM can start from the image."""
    reader = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    share_lock(reader)
    extent, descriptor = opened(files, extent_of(disk)), opened(files, disk)
    refused = threading.Event()

    def purge() -> None:
        with suppress(FilesInUse), exclude_users([extent, descriptor], patience=0.5):
            return
        refused.set()

    purging = threading.Thread(target=purge)
    purging.start()
    try:
        while not refused.is_set():
            with open(extent_of(disk), "rb") as other:
                share_lock(other.fileno())
    finally:
        purging.join()
        os.close(reader)
