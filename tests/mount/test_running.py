"""The daemon: how it starts, what stops it, what it survives, and both bindings."""

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.mount.harness import log_of, names, published_as, wait_listed
from tests.support.disks import assert_same_disk, import_image, make_disk
from tests.support.processes import BIN, Mount, Sidecar, is_mounted, run, wait_until

MakeImage = Callable[[str], Path]


def image_mount(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(BIN / "image-mount", *arguments, check=False)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "daemon"
    path.mkdir()
    yield path
    if is_mounted(path):
        run("umount", "--lazy", path)


def daemon_of(mountpoint: Path) -> int:
    """The process id of the daemon that serves the mount."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(mountpoint) in arguments and any(b"image-mount" in argument for argument in arguments):
            return int(process.name)
    raise AssertionError(f"nobody serves {mountpoint}")


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_unmounting_ends_it(mount: Mount, tmp_path: Path) -> None:
    (mount.path / "one" / "staged").mkdir()
    run("fusermount3", "-u", mount.path)
    assert mount.process is not None
    assert mount.process.wait(20) == 0
    assert not list((tmp_path / "one").glob("tmp_image_*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it(number: signal.Signals, mount: Mount, tmp_path: Path) -> None:
    (mount.path / "one" / "staged").mkdir()
    assert mount.process is not None
    fd = os.open(mount.path / "one" / "staged" / "file", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(fd, b"x")
        mount.process.send_signal(number)
        assert mount.process.wait(20) == 0
        assert not is_mounted(mount.path)
        with pytest.raises(OSError, match="not connected"):
            os.write(fd, b"y")
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
    assert not list((tmp_path / "one").glob("tmp_image_*"))
    assert "Traceback" not in log_of(mount)


def test_a_second_signal_does_not_throw_away_what_is_being_published(
    sidecar: Sidecar, mount: Mount, client: SidecarClient, disk: Path
) -> None:
    run("cp", "-r", disk.parent, mount.path / "one" / "new")
    mount_process = mount.process
    assert mount_process is not None
    sidecar.stop_now()
    begun = time.monotonic()
    try:
        wait_until(lambda: time.monotonic() - begun > 4, "the settle time is over: it is being published")
        mount_process.send_signal(signal.SIGTERM)
        wait_until(lambda: "unmounted mountpoint=" in log_of(mount), "it publishes what is complete")
        mount_process.send_signal(signal.SIGTERM)
        wait_until(lambda: "ending already" in log_of(mount) or mount_process.poll() is not None, "it is told again")
    finally:
        sidecar.signal(signal.SIGCONT)
    assert mount_process.wait(20) == 0
    assert [image.ref.image_id for image in client.images("one")] == ["new"]


def test_goes_into_the_background_when_it_answers(sidecar: Sidecar, mountpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "mount.log"
    started = image_mount(mountpoint, "--sidecar", sidecar.address, "--log", log)
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    assert names(mountpoint) == {"one", "two", "three"}
    pid = daemon_of(mountpoint)
    again = image_mount(mountpoint, "--sidecar", sidecar.address)
    assert again.returncode == 1
    assert "mounted already" in again.stderr
    run("fusermount3", "-u", mountpoint)
    wait_until(lambda: not is_running(pid), "the daemon has ended")
    assert "unmounted" in log.read_text()


def test_a_mount_whose_daemon_died_is_cleared(sidecar: Sidecar, mountpoint: Path) -> None:
    assert image_mount(mountpoint, "--sidecar", sidecar.address).returncode == 0
    pid = daemon_of(mountpoint)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), "the daemon has ended")
    assert run("ls", mountpoint, check=False).returncode != 0
    started = image_mount(mountpoint, "--sidecar", sidecar.address)
    assert (started.returncode, started.stderr) == (0, "")
    assert names(mountpoint) == {"one", "two", "three"}
    run("fusermount3", "-u", mountpoint)


@pytest.mark.parametrize("where", [[], ["--foreground"]], ids=["background", "foreground"])
def test_says_why_it_cannot_start(where: list[str], sidecar: Sidecar, mountpoint: Path, tmp_path: Path) -> None:
    def message(*arguments: str | Path) -> str:
        result = image_mount(*arguments, *where)
        assert result.returncode in {1, 2}
        assert "Traceback" not in result.stderr
        return result.stderr

    assert "not ready" in message(mountpoint, "--sidecar", f"unix:{tmp_path}/none.sock")
    assert "No such file or directory" in message(tmp_path / "none", "--sidecar", sidecar.address)
    (tmp_path / "file").touch()
    assert "not a directory" in message(tmp_path / "file", "--sidecar", sidecar.address)
    (mountpoint / "file").touch()
    assert "not empty" in message(mountpoint, "--sidecar", sidecar.address)
    (mountpoint / "file").unlink()
    assert "unknown option 'settel=3'" in message(mountpoint, "--sidecar", sidecar.address, "-o", "settel=3")
    assert "settle=x" in message(mountpoint, "--sidecar", sidecar.address, "-o", "ro,settle=x")
    assert not is_mounted(mountpoint)


def test_a_usage_error_is_one_line_that_says_where_to_read_on(mountpoint: Path) -> None:
    usages: list[tuple[list[str | Path], str]] = [
        ([], "name a directory to mount at"),
        ([mountpoint, mountpoint, mountpoint], "name a directory to mount at"),
        ([mountpoint, "--bindng", "x"], "No such option"),
        ([mountpoint, "-o", "settel=3"], "unknown option 'settel=3'"),
        ([mountpoint, "--log", mountpoint / "none" / "log"], "Invalid value for --log: cannot write"),
    ]
    for arguments, fault in usages:
        result = image_mount(*arguments)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"image-mount: {fault}")
        assert line.endswith("; see image-mount --help")
    assert image_mount("--help").stdout.startswith("Usage: image-mount")


def test_options(sidecar: Sidecar, make_image: MakeImage, tmp_path: Path, stack: ExitStack) -> None:
    make_image("one/a")
    mount = stack.enter_context(
        Mount(tmp_path / "mnt", sidecar.address, options="ro,allow_other,uid=1,gid=2,umask=027")
    )
    status = (mount.path / "one" / "a" / "a.vmdk").stat()
    assert (status.st_uid, status.st_gid, oct(status.st_mode)) == (1, 2, oct(0o100440))
    assert oct((mount.path / "one").stat().st_mode) == oct(0o40750)
    result = run("mkdir", mount.path / "one" / "new", check=False)
    assert "Read-only file system" in result.stderr
    assert "ro," in next(line for line in Path("/proc/mounts").read_text().splitlines() if str(mount.path) in line)


def test_survives_a_restart_of_the_sidecar(
    sidecar: Sidecar, mount: Mount, make_image: MakeImage, client: SidecarClient
) -> None:
    make_image("one/a")
    image = wait_listed(mount, "one/a")
    inode = image.stat().st_ino
    with (image / "a-flat.vmdk").open("rb") as file:
        sidecar.kill()
        assert file.read(4096)
        assert names(mount.path / "one") == {"a"}
        sidecar.start()
        make_image("one/b")
        wait_listed(mount, "one/b")
        assert len(file.read()) > 4096
    assert image.stat().st_ino == inode
    run("cp", "-r", image, mount.path / "two" / "c")
    assert names(mount.path / "two") == {"c"}


def test_a_staged_directory_does_not_survive_it_and_says_so(sidecar: Sidecar, mount: Mount, tmp_path: Path) -> None:
    outside = make_disk(tmp_path / "outside").parent
    target = mount.path / "one" / "new"
    target.mkdir()
    run("cp", outside / "disk.vmdk", target)
    sidecar.kill()
    sidecar.start()
    run("cp", outside / "disk-flat.vmdk", target, check=False)
    wait_until(lambda: not target.exists(), f"it is gone:\n{log_of(mount)}", 60)
    assert names(mount.path / "one") == set()


def test_sync_says_that_what_was_staged_is_gone_whoever_has_the_name_now(
    sidecar: Sidecar, mount: Mount, client: SidecarClient, disk: Path
) -> None:
    target = mount.path / "one" / "new"
    target.mkdir()
    with (target / "a.vmdk").open("xb", buffering=0) as file:
        directory = os.open(target, os.O_RDONLY)
        try:
            sidecar.kill()
            wait_until(lambda: "sidecar is away" in log_of(mount), "the mount noticed")
            sidecar.start()
            wait_until(lambda: "sidecar is back" in log_of(mount), "the mount noticed that too")
            with pytest.raises(OSError, match="Stale file handle"):
                file.close()
            with pytest.raises(OSError, match="Stale file handle"):
                os.fsync(directory)
            import_image(client, "one/new", disk)
            wait_listed(mount, "one/new")
            with pytest.raises(OSError, match="Stale file handle"):
                os.fsync(directory)
        finally:
            os.close(directory)


@pytest.mark.parametrize("again", [True, False], ids=["restarted", "away"])
def test_the_close_says_that_what_was_written_is_gone_with_its_sidecar(
    again: bool, sidecar: Sidecar, mount: Mount, tmp_path: Path
) -> None:
    """The last write had succeeded: without it a copier would end with 0."""
    target = mount.path / "one" / "new"
    target.mkdir()
    file = (target / "a.vmdk").open("xb", buffering=0)
    file.write(b"x" * 4096)
    sidecar.kill()
    wait_until(lambda: "sidecar is away" in log_of(mount), "the mount noticed")
    if again:
        sidecar.start()
        wait_until(lambda: "sidecar is back" in log_of(mount), "the mount noticed that too")
    with pytest.raises(OSError) as caught:
        file.close()
    assert caught.value.errno == (errno.ESTALE if again else errno.EHOSTDOWN)


def test_fusepy_on_libfuse_2(
    sidecar: Sidecar, make_image: MakeImage, tmp_path: Path, stack: ExitStack, client: SidecarClient
) -> None:
    source = make_image("one/a")
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address, binding="fusepy"))
    image = mount.path / "one" / "a"
    assert names(image) == {"a.vmdk", "a-flat.vmdk"}
    assert_same_disk(source, image / "a.vmdk")
    run("cp", "-r", image, mount.path / "two" / "b")
    assert published_as(mount, "two/b") == "one/a"
    assert_same_disk(source, mount.path / "two" / "b" / "b.vmdk")
    run("cp", "-r", source.parent, mount.path / "one" / "new")
    assert_same_disk(source, wait_listed(mount, "one/new") / "new.vmdk")
    run("rm", "-r", mount.path / "two" / "b")
    assert names(mount.path / "two") == set()
    assert "File exists" in run("mkdir", image, check=False).stderr
    assert mount.stop() == 0


def test_a_datastore_that_is_away_when_the_sidecar_comes_back_has_lost_nothing(
    sidecar: Sidecar, mount: Mount, make_image: MakeImage, client: SidecarClient, tmp_path: Path
) -> None:
    make_image("one/a")
    make_image("two/b")
    image = wait_listed(mount, "one/a")
    wait_listed(mount, "two/b")
    inode = image.stat().st_ino
    assert sidecar.stop() == 0
    (tmp_path / "one").rename(tmp_path / "hidden")
    sidecar.start()
    wait_until(lambda: "sidecar is back" in log_of(mount), "the mount has heard of everything")
    assert not client.datastore("one").accessible
    # Nothing is known of its images, which is not that they are gone.
    assert names(mount.path) == {"one", "two", "three"}
    assert names(mount.path / "one") == {"a"}
    assert names(image) == {"a.vmdk", "a-flat.vmdk"}
    assert names(mount.path / "two") == {"b"}
    (tmp_path / "hidden").rename(tmp_path / "one")
    wait_until(lambda: client.datastore("one").accessible, "it is there again")
    assert image.stat().st_ino == inode
    run("cp", "-r", image, mount.path / "two" / "c")
