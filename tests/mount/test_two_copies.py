"""Two copies to one new name: the files of both together are no image."""

import errno
import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mount.harness import names
from tests.support.disks import assert_same_disk, make_disk
from tests.support.processes import Mount, Sidecar, background, run

_MAKER = """
import os, sys
os.mkdir(sys.argv[1])
with open(sys.argv[1] + "/notes.txt", "w") as file:
    file.write("the first one's")
print("made", flush=True)
sys.stdin.read()
"""


def test_who_found_a_directory_anothers_does_not_go_on_with_its_next_file(mount: Mount, stack: ExitStack) -> None:
    target = mount.path / "one" / "new"
    maker = stack.enter_context(
        subprocess.Popen([sys.executable, "-c", _MAKER, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )
    assert maker.stdin is not None and maker.stdout is not None
    assert maker.stdout.readline() == b"made\n"

    def refusal(name: str) -> int | None:
        with pytest.raises(OSError) as refused:
            os.close(os.open(target / name, os.O_WRONLY | os.O_CREAT))
        return refused.value.errno

    assert refusal("notes.txt") == errno.EBUSY
    maker.stdin.close()
    assert maker.wait(20) == 0
    assert refusal("new-flat.vmdk") == errno.EBUSY
    # Whoever comes now began after it.
    with background("sh", "-c", 'echo text >"$0"', Path(target / "late.txt")) as other:
        assert other.wait(20) == 0


@pytest.fixture
def copied(sidecar: Sidecar, disk: Path, tmp_path: Path, stack: ExitStack) -> Path:
    """A directory of the mount into which somebody has copied `disk`, and nobody published it yet."""
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address, options="settle=3600"))
    target = mount.path / "one" / "new"
    run("setsid", "--wait", "cp", "-r", disk.parent, target)
    return target


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another disk, whose files have the same names."""
    return make_disk(tmp_path / "other" / "disk", seed=2).parent


@pytest.mark.parametrize("copy", ["cp -rT", "rsync -aI"])
def test_a_sync_does_not_publish_what_another_one_copied_over_it(
    copied: Path, other: Path, disk: Path, copy: str
) -> None:
    source = f"{other}/" if copy.startswith("rsync") else other
    result = run("setsid", "--wait", *copy.split(), source, f"{copied}/", check=False)
    assert "Device or resource busy" in result.stderr
    assert result.returncode != 0
    run("sync", copied)
    assert_same_disk(disk, copied / "new.vmdk")
    assert names(copied) == {"new.vmdk", "new-flat.vmdk"}


@pytest.mark.parametrize("copy", ['cp -rT --remove-destination "$0" "$1"', 'tar -C "$0" -c . | tar -C "$1" -x'])
def test_who_takes_files_away_puts_none_of_another_image_in_their_place(copied: Path, other: Path, copy: str) -> None:
    result = run("setsid", "--wait", "sh", "-c", copy, other, copied, check=False)
    assert "Device or resource busy" in result.stderr
    assert result.returncode != 0
    assert "Invalid argument" in run("sync", copied, check=False).stderr
    # Nor later, when somebody has looked: the next sync would say that all is well.
    assert "busy" in run("setsid", "--wait", "cp", "-rT", other, copied, check=False).stderr


def test_why_somebody_is_refused_is_in_the_log(copied: Path, other: Path, tmp_path: Path) -> None:
    run("setsid", "--wait", "cp", "-rT", other, copied, check=False)
    assert "one/new was written by another session" in (tmp_path / "mnt.log").read_text()


def test_who_was_refused_leaves_no_other_file_and_may_remove_all(copied: Path, other: Path, disk: Path) -> None:
    (other / "notes.txt").write_text("text")
    assert "busy" in run("setsid", "--wait", "cp", other / "disk.vmdk", other / "notes.txt", copied, check=False).stderr
    assert names(copied) == {"disk.vmdk", "disk-flat.vmdk"}
    refused_and_removing = """
        import os, sys
        try:
            open(sys.argv[1] + "/disk.vmdk", "r+b")
        except OSError:
            os.unlink(sys.argv[1] + "/disk.vmdk")
        """
    run("setsid", "--wait", sys.executable, "-c", textwrap.dedent(refused_and_removing), copied)
    assert names(copied) == {"disk-flat.vmdk"}


def test_another_file_that_is_no_companion_is_told_by_the_sync(copied: Path, other: Path) -> None:
    run("setsid", "--wait", "cp", other / "disk.vmdk", copied / "more.vmdk")
    assert "Invalid argument" in run("sync", copied, check=False).stderr
    run("rm", copied / "more.vmdk")
    run("sync", copied)
    assert names(copied) == {"new.vmdk", "new-flat.vmdk"}


def test_who_made_it_may_write_it_anew(copied: Path, other: Path, disk: Path) -> None:
    run("rm", "-r", copied)
    make_both = 'cp -r "$0" "$2" && cp -rT "$1" "$2" && sync "$2"'
    run("setsid", "--wait", "sh", "-c", make_both, disk.parent, other, copied)
    assert_same_disk(other / "disk.vmdk", copied / "new.vmdk")


def test_a_program_that_makes_images_by_others_in_sessions_of_their_own(copied: Path, other: Path, disk: Path) -> None:
    run("rm", "-r", copied)
    program = """
        import os, subprocess, sys
        first, second, target = sys.argv[1:]
        os.mkdir(target)
        for source in (first, second):
            subprocess.run(["cp", "-rT", source, target], check=True, start_new_session=True)
        with open(target + "/disk.vmdk", "r+b") as file:
            file.write(file.read())
        os.unlink(target + "/disk.vmdk")
        """
    run(sys.executable, "-c", textwrap.dedent(program), disk.parent, other, copied)
    assert names(copied) == {"disk-flat.vmdk"}


def test_files_that_are_copied_one_by_one_are_written_anew_from_anywhere(copied: Path, other: Path) -> None:
    run("rm", "-r", copied)
    copy_descriptor: list[str | Path] = ["cp", other / "disk.vmdk", copied]
    for command in (["mkdir", copied], copy_descriptor, copy_descriptor):
        run("setsid", "--wait", *command)
    run("setsid", "--wait", "cp", "-rT", other, copied)
    run("sync", copied)
    assert_same_disk(other / "disk.vmdk", copied / "new.vmdk")


def test_anybody_adds_a_companion_file_and_removes_the_whole(copied: Path, other: Path) -> None:
    (other / "notes.txt").write_text("text")
    run("setsid", "--wait", "rsync", other / "notes.txt", copied)
    assert names(copied) == {"disk.vmdk", "disk-flat.vmdk", "notes.txt"}
    run("setsid", "--wait", "rm", "-r", copied)
    assert names(copied.parent) == set()
    assert not copied.exists()


def test_anybody_goes_on_with_what_could_not_be_published(copied: Path, other: Path, disk: Path) -> None:
    run("rm", "-r", copied)
    (disk.parent / "disk-flat.vmdk").unlink()
    run("setsid", "--wait", "cp", "-r", disk.parent, copied)
    assert "Invalid argument" in run("sync", copied, check=False).stderr
    run("setsid", "--wait", "cp", "-rT", other, copied)
    run("sync", copied)
    assert_same_disk(other / "disk.vmdk", copied / "new.vmdk")


def test_what_was_made_before_the_refusal_is_not_published_with_the_first_ones(copied: Path, other: Path) -> None:
    (other / "notes.txt").write_text("text")
    files = [other / "notes.txt", other / "disk.vmdk"]
    assert "busy" in run("setsid", "--wait", "cp", *files, copied, check=False).stderr
    assert "Input/output error" in run("sync", copied, check=False).stderr
    run("rm", copied / "notes.txt")
    run("sync", copied)
    assert names(copied) == {"new.vmdk", "new-flat.vmdk"}
