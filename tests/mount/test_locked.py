"""An image that another process is changing: no request waits long for it, its tool is told, and it works later."""

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusefs.patience import LOCK_SECONDS, Patience
from sidecar.client import Image, SidecarClient
from sidecar.errors import LockTimeout
from tests.crash.stopping import held_back
from tests.mount.harness import import_sparse, log_of, message_of, names, published_as, wait_listed
from tests.support.disks import assert_same_disk, make_disk, tree_digest
from tests.support.processes import Mount, run, wait_until

LAYOUTS = {"one": "compound", "three": "vsan"}
BUSY = "Device or resource busy"
SOON = 10.0  # seconds, on a machine that is busy with other tests; the sidecar would wait for 30


@pytest.fixture(params=LAYOUTS)
def image(request: pytest.FixtureRequest, client: SidecarClient, mount: Mount, tmp_path: Path) -> Path:
    datastore: str = request.param
    import_sparse(client, f"{datastore}/a", make_disk(tmp_path / "source"), companions={"disk.ecv": b'{"k": 1}'})
    return wait_listed(mount, f"{datastore}/a")


@contextmanager
def locked(image: Path) -> Iterator[None]:
    """Another process is changing the image, or about to make it."""
    datastore = image.parent.name
    with held_back(image.parents[2] / datastore, LAYOUTS[datastore], image.name):
        yield


def assert_busy(mount: Mount, *command: str | Path) -> None:
    begun = time.monotonic()
    assert message_of(*command) == BUSY
    assert time.monotonic() - begun < SOON
    assert "reason=LOCK_TIMEOUT" in log_of(mount)
    assert "is held by" in log_of(mount)


def at_rest(client: SidecarClient, ref: str) -> Image:
    """The image once nobody uses it: the kernel tells the mount after `close` that a file is closed."""
    wait_until(lambda: not client.image(ref).users, "nobody uses the image")
    return client.image(ref)


@pytest.mark.parametrize("command", [["rm", "-r"], ["rmdir"], ["touch"]], ids=" ".join)
def test_an_image_that_is_locked(command: list[str], image: Path, mount: Mount, client: SidecarClient) -> None:
    ref, before = f"{image.parent.name}/a", tree_digest(image)
    known = at_rest(client, ref)
    with locked(image):
        assert_busy(mount, *command, image)
        assert tree_digest(image) == before
        assert at_rest(client, ref) == known
    run(*command, image)
    assert image.exists() == (command == ["touch"])


def test_a_delete_that_is_refused_leaves_the_image_all_its_files(
    image: Path, mount: Mount, client: SidecarClient, tmp_path: Path
) -> None:
    """rm has begun with the companion file."""
    other_ref = f"{image.parent.name}/b"
    import_sparse(client, other_ref, tmp_path / "source" / "disk.vmdk", companions={"disk.ecv": b"{}"})
    other, before = wait_listed(mount, other_ref), tree_digest(image)
    with locked(image):
        assert_busy(mount, "rm", "-r", image)
    (other / "b.ecv").unlink()  # due later
    wait_until(lambda: f"companion files removed image={other_ref}" in log_of(mount), "the time has come")
    assert tree_digest(image) == before
    assert client.image(f"{image.parent.name}/a").files[0].name == "a.ecv"


@pytest.mark.parametrize("command", ["mv", "rm"])
def test_a_deleted_image_that_is_locked(command: str, image: Path, mount: Mount) -> None:
    before = tree_digest(image)
    run("rm", "-r", image)
    deleted = image.parent / ".deleted" / "a"
    arguments = (command, deleted, image) if command == "mv" else (command, "-r", deleted)
    with locked(image):
        assert_busy(mount, *arguments)
        assert tree_digest(deleted) == before
        assert names(image.parent) == set()
    run(*arguments)
    assert names(deleted.parent) == set()
    if command == "mv":
        assert tree_digest(image) == before


def test_a_copy_whose_name_is_locked_says_so_and_is_published_later(image: Path, mount: Mount) -> None:
    target = image.parent / "b"
    with locked(target):
        assert_busy(mount, "cp", "-r", image, target)
        assert names(image.parent) == {"a"}
        document = json.loads((target / ".image.json").read_text())
        assert document["state"] == "STAGED"
        assert "is held by" in document["reason"]
        assert_busy(mount, "sync", target)
    wait_listed(mount, f"{image.parent.name}/b")
    assert published_as(mount, f"{image.parent.name}/b") == f"{image.parent.name}/a"
    assert names(target) == {"b.vmdk", "b-flat.vmdk", "b.ecv"}
    assert_same_disk(image / "a.vmdk", target / "b.vmdk")


def test_a_copy_that_was_refused_can_be_removed(image: Path, mount: Mount, tmp_path: Path) -> None:
    target = image.parent / "b"
    with locked(target):
        assert_busy(mount, "cp", "-r", image, target)
        run("rm", "-r", target)
        assert not target.exists()
    run("cp", "-r", image, target)
    assert names(target) == {"b.vmdk", "b-flat.vmdk", "b.ecv"}


def test_an_import_whose_name_is_locked_is_published_later(image: Path, mount: Mount, tmp_path: Path) -> None:
    target = image.parent / "b"
    with locked(target):
        run("cp", "-r", tmp_path / "source", target)
        assert_busy(mount, "sync", target)
    wait_listed(mount, f"{image.parent.name}/b")
    assert_same_disk(tmp_path / "source" / "disk.vmdk", target / "b.vmdk")


def test_a_companion_file_that_comes_late_to_a_locked_image(image: Path, mount: Mount) -> None:
    target = image.parent / "b"
    run("cp", "-r", image, target)
    with locked(target):
        begun = time.monotonic()
        late = os.open(target / "b.notes", os.O_CREAT | os.O_WRONLY)
        os.write(late, b"notes")
        with pytest.raises(OSError) as refused:
            os.close(late)
        assert refused.value.errno == errno.EBUSY
        assert time.monotonic() - begun < SOON

    def again() -> bool:
        # The kernel remembers the name of the file that did not come to be, for a while.
        return run("sh", "-c", 'printf notes > "$0"', target / "b.notes", check=False).returncode == 0

    wait_until(again, f"it comes:\n{log_of(mount)}")
    assert (target / "b.notes").read_bytes() == b"notes"


def test_a_disk_of_many_files_is_not_waited_for_file_by_file(mount: Mount, tmp_path: Path) -> None:
    source, image = tmp_path / "split", mount.path / "one" / "split"
    source.mkdir()
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", source / "x.vmdk", "40G")
    run("cp", "-r", source, image)
    run("sync", image)
    assert len(names(image)) > 20
    with locked(image):
        assert_busy(mount, "rm", "-r", image)
        assert len(names(image)) > 20
    run("rm", "-r", image)


def test_a_lock_that_was_not_got_is_remembered_for_a_moment_and_for_its_image_only() -> None:
    now = 1000.0
    patience = Patience(clock=lambda: now)

    def waited(key: tuple[str, str]) -> float:
        with patience.waiting(key) as seconds:
            return seconds

    a, b = ("one", "a"), ("one", "b")
    for key in (a, b):
        with pytest.raises(LockTimeout), patience.waiting(key) as seconds:
            assert seconds == LOCK_SECONDS
            raise LockTimeout("held")
        now += 2
    assert waited(a) == LOCK_SECONDS
    assert 0 < waited(b) < LOCK_SECONDS
    now += 2
    assert waited(b) == LOCK_SECONDS
