"""A mount that cannot reach the datastore's files by path: everything goes through the sidecar, nothing is lost."""

import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import ImageState, SidecarClient
from tests.mount.harness import import_sparse
from tests.support.disks import MIB, assert_same_disk, make_disk
from tests.support.processes import BIN, Sidecar, background, run, wait_until

Inside = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def inside(sidecar: Sidecar, mountpoint: Path, tmp_path: Path, stack: ExitStack) -> Inside:
    """Runs a command where the datastores' directories are empty, beside a mount that sees them so too."""
    hide = " && ".join(f"mount -t tmpfs none {tmp_path / name}" for name in ("one", "two", "three"))
    serve = f"{hide} && exec {BIN / 'image-mount'} {mountpoint} --sidecar {sidecar.address} --foreground"
    process = stack.enter_context(background("unshare", "--mount", "--propagation", "private", "sh", "-c", serve))

    def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return run("nsenter", "-t", str(process.pid), "-m", *words, check=False)

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        process.wait(20)

    wait_until(lambda: command("test", "-d", mountpoint / "one").returncode == 0, "the mount answers")
    stack.callback(end)
    return command


@pytest.mark.parametrize("command", ["cp -r", "mv"])
@pytest.mark.parametrize("data", [((0, 8 * MIB),), ((0, MIB), (4 * MIB, MIB))], ids=["dense", "sparse"])
def test_a_copy_becomes_an_image(
    command: str,
    data: tuple[tuple[int, int], ...],
    inside: Inside,
    client: SidecarClient,
    mountpoint: Path,
    tmp_path: Path,
) -> None:
    descriptor = make_disk(tmp_path / "source", data=data)
    import_sparse(client, "one/a", descriptor, companions={"disk.ecv": b"{}"})
    wait_until(lambda: inside("test", "-d", mountpoint / "one" / "a").returncode == 0, "the source is seen")
    result = inside(*command.split(), mountpoint / "one" / "a", mountpoint / "two" / "b")
    assert result.returncode == 0, result.stderr
    if len(data) > 1:
        # A tool that skips what is zero says nothing of whole files: this one is taken for an import.
        wait_until(lambda: "b" in [image.ref.image_id for image in client.images("two")], "the copy is published")
    image = client.image("two/b")
    assert image.state == ImageState.IMAGE_STATE_VALID
    assert_same_disk(descriptor, tmp_path / "two" / image.directory / "b.vmdk")
    source_state = client.image("one/a").state
    assert (source_state == ImageState.IMAGE_STATE_TOMBSTONED) == (command == "mv")
