"""How it is mounted besides by hand: mount(8), /etc/fstab, systemd; and the options that decide who may do what."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.mount.harness import log_of, message_of, names, wait_listed
from tests.support.processes import BIN, Mount, Sidecar, is_mounted, run, wait_until

INSTALLED = "/opt/datastore-images/.venv/bin"
UNITS = Path(__file__).parents[2] / "scripts" / "systemd"
NOBODY = 65534


@pytest.fixture
def image(client: SidecarClient, make_image: object) -> str:
    assert callable(make_image)
    make_image("one/a")
    return "one/a"


@contextmanager
def unmounted_after(mountpoint: Path) -> Iterator[Path]:
    mountpoint.mkdir()
    try:
        yield mountpoint
    finally:
        if is_mounted(mountpoint):
            run("umount", mountpoint)
        wait_until(lambda: not processes_of(mountpoint), "the daemon has ended")


def processes_of(mountpoint: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
        except OSError:  # it has ended
            continue
        if any(b"image-mount" in argument for argument in arguments) and os.fsencode(mountpoint) in arguments:
            found.append(int(entry.name))
    return found


def where_it_is_installed(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a script where /usr/local/sbin has the program: mount(8) looks in the system's directories only."""
    install = f'mount -t tmpfs none /usr/local/sbin && ln -s "{BIN}/image-mount" /usr/local/sbin/ && exec sh -euc "$@"'
    return run("unshare", "--mount", "sh", "-euc", install, "sh", script, *arguments, check=False)


def test_mount_by_type(image: str, sidecar: Sidecar, tmp_path: Path) -> None:
    with unmounted_after(tmp_path / "by type") as mountpoint:
        done = where_it_is_installed(
            """
            mount -t fuse.image-mount "$0" "$1" -o settle=1,allow_other,relatime
            ls "$1/one"
            findmnt -no FSTYPE,SOURCE "$1"
            umount "$1"
            """,
            sidecar.address,
            mountpoint,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["a", "fuse.image-mount", sidecar.address]


def test_a_line_of_fstab(image: str, sidecar: Sidecar, tmp_path: Path) -> None:
    with unmounted_after(tmp_path / "fstab") as mountpoint:
        fstab = tmp_path / "etc-fstab"
        options = "defaults,noauto,nofail,_netdev,x-systemd.requires=image-sidecar.service,allow_other,umask=027"
        fstab.write_text(f"{sidecar.address} {mountpoint} fuse.image-mount {options} 0 0\n")
        done = where_it_is_installed(
            'mount --fstab "$0" "$1"; stat --format=%a "$1/one/a"; umount "$1"', fstab, mountpoint
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "750\n"


def test_mount_says_why_it_fails(tmp_path: Path) -> None:
    with unmounted_after(tmp_path / "mnt") as mountpoint:
        done = where_it_is_installed('mount -t fuse.image-mount "$0" "$1"', f"unix:{tmp_path}/none", mountpoint)
        assert done.returncode != 0
        assert "image-mount: " in done.stderr
        assert f"{tmp_path}/none" in done.stderr


@pytest.mark.parametrize("name", ["image-sidecar.service", "image-mount.service"])
def test_systemd_takes_the_units(name: str, tmp_path: Path) -> None:
    """Verified as they are, but for where the programs are."""
    for unit in UNITS.iterdir():
        text = re.sub(rf"{INSTALLED}(\S+)", rf'"{BIN}\1"', unit.read_text())
        (tmp_path / unit.name).write_text(text)
    done = run("systemd-analyze", "verify", "--man=no", tmp_path / name, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_of_the_mount_starts_and_stops_it(image: str, sidecar: Sidecar, tmp_path: Path) -> None:
    """systemd is not this machine's init: its commands are run as it would."""
    unit = ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNITS / "image-mount.service")
    service = unit["Service"]
    assert service["Type"] == "forking"

    with unmounted_after(tmp_path / "mnt") as mountpoint:
        words = shlex.split(service["ExecStart"])  # before the paths are put in, which may have spaces
        start = [word.replace(INSTALLED, str(BIN)).replace("/mnt/images", str(mountpoint)) for word in words]
        run("env", f"IMAGE_SIDECAR={sidecar.address}", *start)
        assert names(mountpoint / "one") == {"a"}  # it answers when the command is through
        [daemon] = processes_of(mountpoint)
        stop = shlex.split(service["ExecStop"].replace("$MAINPID", str(daemon)))
        run(*stop)
        wait_until(lambda: not processes_of(mountpoint), "it has ended", 30)
        assert not is_mounted(mountpoint)


def as_nobody(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return run("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command, check=False)


@pytest.fixture
def reachable(tmp_path: Path) -> Path:
    """A directory that another user can get to."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)
    return tmp_path / "mnt"


def test_nobody_else_sees_a_mount_that_is_not_for_others(image: str, sidecar: Sidecar, reachable: Path) -> None:
    with Mount(reachable, sidecar.address):
        assert "Permission denied" in as_nobody("ls", reachable).stderr


def test_others_read_and_do_not_write(image: str, sidecar: Sidecar, reachable: Path, client: SidecarClient) -> None:
    with Mount(reachable, sidecar.address, options="allow_other") as mount:
        target = mount.path / "one"
        assert as_nobody("cat", target / "a" / "a.vmdk").stdout.startswith("# Disk DescriptorFile")
        assert "Permission denied" in as_nobody("mkdir", target / "b").stderr
        assert "Permission denied" in as_nobody("rm", "-r", target / "a").stderr
        assert "Permission denied" in as_nobody("touch", target / "a").stderr
        assert names(target) == {"a"}


def test_umask_hides_images_from_others(image: str, sidecar: Sidecar, reachable: Path) -> None:
    with Mount(reachable, sidecar.address, options="allow_other,umask=077"):
        assert "Permission denied" in as_nobody("ls", reachable / "one").stderr


def test_whom_it_belongs_to_may_write(image: str, sidecar: Sidecar, reachable: Path) -> None:
    with Mount(reachable, sidecar.address, options=f"allow_other,uid={NOBODY},gid={NOBODY}") as mount:
        status = (mount.path / "one" / "a" / "a.vmdk").stat()
        assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)
        done = as_nobody("cp", "-r", mount.path / "one" / "a", mount.path / "one" / "b")
        assert done.returncode == 0, done.stderr
        wait_listed(mount, "one/b")
        assert as_nobody("rm", "-r", mount.path / "one" / "b").returncode == 0


def test_its_group_reads_what_the_umask_leaves_it_and_nobody_else_does(
    image: str, sidecar: Sidecar, reachable: Path
) -> None:
    with Mount(reachable, sidecar.address, options=f"allow_other,gid={NOBODY},umask=027") as mount:
        assert as_nobody("cat", mount.path / "one" / "a" / "a.vmdk").stdout.startswith("# Disk DescriptorFile")
        assert "Permission denied" in as_nobody("mkdir", mount.path / "one" / "b").stderr
        other = ("setpriv", "--reuid=1", "--regid=1", "--clear-groups")
        assert message_of(*other, "ls", mount.path / "one") == "Permission denied"


def mounted_with(mountpoint: Path) -> tuple[str, set[str]]:
    """The source and the options, as the kernel has them."""
    [line] = [line for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[1] == str(mountpoint)]
    return line.split()[0], set(line.split()[3].split(","))


def test_options_of_the_kernel_and_of_libfuse_are_passed_on(sidecar: Sidecar, tmp_path: Path) -> None:
    passed = "ro,suid,nodev,noexec,noatime,sync,dirsync,default_permissions,fsname=images"
    own = "attr_timeout=1,entry_timeout=2.5,max_idle_threads=5,max_read=65536"
    ignored = "rw,relatime,nodiratime,lazytime,user,_netdev,nofail,x-systemd.automount,comment=none"
    with Mount(tmp_path / "mnt", sidecar.address, options=f"{ignored},{passed},{own}") as mount:
        source, options = mounted_with(mount.path)
        assert source == "images"
        assert options >= {
            "ro",
            "nodev",
            "noexec",
            "noatime",
            "sync",
            "dirsync",
            "default_permissions",
            "max_read=65536",
        }
        assert not options & {"rw", "nosuid", "relatime", "allow_other"}


def test_a_mount_that_is_to_unmount_itself_is_gone_when_its_daemon_was_killed(sidecar: Sidecar, tmp_path: Path) -> None:
    with Mount(tmp_path / "mnt", sidecar.address, options="auto_unmount") as mount:
        assert mount.process is not None
        mount.process.kill()
        mount.process.wait(10)
        wait_until(lambda: not is_mounted(mount.path), "it is unmounted")


def test_a_mount_unmounts_itself_also_when_fusermount_took_its_daemon_for_alive(
    sidecar: Sidecar, tmp_path: Path
) -> None:
    with Mount(tmp_path / "mnt", sidecar.address, options="auto_unmount") as mount:
        assert mount.process is not None
        for number in Path(f"/proc/{mount.process.pid}/task/{mount.process.pid}/children").read_text().split():
            if Path(f"/proc/{number}/comm").read_text() == "fusermount3\n":
                os.kill(int(number), signal.SIGKILL)
                break
        else:
            pytest.fail("no fusermount3 waits for the end of the mount")
        mount.process.kill()
        mount.process.wait(10)
        wait_until(lambda: not is_mounted(mount.path), "it is unmounted")


def test_an_import_is_left_alone_for_as_long_as_the_option_says(
    sidecar: Sidecar, disk: Path, tmp_path: Path, stack: ExitStack
) -> None:
    patient = stack.enter_context(Mount(tmp_path / "patient", sidecar.address, options="settle=3600"))
    run("cp", "-r", disk.parent, patient.path / "one" / "patient")
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address, options="settle=3"))  # longer than by default
    run("cp", "-r", disk.parent, mount.path / "one" / "new")
    wait_listed(mount, "one/new")
    assert "published" not in log_of(patient)
    run("sync", patient.path / "one" / "patient")
    assert names(patient.path / "one") >= {"patient"}


def test_a_mount_to_read_from_only(image: str, sidecar: Sidecar, tmp_path: Path) -> None:
    with Mount(tmp_path / "mnt", sidecar.address, options="ro") as mount:
        image_path = mount.path / image
        assert message_of("mkdir", mount.path / "one" / "b") == "Read-only file system"
        assert "Read-only file system" in run("rm", "-r", image_path, check=False).stderr
        assert message_of("touch", image_path) == "Read-only file system"
        shutil.copytree(image_path, tmp_path / "out")
        assert names(tmp_path / "out") == names(image_path)
