"""A datastore that is full: what does not fit leaves nothing, and what frees space goes on."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.client import Part, SidecarClient
from tests.crash.stopping import stop_in_the_middle
from tests.crash.support import answers, image_directory, remains, write_image
from tests.support.disks import MIB, allocated
from tests.support.processes import Sidecar, loop_mount, wait_until

EXT4 = ("mkfs.ext4", "-q", "-m", "0")
XFS = ("mkfs.xfs", "-q")
FILE_SYSTEMS = {"ext4": (EXT4, 64 * MIB), "xfs": (XFS, 320 * MIB)}


@pytest.fixture(params=FILE_SYSTEMS)
def small(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> Path:
    """The root of a small file system of its own."""
    mkfs, size = FILE_SYSTEMS[request.param]
    return stack.enter_context(loop_mount(tmp_path / "small", size, mkfs))


def free(root: Path) -> int:
    status = os.statvfs(root)
    return status.f_bavail * status.f_frsize


def fill(root: Path, leave: int = 0) -> None:
    """Takes the free space down to `leave` bytes, or to the last block when that is 0."""
    descriptor = os.open(root / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for block in (MIB, 4096):
            while free(root) > leave + block:
                os.write(descriptor, os.urandom(block))
                os.fsync(descriptor) if block == 4096 else None
        if leave == 0:
            while os.write(descriptor, b"x" * 512):
                os.fsync(descriptor)
    except OSError:
        assert leave == 0
    finally:
        os.close(descriptor)
    os.sync()


def start(
    tmp_path: Path, stack: ExitStack, root: Path, layout: str, reserve: str = "0"
) -> tuple[Sidecar, SidecarClient]:
    sidecar = Sidecar(tmp_path / "run", f"big={tmp_path / 'big'}", f"small={root},layout={layout},reserve={reserve}")
    (tmp_path / "big").mkdir(exist_ok=True)
    stack.enter_context(sidecar)
    return sidecar, stack.enter_context(sidecar.client())


def mounted_device(root: Path) -> str:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return next(line.split()[0] for line in lines if line.split()[1] == str(root))


def no_space(call: Callable[[], object]) -> None:
    with pytest.raises(errors.NoSpace) as raised:
        call()
    assert "small" in raised.value.message


@pytest.mark.parametrize("layout", ("compound", "vsan"))
def test_what_does_not_fit_is_refused_before_a_byte_is_written(
    tmp_path: Path, stack: ExitStack, small: Path, layout: str
) -> None:
    reserve = 4 * MIB
    size = (free(small) - reserve) // MIB * MIB + 2 * MIB  # fits, but not beside the reserve
    write_image(tmp_path / "big", "compound", "source", size=size, dense=True)
    _, client = start(tmp_path, stack, small, layout, reserve="4MiB")
    before = free(small)
    no_space(lambda: client.copy("big/source", "small/target").wait())
    no_space(lambda: client.create_staging("small/target", expected_bytes=size))
    assert before - free(small) < MIB
    assert remains(small) == []
    client.create_staging("small/target", expected_bytes=MIB).abort()


@pytest.mark.parametrize("layout", ("compound", "sharded", "vsan"))
def test_an_import_that_fills_the_datastore_leaves_nothing(
    tmp_path: Path, stack: ExitStack, small: Path, layout: str
) -> None:
    _, client = start(tmp_path, stack, small, layout)
    before = free(small)

    def endless() -> Iterator[Part]:
        block = os.urandom(MIB)
        for number in range(2 * before // MIB):
            yield number * MIB, block

    def bring_in() -> None:
        with client.create_staging("small/target") as staging:
            staging.write_file("target-flat.vmdk", endless())

    no_space(bring_in)
    assert remains(small) == []
    wait_until(lambda: free(small) > before - MIB, "the space is free again")
    assert list(client.images("small")) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("compound", "vsan"))
@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_a_copy_whose_space_is_taken_meanwhile_leaves_nothing(
    tmp_path: Path, stack: ExitStack, layout: str, file_system: str
) -> None:
    """It passes the check beforehand; while it is in the middle, somebody else takes what is left."""
    size = 256 * MIB
    root = stack.enter_context(loop_mount(tmp_path / "small", 2 * size, FILE_SYSTEMS[file_system][0]))
    write_image(tmp_path / "big", "compound", "source", size=size, dense=True)
    sidecar, client = start(tmp_path, stack, root, layout)
    for _ in range(10):  # on a machine that is busy with other things, the copy may be done before it is seen
        copy = client.copy("big/source", "small/target")
        staging = stop_in_the_middle(sidecar, root, layout, "target")
        if staging is not None and allocated(staging) < size * 3 // 4:
            break
        sidecar.signal(signal.SIGCONT)
        copy.wait()
        client.delete("small/target", force=True)
    fill(root)
    sidecar.signal(signal.SIGCONT)
    no_space(copy.wait)
    (root / "filler").unlink()
    assert remains(root) == []
    assert answers(lambda: client.image("small/target")) == "IMAGE_NOT_FOUND"
    os.sync()
    wait_until(lambda: free(root) > size + MIB, "the space is free again")  # XFS takes its time
    client.copy("big/source", "small/target").wait()


@pytest.mark.parametrize("layout", ("compound", "vsan"))
def test_deleting_and_purging_make_room_on_a_full_datastore(
    tmp_path: Path, stack: ExitStack, small: Path, layout: str
) -> None:
    write_image(small, layout, "victim", size=8 * MIB, dense=True)
    write_image(small, layout, "other", size=4 * MIB, dense=True)
    _, client = start(tmp_path, stack, small, layout)
    assert sorted(image.ref.image_id for image in client.images("small")) == ["other", "victim"]
    if os.path.exists(f"/sys/fs/ext4/{os.path.basename(mounted_device(small))}"):
        fill(small)
    else:
        # XFS makes no file without room for the worst case, and each change begins with a lock file.
        fill(small)
        assert answers(lambda: client.delete("small/victim")) in ("ok", "NO_SPACE")
        (small / "filler").unlink()
        fill(small, leave=MIB)
        assert answers(lambda: client.restore("small/victim")) in ("ok", "IMAGE_NOT_TOMBSTONED")
    client.delete("small/victim")
    assert answers(lambda: client.touch("small/victim")) == "IMAGE_TOMBSTONED"
    client.restore("small/victim")
    client.touch("small/victim")
    client.delete("small/victim")
    assert client.purge("small/victim") >= 8 * MIB
    client.delete("small/other", force=True)
    wait_until(lambda: free(small) > 11 * MIB, "the space is free again")
    (small / "filler").unlink()
    assert remains(small) == []
    assert not image_directory(small, layout, "victim").exists()
