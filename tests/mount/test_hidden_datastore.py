"""A mount that cannot reach the datastore's files by path: everything goes through the sidecar, nothing is lost."""

import shlex
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import ImageState, SidecarClient
from sidecar.errors import ImageInUse
from tests.mount.harness import hanging, import_sparse
from tests.support.disks import MIB, assert_same_disk, import_image, make_disk
from tests.support.processes import BIN, Sidecar, background, run, wait_until

Inside = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def daemon(sidecar: Sidecar, mountpoint: Path, tmp_path: Path, stack: ExitStack) -> "subprocess.Popen[bytes]":
    """That of a mount, in a namespace where the datastores' directories are empty."""
    hide = " && ".join(f"mount -t tmpfs none {tmp_path / name}" for name in ("one", "two", "three"))
    serve = shlex.join(map(str, (BIN / "image-mount", mountpoint, "--sidecar", sidecar.address, "--foreground")))
    return stack.enter_context(
        background("unshare", "--mount", "--propagation", "private", "sh", "-c", f"{hide} && exec {serve}")
    )


@pytest.fixture
def inside(daemon: "subprocess.Popen[bytes]", mountpoint: Path, stack: ExitStack) -> Inside:
    """Runs a command beside the mount, where it is seen."""

    def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return run("nsenter", "-t", str(daemon.pid), "-m", *words, check=False)

    def end() -> None:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(20)

    wait_until(lambda: command("test", "-d", mountpoint / "one").returncode == 0, "the mount answers")
    stack.callback(end)
    return command


@pytest.fixture
def seen(daemon: "subprocess.Popen[bytes]", mountpoint: Path, inside: Inside) -> Path:
    """The mount, as a path from here."""
    return Path(f"/proc/{daemon.pid}/root{mountpoint}")


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


def test_a_copy_that_somebody_was_faster_than_fails(
    inside: Inside, client: SidecarClient, mountpoint: Path, tmp_path: Path
) -> None:
    """The other one's image is whole, and not what was written: cp must not say that it is."""
    import_sparse(client, "one/a", make_disk(tmp_path / "source", data=((0, 8 * MIB),)))
    wait_until(lambda: inside("test", "-d", mountpoint / "one" / "a").returncode == 0, "the source is seen")
    source, target = mountpoint / "one" / "a", mountpoint / "two" / "b"
    assert inside("mkdir", target).returncode == 0
    assert inside("cp", source / "a-flat.vmdk", target).returncode == 0
    other = make_disk(tmp_path / "other", seed=99)
    import_image(client, "two/b", other)
    result = inside("cp", source / "a.vmdk", target)
    assert result.returncode == 1
    assert "File exists" in result.stderr
    assert_same_disk(other, tmp_path / "two" / client.image("two/b").directory / "b.vmdk")


@pytest.mark.parametrize("datastore", ["one", "two", "three"])
def test_what_somebody_reads_is_not_freed(datastore: str, seen: Path, client: SidecarClient, tmp_path: Path) -> None:
    ref = f"{datastore}/a"
    import_sparse(client, ref, make_disk(tmp_path / "source"))
    wait_until((seen / ref).exists, "the image is seen")
    with (seen / ref / "a-flat.vmdk").open("rb") as file:
        client.delete(ref)
        with pytest.raises(ImageInUse, match=f"{ref} is in use by image-sidecar"):
            client.purge(ref)
        assert file.read(16)
    client.purge(ref)


def test_what_is_gone_when_it_is_opened_is_not_there_and_nothing_that_fails_when_it_is_read(
    seen: Path, client: SidecarClient, tmp_path: Path
) -> None:
    import_sparse(client, "two/a", make_disk(tmp_path / "source"), companions={"disk.ecv": b"{}"})
    file = seen / "two" / "a" / "a.ecv"
    wait_until(file.exists, "the image is seen")
    (tmp_path / "two" / client.image("two/a").directory / "a.ecv").unlink()
    with pytest.raises(FileNotFoundError):
        file.open("rb").close()


def test_a_new_file_does_not_wait_for_a_sidecar_that_hangs(
    inside: Inside, sidecar: Sidecar, mountpoint: Path, tmp_path: Path
) -> None:
    assert inside("mkdir", mountpoint / "two" / "b").returncode == 0
    (tmp_path / "small").write_text("x")
    with hanging(sidecar):
        result = inside("timeout", "--signal=KILL", "15", "cp", tmp_path / "small", mountpoint / "two" / "b")
    assert result.returncode == 1, result
    assert "Host is down" in result.stderr
