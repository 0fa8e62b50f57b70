"""cp between images: an image copy, complete or not at all, whatever the tool sends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.crash.support import write_image
from tests.mount.harness import (
    COPIERS,
    import_sparse,
    is_name,
    log_of,
    message_of,
    names,
    published_as,
    slowed,
    wait_listed,
)
from tests.support.disks import MIB, allocated, assert_same_disk, digest, import_image, make_disk
from tests.support.processes import Mount, Sidecar, background, loop_mount, run, wait_until

MakeImage = Callable[[str], Path]
DENSE = ((0, 8 * MIB),)


@pytest.fixture
def source(client: SidecarClient, mount: Mount, tmp_path: Path) -> Path:
    """A sparse image with a companion file, in the mount."""
    import_sparse(client, "one/a", make_disk(tmp_path / "source"), companions={"disk.ecv": b'{"k": 1}'})
    return wait_listed(mount, "one/a")


@pytest.fixture
def dense(client: SidecarClient, mount: Mount, tmp_path: Path) -> Path:
    import_image(client, "one/dense", make_disk(tmp_path / "dense", data=DENSE), companions={"disk.ecv": b"{}"})
    return wait_listed(mount, "one/dense")


@pytest.mark.parametrize("datastore", ["one", "two", "three"])
@pytest.mark.parametrize("options", ["-r", "-a"])
@pytest.mark.parametrize("kind", ["source", "dense"])
def test_cp_is_an_image_copy(
    kind: str, options: str, datastore: str, mount: Mount, request: pytest.FixtureRequest
) -> None:
    image: Path = request.getfixturevalue(kind)
    target = mount.path / datastore / "b"
    run("cp", options, image, target)
    # Published by its last close: there at once, under its own names.
    assert names(target) == {"b.vmdk", "b-flat.vmdk", "b.ecv"}
    assert "b" in names(mount.path / datastore)
    assert published_as(mount, f"{datastore}/b") == f"one/{image.name}"
    assert_same_disk(image / f"{image.name}.vmdk", target / "b.vmdk")
    assert (target / "b.ecv").read_bytes() == (image / f"{image.name}.ecv").read_bytes()
    if kind == "source":
        assert allocated(target / "b-flat.vmdk") < 3 * MIB


def test_a_copy_keeps_the_name(source: Path, mount: Mount) -> None:
    run("cp", "-a", source, mount.path / "two")
    assert names(mount.path / "two" / "a") == {"a.vmdk", "a-flat.vmdk", "a.ecv"}
    assert_same_disk(source / "a.vmdk", mount.path / "two" / "a" / "a.vmdk")


def test_a_descriptor_is_read_at_its_new_size_at_once(source: Path, mount: Mount) -> None:
    """The kernel knew the size of the file that was staged under the same path."""
    run("cp", "-r", source, mount.path / "one" / "a-copy-with-a-much-longer-name")
    shown = mount.path / "one" / "a-copy-with-a-much-longer-name" / "a-copy-with-a-much-longer-name.vmdk"
    assert shown.stat().st_size == len(shown.read_bytes())
    assert "a-copy-with-a-much-longer-name-flat.vmdk" in shown.read_text(errors="replace")


@pytest.mark.parametrize(
    "subformat", ["twoGbMaxExtentFlat", "twoGbMaxExtentSparse", "monolithicSparse", "streamOptimized"]
)
def test_every_kind_of_disk(subformat: str, mount: Mount, client: SidecarClient, tmp_path: Path) -> None:
    descriptor = make_disk(tmp_path / "source", subformat=subformat)
    import_image(client, "one/a", descriptor)
    run("cp", "-r", wait_listed(mount, "one/a"), mount.path / "two" / "b")
    assert published_as(mount, "two/b") == "one/a"
    assert_same_disk(descriptor, mount.path / "two" / "b" / "b.vmdk")


def test_mv_between_datastores_copies_and_deletes(source: Path, mount: Mount, client: SidecarClient) -> None:
    expected = digest(source / "a-flat.vmdk")
    run("mv", source, mount.path / "two" / "b")
    assert names(mount.path / "one") == set()
    assert names(mount.path / "two") == {"b"}
    assert digest(mount.path / "two" / "b" / "b-flat.vmdk") == expected
    # It can be undone.
    client.restore("one/a")
    wait_listed(mount, "one/a")
    assert names(source) == {"a.vmdk", "a-flat.vmdk", "a.ecv"}


def test_mv_inside_a_datastore(source: Path, mount: Mount) -> None:
    run("mv", source, mount.path / "one" / "b")
    assert names(mount.path / "one") == {"b"}
    assert names(mount.path / "one" / "b") == {"b.vmdk", "b-flat.vmdk", "b.ecv"}


@pytest.mark.parametrize("kind", ["source", "dense"])
@pytest.mark.parametrize("tool", COPIERS)
def test_a_copy_by_whatever_tool_is_known_to_be_one(
    tool: str, kind: str, mount: Mount, request: pytest.FixtureRequest
) -> None:
    """Where one process reads and another one writes, too."""
    image: Path = request.getfixturevalue(kind)
    target = mount.path / "two" / "b"
    run("sh", "-c", COPIERS[tool], image, target)
    wait_listed(mount, "two/b")
    assert published_as(mount, "two/b") == f"one/{image.name}"
    assert names(target) == {"b.vmdk", "b-flat.vmdk", "b.ecv"}
    assert_same_disk(image / f"{image.name}.vmdk", target / "b.vmdk")
    assert (target / "b.ecv").read_bytes() == (image / f"{image.name}.ecv").read_bytes()


def test_a_file_of_the_same_name_that_somebody_reads_is_not_taken_for_the_source(
    source: Path, client: SidecarClient, mount: Mount, tmp_path: Path
) -> None:
    """An import of another disk of that name, while the image's is open."""
    other = make_disk(tmp_path / "other", "a.vmdk", seed=7)
    with (source / "a-flat.vmdk").open("rb"), (source / "a.vmdk").open("rb"):
        run("cp", "-r", other.parent, mount.path / "two" / "b")
        assert published_as(mount, "two/b") == ""
    assert_same_disk(other, mount.path / "two" / "b" / "b.vmdk")


def test_one_changed_byte_arrives_as_that_byte(source: Path, mount: Mount, tmp_path: Path) -> None:
    target = mount.path / "two" / "b"
    target.mkdir()
    run("cp", source / "a-flat.vmdk", target)
    with (target / "a-flat.vmdk").open("r+b") as file:
        file.seek(100)
        changed = bytes([file.read(1)[0] ^ 1])
        file.seek(100)
        file.write(changed)
    run("cp", source / "a.vmdk", source / "a.ecv", target)
    image = wait_listed(mount, "two/b")
    assert published_as(mount, "two/b") == ""
    copied, original = (image / "b-flat.vmdk").read_bytes(), (source / "a-flat.vmdk").read_bytes()
    assert copied[100:101] == changed
    assert copied[:100] + original[100:101] + copied[101:] == original


def test_a_changed_copy_whose_source_is_deleted_is_still_published(source: Path, mount: Mount) -> None:
    target = mount.path / "two" / "b"
    target.mkdir()
    run("cp", source / "a-flat.vmdk", target)
    with (target / "a-flat.vmdk").open("r+b") as file:
        file.write(b"changed")
    run("cp", source / "a.vmdk", target)
    run("rm", "-r", source)
    assert (wait_listed(mount, "two/b") / "b-flat.vmdk").read_bytes().startswith(b"changed")


def test_a_companion_that_is_replaced_at_once_stays(source: Path, mount: Mount, client: SidecarClient) -> None:
    """The removal of the old file is still due."""
    target, new = mount.path / "two" / "b", mount.path.parent / "new"
    new.write_bytes(b'{"new": 2}')
    run("cp", "-r", source, target)
    run("cp", "--remove-destination", new, target / "b.ecv")
    (source / "a.ecv").unlink()  # due later than the other one
    wait_until(lambda: "companion files removed image=one/a" in log_of(mount), "the time has come")
    assert (target / "b.ecv").read_bytes() == new.read_bytes()
    assert "b.ecv" in [file.name for file in client.image("two/b").files]


def test_a_companion_that_comes_last_is_still_taken(source: Path, mount: Mount) -> None:
    target = mount.path / "two" / "b"
    target.mkdir()
    for name in ("a-flat.vmdk", "a.vmdk", "a.ecv"):
        run("cp", "-a", source / name, target / name)
    assert names(target) == {"b.vmdk", "b-flat.vmdk", "b.ecv"}
    assert (target / "b.ecv").read_bytes() == b'{"k": 1}'


@pytest.mark.parametrize("options", [["-a"], ["-a", "--inplace"]], ids=" ".join)
def test_rsync_brings_a_companion_that_sorts_after_the_disk(
    options: list[str], source: Path, mount: Mount, client: SidecarClient
) -> None:
    """It arrives in an image that is published already, under a name that no companion file can have."""
    client.update_metadata("one/a", files={"notes.txt": b"notes"})
    wait_until(lambda: "notes.txt" in names(source), "the companion file is there")
    target = mount.path / "two" / "b"
    run("rsync", *options, f"{source}/", f"{target}/")
    assert names(target) == {"b.vmdk", "b-flat.vmdk", "b.ecv", "notes.txt"}
    assert (target / "notes.txt").read_bytes() == b"notes"
    assert "notes.txt" in [file.name for file in client.image("two/b").files]


@pytest.mark.parametrize("tool", [["cp", "-r"], ["rsync", "-a"], ["rsync", "-a", "--inplace"]], ids=" ".join)
def test_a_companion_that_is_too_large_to_come_late_is_waited_for(
    tool: list[str], mount: Mount, client: SidecarClient, tmp_path: Path
) -> None:
    import_sparse(client, "one/b", make_disk(tmp_path / "source"), companions={"zz.bin": b"z" * 3 * MIB})
    source, target = wait_listed(mount, "one/b"), mount.path / "two" / "b"
    run(*tool, f"{source}/" if tool[0] == "rsync" else source, target)
    assert published_as(mount, "two/b") == "one/b"
    assert names(target) == {"b.vmdk", "b-flat.vmdk", "zz.bin"}
    assert (target / "zz.bin").read_bytes() == b"z" * 3 * MIB


@pytest.mark.parametrize("tool", ["cp", "rsync"])
def test_nothing_is_left_of_a_companion_that_came_late_and_is_too_large(
    tool: str, source: Path, mount: Mount, client: SidecarClient, tmp_path: Path
) -> None:
    """Of an image whose disk is another one's, as nobody could know that it comes."""
    outside, target = tmp_path / "out", mount.path / "two" / "b"
    run("cp", "-r", source, outside)
    (outside / "zz.bin").write_bytes(b"z" * 3 * MIB)
    if tool == "rsync":
        copied = run("rsync", "-a", f"{outside}/", target, check=False)
    else:  # in this order, in which nobody knows whether cp -r comes to them
        target.mkdir()
        copied = run("cp", *sorted(outside.iterdir()), target, check=False)
    assert copied.returncode
    assert "File too large" in copied.stderr
    assert "remove the image, and copy it anew with this file before its disk" in log_of(mount)
    wait_listed(mount, "two/b")
    assert "zz.bin" not in {file.name for file in client.image("two/b").files} | names(target)


def test_a_late_companion_without_its_name_yet_is_no_file_of_the_image(
    source: Path, mount: Mount, client: SidecarClient
) -> None:
    target = mount.path / "two" / "b"
    run("cp", "-r", source, target)
    (target / ".notes.txt.x").write_bytes(b"notes")
    assert (target / ".notes.txt.x").stat().st_size == 5
    assert names(target) == {"b.vmdk", "b-flat.vmdk", "b.ecv"}
    with pytest.raises(OSError, match="Read-only"):
        (target / ".notes.txt.x").rename(target / "other.vmdk")
    (target / ".notes.txt.x").rename(target / "notes.txt")
    assert not (target / ".notes.txt.x").exists()
    assert (target / "notes.txt").read_bytes() == b"notes"
    assert "notes.txt" in [file.name for file in client.image("two/b").files]


def test_the_copiers_names_resolve_for_a_while_and_are_not_listed(source: Path, mount: Mount) -> None:
    target = mount.path / "two" / "b"
    run("cp", "-r", source, target)
    for name in ("a.vmdk", "a-flat.vmdk", "a.ecv"):
        os.utime(target / name, ns=(1, 1))
        (target / name).chmod(0o600)
        assert (target / name).stat().st_size == (target / name.replace("a", "b", 1)).stat().st_size
    for path in (target / "a.vmdk", target / "b.vmdk", target):
        run("chown", "1:1", path)
        run("chmod", "700", path)
        run("touch", "-d", "2001-01-01", path)
        run("setfattr", "-n", "user.k", "-v", "v", path)
    os.utime(target)
    assert names(target) == {"b.vmdk", "b-flat.vmdk", "b.ecv"}


@pytest.mark.slow
def test_looking_does_not_keep_a_published_image_open_for_companions(source: Path, mount: Mount) -> None:
    target = mount.path / "two" / "b"
    run("cp", "-r", source, target)

    def is_closed() -> bool:
        return not (target / "a.vmdk").exists()  # the copier's name: looks, again and again

    wait_until(is_closed, "the copier is forgotten")
    with pytest.raises(OSError, match="Read-only"):
        (target / "junk.txt").write_bytes(b"x")


def test_of_several_copies_at_once_to_the_same_name_one_wins(source: Path, mount: Mount) -> None:
    for number in range(8):  # how they meet is chance
        target = mount.path / "two" / f"b{number}"
        copies = [subprocess.Popen(["cp", "-r", source, target], stderr=subprocess.PIPE, text=True) for _ in range(4)]
        results = [(copy.communicate(timeout=60)[1], copy.returncode) for copy in copies]
        assert sorted(code for _, code in results) == [0, 1, 1, 1], results
        assert all(message.startswith("cp: cannot create") for message, code in results if code), results
        assert_same_disk(source / "a.vmdk", wait_listed(mount, f"two/b{number}") / f"b{number}.vmdk")


def test_nobody_else_writes_into_what_a_copier_makes_until_it_left(source: Path, mount: Mount, tmp_path: Path) -> None:
    """A `cp -r` that found the directory, which another one had just made, and goes on as if it were its own."""
    target, script = mount.path / "two" / "b", tmp_path / "maker.py"
    script.write_text(
        "import os, sys\n"
        "os.mkdir(sys.argv[1])\n"
        "file = open(sys.argv[1] + '/a.vmdk', 'wb')\n"
        "print('made', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, script, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "made\n"
        assert message_of("cp", source / "a-flat.vmdk", target) == "Device or resource busy"
        assert message_of("cp", source / "a.vmdk", target) == "Device or resource busy"
        assert message_of("cp", "-f", source / "a.vmdk", target) == "Device or resource busy"
        assert message_of("rm", target / "a.vmdk") == "Device or resource busy"
        assert message_of("mv", target / "a.vmdk", target / "c.vmdk") == "Device or resource busy"
        assert message_of("rmdir", target) == "Device or resource busy"
        with pytest.raises(OSError, match="Device or resource busy"):
            os.truncate(target / "a.vmdk", 1)
        assert names(target) == {"a.vmdk"}
        maker.communicate("")
    run("cp", source / "a-flat.vmdk", source / "a.vmdk", target)
    assert_same_disk(source / "a.vmdk", wait_listed(mount, "two/b") / "b.vmdk")


@pytest.mark.slow
def test_an_interrupted_cp_ends_at_once_however_slow_the_datastore_is(tmp_path: Path, stack: ExitStack) -> None:
    """cp asks for the whole file; it ends when its request is answered."""
    root = stack.enter_context(loop_mount(tmp_path / "slow", 600 * MIB, ("mkfs.xfs", "-q", "-m", "reflink=0")))
    write_image(root, "compound", "a", size=200 * MIB, dense=True)
    os.sync()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},reserve=0"))
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))
    target = mount.path / "one" / "b"
    with slowed(sidecar, root, 10 * MIB):  # 20 s for all of it
        copy = stack.enter_context(background("cp", "-r", mount.path / "one" / "a", target))
        wait_until(lambda: any(path.stat().st_size for path in target.glob("*")), "the copy has begun")
        begun = time.monotonic()
        copy.send_signal(signal.SIGINT)
        assert copy.wait(30) == -signal.SIGINT
        assert time.monotonic() - begun < 4  # one request is about a second long
        wait_until(lambda: not list(root.glob("tmp_image_*")), f"nothing is left:\n{log_of(mount)}")
    assert names(mount.path / "one") == {"a"}


@pytest.mark.slow
@pytest.mark.parametrize("copier", [["cp", "-r"], ["busybox", "cp", "-r"]])
def test_an_interrupted_cp_publishes_nothing_and_leaves_nothing(
    copier: list[str], mount: Mount, client: SidecarClient, tmp_path: Path
) -> None:
    import_image(client, "one/big", make_disk(tmp_path / "big", size=512 * MIB, data=((0, 512 * MIB),)))
    source, target = wait_listed(mount, "one/big"), mount.path / "two" / "b"
    copy = subprocess.Popen([*copier, source, target])
    wait_until((target / "big-flat.vmdk").exists, "the copy has begun")
    copy.send_signal(signal.SIGINT)
    assert copy.wait(30) == -signal.SIGINT

    def is_dropped() -> bool:
        target.exists()  # what the kernel knows of it is young when it goes
        return not os.listdir(tmp_path / "two" / "tmp_images")

    wait_until(is_dropped, f"nothing is left:\n{log_of(mount)}", 20)
    wait_until(lambda: not target.exists(), "the kernel shows it no longer", 1)
    assert names(mount.path / "two") == set()
    # And it can be done again.
    wait_until(lambda: not is_name(target), "the name is gone", 10)
    run(*copier, source, target)
    assert_same_disk(source / "big.vmdk", wait_listed(mount, "two/b") / "b.vmdk")
