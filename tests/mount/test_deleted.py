"""`.deleted`: tombstoned images, how they come back, and how their bytes go."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sidecar.client import ImageState, SidecarClient, errors
from tests.mount.harness import import_sparse, message_of, names, wait_listed
from tests.support.disks import make_disk, tree_digest
from tests.support.processes import Mount, run, wait_until


@pytest.fixture(params=["one", "two", "three"])
def datastore(request: pytest.FixtureRequest, client: SidecarClient, mount: Mount, tmp_path: Path) -> Path:
    """A datastore with the image `a`, for each layout."""
    name: str = request.param
    import_sparse(client, f"{name}/a", make_disk(tmp_path / "source"), companions={"disk.ecv": b'{"k": 1}'})
    return wait_listed(mount, f"{name}/a").parent


def state_of(client: SidecarClient, image: Path) -> ImageState.ValueType | None:
    try:
        return client.image(f"{image.parent.name}/{image.name}").state
    except errors.ImageNotFound:
        return None


def test_a_deleted_image_is_there_at_once_and_mv_restores_it_whole(datastore: Path, client: SidecarClient) -> None:
    before = tree_digest(datastore / "a")
    run("rm", "-r", datastore / "a")
    assert run("ls", "-a", datastore / ".deleted").stdout.split() == [".", "..", "a"]
    assert tree_digest(datastore / ".deleted" / "a") == before
    run("mv", datastore / ".deleted" / "a", datastore / "a")
    assert names(datastore) == {"a"}
    assert names(datastore / ".deleted") == set()
    assert tree_digest(datastore / "a") == before
    assert state_of(client, datastore / "a") == ImageState.IMAGE_STATE_VALID


def test_mv_into_the_datastore_restores_it_too(datastore: Path) -> None:
    run("rm", "-r", datastore / "a")
    run("mv", datastore / ".deleted" / "a", datastore)
    assert names(datastore) == {"a"}


def test_it_is_restored_under_its_own_name_only_and_nothing_is_purged(datastore: Path, client: SidecarClient) -> None:
    """Were it a rename across devices, mv would copy it and then purge what it copied from."""
    run("rm", "-r", datastore / "a")
    assert message_of("mv", datastore / ".deleted" / "a", datastore / "b") == "Operation not permitted"
    other = datastore.parent / ("two" if datastore.name == "one" else "one")
    assert message_of("mv", datastore / ".deleted" / "a", other / "a") == "Operation not permitted"
    assert state_of(client, datastore / "a") == ImageState.IMAGE_STATE_TOMBSTONED


@pytest.mark.parametrize(
    "command", [["rm", "-r"], ["busybox", "rm", "-r"], ["sh", "-c", 'find "$0" -delete']], ids=" ".join
)
def test_rm_purges(command: list[str], datastore: Path, client: SidecarClient) -> None:
    run("rm", "-r", datastore / "a")
    run(*command, datastore / ".deleted" / "a")
    assert names(datastore / ".deleted") == set()
    assert state_of(client, datastore / "a") is None
    run("mkdir", datastore / "a")  # the name is free again


def test_all_are_purged_at_once(datastore: Path, client: SidecarClient) -> None:
    run("cp", "-r", datastore / "a", datastore / "b")
    run("rm", "-r", datastore / "a", datastore / "b")
    assert names(datastore / ".deleted") == {"a", "b"}
    run("sh", "-c", 'rm -r "$0"/.deleted/*', datastore)
    assert names(datastore / ".deleted") == set()
    assert [state_of(client, datastore / name) for name in "ab"] == [None, None]


def test_rm_of_the_whole_directory_empties_it_and_says_so(datastore: Path, client: SidecarClient) -> None:
    """It freed all and ended with "not permitted", which reads as if nothing had been done."""
    run("rm", "-r", datastore / "a")
    run("rm", "-r", datastore / ".deleted")
    assert state_of(client, datastore / "a") is None
    assert names(datastore / ".deleted") == set()


def test_one_that_is_in_use_is_not_purged(datastore: Path, client: SidecarClient) -> None:
    run("rm", "-r", datastore / "a")
    image = datastore / ".deleted" / "a"
    with (image / "a-flat.vmdk").open("rb"):
        assert "Device or resource busy" in run("rm", "-r", image, check=False).stderr
        assert state_of(client, datastore / "a") == ImageState.IMAGE_STATE_TOMBSTONED
    run("rm", "-r", image)
    assert state_of(client, datastore / "a") is None


def test_rm_of_one_file_of_a_deleted_image_leaves_it_whole_and_says_so(datastore: Path, client: SidecarClient) -> None:
    """The whole image was freed for good with a file of its disk, and rm of another file did nothing and succeeded."""
    before = tree_digest(datastore / "a")
    run("rm", "-r", datastore / "a")
    deleted = datastore / ".deleted" / "a"
    for name in before:
        assert message_of("rm", deleted / name) == "Operation not permitted"
    assert "Operation not permitted" in run("rm", *(deleted / name for name in before), check=False).stderr
    assert "Operation not permitted" in run("sh", "-c", 'rm -f "$0"/*', deleted, check=False).stderr
    inside = os.open(deleted, os.O_RDONLY | os.O_DIRECTORY)  # somebody else's, such as a shell's that is there
    try:
        assert message_of("rm", deleted / "a.vmdk") == "Operation not permitted"
    finally:
        os.close(inside)
    assert tree_digest(deleted) == before
    assert state_of(client, datastore / "a") == ImageState.IMAGE_STATE_TOMBSTONED
    run("mv", deleted, datastore / "a")
    assert tree_digest(datastore / "a") == before


def test_what_does_nothing_to_a_deleted_image_does_not_succeed(datastore: Path) -> None:
    run("rm", "-r", datastore / "a")
    deleted = datastore / ".deleted" / "a"
    for path in (deleted, deleted / "a.ecv", deleted.parent):
        assert message_of("touch", "-c", path) == "Operation not permitted"
        assert message_of("chmod", "700", path) == "Operation not permitted"


def test_who_deletes_or_copies_all_that_is_listed_does_not_reach_it(datastore: Path, client: SidecarClient) -> None:
    run("rm", "-r", datastore / "a")
    assert ".deleted" not in os.listdir(datastore)
    run("find", datastore, "-mindepth", "1", "-delete")
    run("sh", "-c", 'rm -rf "$0"/* "$0"/.[!.]*', datastore)
    assert state_of(client, datastore / "a") == ImageState.IMAGE_STATE_TOMBSTONED


def test_nothing_is_written_there(datastore: Path) -> None:
    run("rm", "-r", datastore / "a")
    deleted = datastore / ".deleted"
    assert message_of("mkdir", deleted / "b") == "Operation not permitted"
    assert message_of("touch", deleted / "b") == "Operation not permitted"
    assert message_of("rmdir", deleted) == "Directory not empty"
    assert message_of("mkdir", deleted) == "File exists"
    assert message_of("sh", "-c", 'echo x >"$0"', deleted / "a" / "a.vmdk") == "Read-only file system"
    assert message_of("ls", deleted / "b") == "No such file or directory"


def test_images_that_others_delete_restore_and_purge_are_followed(datastore: Path, client: SidecarClient) -> None:
    ref, deleted = f"{datastore.name}/a", datastore / ".deleted"
    client.delete(ref)
    wait_until(lambda: names(deleted) == {"a"}, "the deleted image is listed")
    os.stat(deleted / "a" / "a.vmdk")
    client.restore(ref)
    wait_until(lambda: names(deleted) == set(), "the restored image is not listed any more")
    wait_until(lambda: not (deleted / "a" / "a.vmdk").exists(), "the kernel has forgotten it", 10)
    assert names(datastore) == {"a"}
    client.delete(ref)
    wait_until(lambda: names(deleted) == {"a"}, "the deleted image is listed")
    client.purge(ref)
    wait_until(lambda: names(deleted) == set(), "the purged image is not listed any more")


def test_rmtree_purges(datastore: Path, client: SidecarClient) -> None:
    shutil.rmtree(datastore / "a")
    shutil.rmtree(datastore / ".deleted" / "a")
    assert state_of(client, datastore / "a") is None


def test_rmdir_alone_purges_nothing(datastore: Path, client: SidecarClient) -> None:
    """It may be the end of an rm -r that began with another directory of that name."""
    run("rm", "-r", datastore / "a")
    assert message_of("rmdir", datastore / ".deleted" / "a") == "Directory not empty"
    assert state_of(client, datastore / "a") == ImageState.IMAGE_STATE_TOMBSTONED


def test_who_is_purging_an_image_does_not_delete_it_again_when_it_is_restored(
    datastore: Path, mount: Mount, client: SidecarClient
) -> None:
    """A restore renames the directory that an rm -r is in: it goes on there, in the image that is there again."""
    before = tree_digest(datastore / "a")
    run("rm", "-r", datastore / "a")
    deleted = datastore / ".deleted" / "a"
    inside = os.open(deleted, os.O_RDONLY | os.O_DIRECTORY)
    try:
        run("mv", deleted, datastore / "a")
        for name in ("a.ecv", "a-flat.vmdk", "a.vmdk"):
            with pytest.raises(FileNotFoundError):
                os.unlink(name, dir_fd=inside)
        with pytest.raises(FileNotFoundError):
            deleted.rmdir()
    finally:
        os.close(inside)
    assert tree_digest(datastore / "a") == before
    assert state_of(client, datastore / "a") == ImageState.IMAGE_STATE_VALID
    run("rm", "-r", datastore / "a")  # whoever means it
    assert state_of(client, datastore / "a") == ImageState.IMAGE_STATE_TOMBSTONED


def test_of_a_purge_and_a_restore_at_once_one_fails(datastore: Path, client: SidecarClient) -> None:
    deleted = datastore / ".deleted" / "a"
    for _ in range(8):  # how they meet is chance
        run("rm", "-r", datastore / "a")
        rm = subprocess.Popen(["rm", "-r", deleted], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        mv = subprocess.Popen(["mv", deleted, datastore / "a"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        purged, restored = rm.wait(30) == 0, mv.wait(30) == 0
        assert not (purged and restored)
        left = state_of(client, datastore / "a")
        assert (left is None) == purged
        if left != ImageState.IMAGE_STATE_VALID:
            return


@pytest.mark.parametrize("name", ["a.vmdk", "a-flat.vmdk"])
def test_rm_of_a_file_of_the_disk_is_undone_as_rm_of_the_image_is(name: str, datastore: Path) -> None:
    before = tree_digest(datastore / "a")
    run("rm", datastore / "a" / name)
    run("mv", datastore / ".deleted" / "a", datastore / "a")
    assert names(datastore) == {"a"}
    assert names(datastore / ".deleted") == set()
    assert tree_digest(datastore / "a") == before


def test_a_deleted_image_is_moved_into_no_other_one(datastore: Path, client: SidecarClient) -> None:
    run("cp", "-r", datastore / "a", datastore / "b")
    run("rm", datastore / "a" / "a.vmdk")
    assert message_of("mv", datastore / ".deleted" / "a", datastore / "b") == "Operation not permitted"
    run("mv", datastore / ".deleted" / "a", datastore / "a")
    run("rm", "-r", datastore / "b")
    assert message_of("mv", datastore / ".deleted" / "b", datastore / "a") == "Operation not permitted"
    assert state_of(client, datastore / "b") == ImageState.IMAGE_STATE_TOMBSTONED
