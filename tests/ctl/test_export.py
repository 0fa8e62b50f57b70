"""imagectl export: a directory that is complete or not there."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.ctl.conftest import Imagectl
from tests.ctl.relay import holding_back
from tests.support.disks import allocated, assert_same_disk
from tests.support.processes import Sidecar, loop_mount, wait_until

MIB = 1 << 20
MakeImage = Callable[[str], Path]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_an_image_is_exported_with_its_holes(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path) -> None:
    source = make_image("one/a")
    (tmp_path / "meta").write_text('{"a": 1}')
    imagectl("import", source, "one/b", "--metadata", tmp_path / "meta")
    output = imagectl("export", "one/b", tmp_path / "out")
    assert output.startswith(f"one/b exported to {tmp_path}/out: 3 files, 2.0 MiB")
    assert names(tmp_path / "out") == {"b.vmdk", "b-flat.vmdk", "b.ecv"}
    assert_same_disk(source, tmp_path / "out" / "b.vmdk")
    assert allocated(tmp_path / "out") < 3 * MIB
    assert (tmp_path / "out" / "b.ecv").read_text() == '{"a": 1}'
    assert not [name for name in names(tmp_path) if "partial" in name]


def test_the_directory_has_the_usual_permissions(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path) -> None:
    make_image("one/a")
    imagectl("export", "one/a", tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "out" / "a.vmdk").stat().st_mode & 0o777 == 0o666 & ~umask


def test_programs_are_told_what_was_written(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path) -> None:
    make_image("one/a")
    document = imagectl.json("export", "one/a", tmp_path / "out")
    assert (document["image"], document["directory"]) == ("one/a", str(tmp_path / "out"))
    assert set(document["files"]) == names(tmp_path / "out")


def test_an_empty_directory_is_filled_also_through_a_link(
    imagectl: Imagectl, make_image: MakeImage, tmp_path: Path
) -> None:
    make_image("one/a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    imagectl("export", "one/a", tmp_path / "link")
    assert names(tmp_path / "empty") == {"a.vmdk", "a-flat.vmdk"}
    assert (tmp_path / "link").is_symlink()


def test_a_relative_directory_is_of_the_current_one(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path) -> None:
    make_image("one/a")
    imagectl("export", "one/a", "out/", cwd=tmp_path)
    assert (tmp_path / "out" / "a.vmdk").exists()


def test_what_is_there_is_never_touched(imagectl: Imagectl, make_image: MakeImage, tmp_path: Path) -> None:
    make_image("one/a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("years")
    (tmp_path / "file").write_text("years")
    (tmp_path / "here").mkdir()
    before = names(tmp_path)
    assert "not empty" in imagectl.error("export", "one/a", tmp_path / "full", code=4)
    assert "not a directory" in imagectl.error("export", "one/a", tmp_path / "file", code=2)
    assert "cannot be made" in imagectl.error("export", "one/a", tmp_path / "no" / "out", code=2)
    # Replacing the directory that the shell is in would leave it nowhere.
    assert "current directory" in imagectl.error("export", "one/a", ".", code=2, cwd=tmp_path / "here")
    assert names(tmp_path) == before
    assert names(tmp_path / "full") == {"thesis"}


def test_what_cannot_be_made_is_told_by_the_name_that_was_given(imagectl: Imagectl, make_image: MakeImage) -> None:
    make_image("one/a")
    assert imagectl.error("export", "one/a", "/proc/x", code=1) == "/proc/x: cannot be made: No such file or directory"


def test_no_image_makes_no_directory(imagectl: Imagectl, tmp_path: Path) -> None:
    imagectl.error("export", "one/none", tmp_path / "out", code=3)
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_deleted_or_broken_is_not_exported(
    imagectl: Imagectl, make_image: MakeImage, tmp_path: Path
) -> None:
    make_image("one/a")
    make_image("one/b")
    imagectl("rm", "one/a")
    (tmp_path / "one" / "image_b" / "b-flat.vmdk").unlink()
    assert "restore" in imagectl.error("export", "one/a", tmp_path / "out", code=5)
    assert "b-flat.vmdk" in imagectl.error("export", "one/b", tmp_path / "out", code=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["a companion is replaced", "the image is replaced", "the image is gone"])
def test_a_mixture_of_two_images_is_never_exported(
    change: str, sidecar: Sidecar, client: SidecarClient, imagectl: Imagectl, make_image: MakeImage, tmp_path: Path
) -> None:
    (tmp_path / "meta").write_text('{"version": 1}')
    imagectl("import", make_image("one/other"), "one/a", "--metadata", tmp_path / "meta")
    image, other = tmp_path / "one" / "image_a", tmp_path / "one" / "image_other"
    before = names(tmp_path)
    with holding_back(tmp_path / "relay.sock", sidecar.address, MIB // 2) as relay:
        process = Imagectl(relay.address).start("export", "one/a", tmp_path / "out")
        try:
            # The companions come first, so the metadata is written already.
            wait_until(relay.holding.is_set, "the export is in its middle")
            if change == "a companion is replaced":
                client.update_metadata("one/a", files={"a.ecv": b'{"version": 2}'})
            elif change == "the image is replaced":
                # As by a purge and another import, which the sidecar would not do while it reads the image itself.
                image.rename(tmp_path / "one" / "was")
                shutil.copytree(tmp_path / "one" / "was", image)
            else:
                image.rename(tmp_path / "one" / "was")
            relay.release()
            output, message = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait(10)
    assert (process.returncode, output) == (3 if "no image" in message else 1, ""), message
    assert "one/a" in message
    assert other.exists()
    (tmp_path / "relay.sock").unlink()
    assert names(tmp_path) == before


def test_an_image_that_is_used_or_deleted_meanwhile_is_the_same_image(
    sidecar: Sidecar, client: SidecarClient, make_image: MakeImage, tmp_path: Path
) -> None:
    source = make_image("one/a")
    with holding_back(tmp_path / "relay.sock", sidecar.address, MIB // 2) as relay:
        process = Imagectl(relay.address).start("export", "one/a", tmp_path / "out")
        try:
            wait_until(relay.holding.is_set, "the export is in its middle")
            client.touch("one/a")
            client.delete("one/a")
            relay.release()
            _, message = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait(10)
    assert process.returncode == 0, message
    assert_same_disk(source, tmp_path / "out" / "a.vmdk")


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing(
    there: bool, imagectl: Imagectl, make_image: MakeImage, tmp_path: Path, stack: ExitStack
) -> None:
    make_image("one/a")
    root = stack.enter_context(loop_mount(tmp_path / "fs", 2 * MIB, ("mkfs.ext4", "-q", "-O", "^has_journal")))
    (root / "dir").mkdir()
    if there:
        (root / "dir" / "out").mkdir()
    assert "No space left" in imagectl.error("export", "one/a", root / "dir" / "out", code=7)
    assert names(root / "dir") == ({"out"} if there else set())
