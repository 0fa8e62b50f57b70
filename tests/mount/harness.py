"""What the tests of the mount share beside the fixtures."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from sidecar.client import Part, SidecarClient
from sidecar.holes import data_ranges, seek_in
from tests.support.processes import Mount, Sidecar, run, wait_until

# Within what the mount promises, on a machine that is busy with other tests.
SETTLED_SECONDS = 20.0

# How tools copy a directory: `$0` to `$1`, which is not there yet.
_EACH = 'mkdir "$1" && for file in "$0"/*; do {} done'
_PIPED = 'mkdir "$1" && tar -C "$0" {} - . | tar -C "$1" -xf -'
COPIERS = {
    "cp": 'cp -r "$0" "$1"',
    "cp -a": 'cp -a "$0" "$1"',
    "cp --sparse=never": 'cp -r --sparse=never "$0" "$1"',
    "busybox cp": 'busybox cp -r "$0" "$1"',
    "shutil": 'python3 -c "import shutil, sys; shutil.copytree(*sys.argv[1:])" "$0" "$1"',
    "rsync": 'rsync -a "$0/" "$1"',
    "rsync --sparse": 'rsync -a --sparse "$0/" "$1"',
    "tar": _PIPED.format("-cf"),
    "tar --sparse": _PIPED.format("-cSf"),
    "dd": _EACH.format('dd if="$file" of="$1/${file##*/}" bs=100k status=none;'),
    "cat": _EACH.format('cat "$file" >"$1/${file##*/}";'),
}


def log_of(mount: Mount) -> str:
    return mount.log.read_text()


def process_name() -> str:
    """What the process that runs the tests is called."""
    return Path("/proc/self/comm").read_text().strip()


def names(directory: Path) -> set[str]:
    return set(os.listdir(directory))


def is_name(path: Path) -> bool:
    """Whether the kernel knows the name, which it asks the mount about only when it does not."""
    try:
        os.close(os.open(path, os.O_PATH))
    except FileNotFoundError:
        return False
    return True


def wait_listed(mount: Mount, ref: str) -> Path:
    """Waits until the image is in its datastore's listing; its directory."""
    datastore, _, image_id = ref.partition("/")
    wait_until(
        lambda: image_id in os.listdir(mount.path / datastore), f"{ref} is listed:\n{log_of(mount)}", SETTLED_SECONDS
    )
    return mount.path / ref


def published_as(mount: Mount, ref: str) -> str:
    """What the published image was copied from, by the mount's log; empty for an import."""
    wait_until(lambda: f"published image={ref} " in log_of(mount), f"{ref} is published:\n{log_of(mount)}")
    line = next(line for line in reversed(log_of(mount).splitlines()) if f"published image={ref} " in line)
    return line.partition("copied_from=")[2].split(" ")[0]


def message_of(*command: str | Path) -> str:
    """What a tool that fails says, without the paths before it."""
    result = run(*command, check=False)
    assert result.returncode != 0, f"{command} succeeded"
    return result.stderr.strip().rpartition(": ")[2]


def import_sparse(
    client: SidecarClient, ref: str, descriptor: Path, *, companions: dict[str, bytes] | None = None
) -> None:
    """Imports every file beside the descriptor with its holes, and companion files."""
    with client.create_staging(ref) as staging:
        for path in sorted(descriptor.parent.iterdir()):
            with path.open("rb") as file:
                size, parts = path.stat().st_size, list[Part]()
                for start, end in data_ranges(seek_in(file.fileno()), 0, size):
                    parts.append((start, os.pread(file.fileno(), end - start, start)))
                staging.write_file(path.name, parts, size=size)
        for name, content in (companions or {}).items():
            staging.write_file(name, [(0, content)])
        staging.commit()


def is_in_kernel_at(pid: int, function: str) -> bool:
    """Whether one of its threads is in a function of the kernel."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            if function in (task / "stack").read_text():
                return True
        except OSError:  # it has ended
            continue
    return False


@contextlib.contextmanager
def hanging(sidecar: Sidecar) -> Iterator[None]:
    """The sidecar does nothing for the time of the block; it may still have answered what came before."""
    sidecar.stop_now()
    try:
        yield
    finally:
        sidecar.signal(signal.SIGCONT)


@contextlib.contextmanager
def slowed(sidecar: Sidecar, root: Path, bytes_per_second: int) -> Iterator[None]:
    """For the block, the sidecar writes no faster to that file system."""
    groups = Path("/sys/fs/cgroup")
    device = os.stat(root).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    if (groups / "blkio").is_dir():
        controller, groups = "blkio", groups / "blkio"
        limit, text = "blkio.throttle.write_bps_device", f"{number} {bytes_per_second}"
    else:
        controller, limit, text = "", "io.max", f"{number} wbps={bytes_per_second}"
    lines = [line.split(":") for line in Path(f"/proc/{sidecar.pid}/cgroup").read_text().splitlines()]
    home = next((groups / path.lstrip("/") for _, names, path in lines if controller in names.split(",")), groups)
    group = groups / f"slowed-{sidecar.pid}"
    group.mkdir()
    try:
        (group / limit).write_text(text)
        (group / "cgroup.procs").write_text(str(sidecar.pid))
        yield
    finally:
        with contextlib.suppress(OSError):  # it has ended
            (home / "cgroup.procs").write_text(str(sidecar.pid))
        group.rmdir()


def shell(script: str, **variables: Path | str) -> subprocess.CompletedProcess[str]:
    """Runs a line of shell; its variables are the arguments."""
    assignments = [f"{name}={value}" for name, value in variables.items()]
    return run("env", *assignments, "sh", "-c", script, check=False)
