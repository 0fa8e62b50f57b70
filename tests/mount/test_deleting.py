"""rm, in each of its forms: a tombstone, exactly one, and the command succeeds."""

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fusefs.deleting import Deletions
from fusefs.pulse import Pulse
from fusefs.tree import Tree
from fusefs.watching import Watcher
from sidecar.client import ImageRef, ImageState, SidecarClient
from tests.mount.harness import import_sparse, log_of, names, wait_listed
from tests.support.disks import make_disk, tree_digest
from tests.support.processes import Mount, Sidecar, run, wait_until


@pytest.fixture(params=["one", "three"])
def image(request: pytest.FixtureRequest, client: SidecarClient, mount: Mount, tmp_path: Path) -> Path:
    datastore: str = request.param
    import_sparse(client, f"{datastore}/a", make_disk(tmp_path / "source"), companions={"disk.ecv": b'{"k": 1}'})
    return wait_listed(mount, f"{datastore}/a")


def is_tombstoned(client: SidecarClient, image: Path) -> bool:
    return client.image(f"{image.parent.name}/a").state == ImageState.IMAGE_STATE_TOMBSTONED


@pytest.mark.parametrize(
    "command",
    [
        ["rm", "-r"],
        ["rm", "-rf"],
        ["rmdir"],
        ["busybox", "rm", "-r"],
        ["sh", "-c", 'rm "$0"/* && rmdir "$0"'],
        ["sh", "-c", 'find "$0" -delete'],
    ],
    ids=" ".join,
)
def test_a_deleted_image_is_gone_and_comes_back_whole(
    command: list[str], image: Path, mount: Mount, client: SidecarClient
) -> None:
    before = tree_digest(image)
    run(*command, image)
    assert not image.exists()
    assert names(image.parent) == set()
    assert is_tombstoned(client, image)
    assert log_of(mount).count("tombstoned image=") == 1
    client.restore(f"{image.parent.name}/a")
    wait_listed(mount, f"{image.parent.name}/a")
    assert tree_digest(image) == before


def test_rmtree(image: Path, client: SidecarClient) -> None:
    shutil.rmtree(image)
    assert not image.exists()
    assert is_tombstoned(client, image)


@pytest.mark.parametrize("name", ["a.vmdk", "a-flat.vmdk"])
def test_without_a_file_of_its_disk_the_image_is_gone(
    name: str, image: Path, mount: Mount, client: SidecarClient
) -> None:
    (image / name).unlink()
    assert names(image.parent) == set()
    assert not (image / name).exists()
    assert is_tombstoned(client, image)
    wait_until(lambda: not image.exists(), "nothing is left to be seen")


def test_rm_of_a_companion_file_removes_it_from_the_image(image: Path, client: SidecarClient) -> None:
    ref = f"{image.parent.name}/a"
    (image / "a.ecv").unlink()
    assert names(image) == {"a.vmdk", "a-flat.vmdk"}
    wait_until(lambda: [file.name for file in client.image(ref).files] == ["a-flat.vmdk", "a.vmdk"], "it is removed")
    assert names(image) == {"a.vmdk", "a-flat.vmdk"}
    client.validate(ref)


def test_rm_of_one_companion_leaves_the_others_and_rm_of_the_last_leaves_the_disk(
    sidecar: Sidecar, client: SidecarClient, tmp_path: Path, stack: ExitStack
) -> None:
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address, options="settle=0.3"))
    companions = {"disk.ecv": b'{"k": 1}', "disk.other": b"other"}
    import_sparse(client, "one/a", make_disk(tmp_path / "source"), companions=companions)
    image = wait_listed(mount, "one/a")
    (image / "a.ecv").unlink()
    wait_until(lambda: "names=['a.ecv']" in log_of(mount), f"it is removed:\n{log_of(mount)}")
    assert names(image) == {"a.vmdk", "a-flat.vmdk", "a.other"}
    assert [file.name for file in client.image("one/a").files] == ["a.other", "a-flat.vmdk", "a.vmdk"]
    assert not (image / "a.ecv").exists()
    (image / "a.other").unlink()
    wait_until(lambda: "names=['a.other']" in log_of(mount), f"the last one is removed:\n{log_of(mount)}")
    assert [file.name for file in client.image("one/a").files] == ["a-flat.vmdk", "a.vmdk"]
    assert names(image) == {"a.vmdk", "a-flat.vmdk"}
    client.validate("one/a")


def test_a_companion_that_was_removed_just_before_its_image_comes_back_with_it(
    image: Path, mount: Mount, client: SidecarClient
) -> None:
    before = tree_digest(image)
    (image / "a.ecv").unlink()
    run("rm", "-r", image)
    client.restore(f"{image.parent.name}/a")
    wait_listed(mount, f"{image.parent.name}/a")
    assert tree_digest(image) == before


def test_a_removal_that_is_due_does_not_meet_a_file_that_another_client_wrote(
    image: Path, client: SidecarClient, mount: Mount
) -> None:
    ref = f"{image.parent.name}/a"
    (image / "a.ecv").unlink()
    client.update_metadata(ref, files={"a.ecv": b'{"new": 2}'})
    wait_until(lambda: "a.ecv" in names(image), "the new file is seen")
    client.update_metadata(ref, files={"a.other": b"{}"})
    wait_until(lambda: "a.other" in names(image), "the other file is seen")
    (image / "a.other").unlink()  # due later than the other one
    wait_until(lambda: "names=['a.other']" in log_of(mount), "the time has come")
    assert (image / "a.ecv").read_bytes() == b'{"new": 2}'


def test_an_open_file_of_a_deleted_image_is_read_to_its_end(image: Path) -> None:
    expected = (image / "a-flat.vmdk").read_bytes()
    with (image / "a-flat.vmdk").open("rb") as file:
        start = file.read(4096)
        run("rm", "-r", image)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert start + file.read() == expected


def test_a_name_can_be_used_again_after_purge(image: Path, client: SidecarClient, mount: Mount, tmp_path: Path) -> None:
    run("rm", "-r", image)
    client.purge(f"{image.parent.name}/a")
    run("cp", "-r", tmp_path / "source", image)
    assert names(wait_listed(mount, f"{image.parent.name}/a")) == {"a.vmdk", "a-flat.vmdk"}


def test_a_delete_that_waits_for_the_images_lock_deletes_it_whole(
    make_image: Callable[[str], Path], client: SidecarClient, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its companion file is unlinked already, and due to be removed before the delete gets the lock."""
    make_image("one/a")
    client.update_metadata("one/a", files={"a.ecv": b"{}"})
    tree, key, now = Tree(), ("one", "a"), 1000.0
    watcher = Watcher(client, tree)
    watcher.start()
    stack.callback(watcher.stop)
    assert tree.wait_complete(20)
    image = tree.image(*key)
    assert image is not None
    companion = image.file("a.ecv")
    assert companion is not None
    deletions = Deletions(client, Pulse(client), tree, 2.0, clock=lambda: now)
    waits, goes_on, delete = threading.Event(), threading.Event(), client.delete

    def wait_and_delete(ref: ImageRef, *, lock_timeout: float) -> None:
        waits.set()
        goes_on.wait(20)
        delete(ref, lock_timeout=lock_timeout)

    monkeypatch.setattr(client, "delete", wait_and_delete)
    deletions.remove_later(key, image, companion)
    deleting = threading.Thread(target=deletions.tombstone, args=(key, image))
    try:
        deleting.start()
        assert waits.wait(20)
        now += 3
        deletions.run_due()
    finally:
        goes_on.set()
        deleting.join(20)
    deleted = client.image("one/a")
    assert deleted.state == ImageState.IMAGE_STATE_TOMBSTONED
    assert [file.name for file in deleted.files] == ["a.ecv", "a-flat.vmdk", "a.vmdk"]
