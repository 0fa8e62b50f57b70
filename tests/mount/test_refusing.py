"""What cannot be is refused at once, with an errno that makes sense in the tool's own message."""

import errno
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.crash.support import write_image
from tests.mount.harness import hanging, log_of, message_of, names, wait_listed
from tests.support.disks import MIB, make_disk
from tests.support.processes import Mount, Sidecar, loop_mount, run, wait_until

MakeImage = Callable[[str], Path]


@pytest.fixture
def image(make_image: MakeImage, mount: Mount) -> Path:
    make_image("one/a")
    return wait_listed(mount, "one/a")


@pytest.mark.parametrize("name", [".hidden", "with space", "ümlaut", "x" * 129, "lock.ec_lock"])
def test_what_is_no_image_id(name: str, mount: Mount) -> None:
    assert message_of("mkdir", mount.path / "one" / name) == "Invalid argument"


def test_an_image_that_exists(image: Path, mount: Mount, client: SidecarClient) -> None:
    assert message_of("mkdir", image) == "File exists"
    run("rm", "-r", image)
    # Deleted, and restorable: the name is not free yet.
    assert message_of("mkdir", image) == "File exists"


def test_a_published_image_is_read_only(image: Path, tmp_path: Path, mount: Mount) -> None:
    read_only = "Read-only file system"
    assert message_of("sh", "-c", 'echo x > "$0"', image / "a.vmdk") == read_only
    assert message_of("sh", "-c", 'echo x >> "$0"', image / "a.vmdk") == read_only
    assert message_of("truncate", "-s", "1", image / "a-flat.vmdk") == read_only
    assert message_of("chmod", "600", image / "a.vmdk") == read_only
    assert message_of("chown", "1", image / "a.vmdk") == read_only
    assert message_of("chmod", "600", image) == read_only
    assert message_of("touch", image / "a.vmdk") == read_only
    assert message_of("setfattr", "-n", "user.k", "-v", "v", image / "a.vmdk") == read_only
    assert message_of("touch", image / "new") == read_only
    assert message_of("mkdir", image / "sub") == read_only
    assert message_of("mv", image / "a.vmdk", image / "b.vmdk") == read_only
    assert message_of("cp", "-r", tmp_path / "sources", image) == read_only
    assert "Operation not permitted" in message_of("ln", "-s", "x", image / "link")
    assert message_of("ln", image / "a.vmdk", image / "hard") == "Operation not permitted"
    assert names(image) == {"a.vmdk", "a-flat.vmdk"}


@pytest.mark.parametrize("name", ["a.vmdk", "a-flat.vmdk"])
def test_forcing_a_file_into_an_image_does_not_delete_it(
    name: str, image: Path, client: SidecarClient, disk: Path
) -> None:
    """What may not be written to is unlinked then, to be made anew."""
    assert message_of("cp", "-f", disk, image / name) == "Read-only file system"
    assert message_of("busybox", "cp", "-f", disk, image / name) == "Read-only file system"
    assert run("perl", "-e", 'open(F, "+<", $ARGV[0]) || unlink($ARGV[0]) || die', image / name, check=False).returncode
    assert [each.ref.image_id for each in client.images("one")] == ["a"]
    run("rm", image / name)
    assert not list(client.images("one"))


def test_only_images_are_in_a_datastore_and_only_datastores_in_the_root(mount: Mount) -> None:
    assert message_of("mkdir", mount.path / "four") == "Operation not permitted"
    assert message_of("rmdir", mount.path / "one") == "Operation not permitted"
    assert message_of("touch", mount.path / "one" / "file") == "Operation not permitted"
    assert message_of("touch", mount.path / "file") == "Operation not permitted"
    staged = mount.path / "one" / "new"
    staged.mkdir()
    assert message_of("mkdir", staged / "sub") == "Operation not permitted"
    assert message_of("touch", staged / "image_tombstone.txt") == "Operation not permitted"
    assert message_of("rmdir", mount.path / "one" / "none") == "No such file or directory"


def test_renaming_by_hand_is_a_copy(image: Path, mount: Mount) -> None:
    with pytest.raises(OSError) as error:
        os.rename(image, mount.path / "two" / "b")
    assert error.value.errno == errno.EXDEV


def test_touch_is_a_touch(image: Path, client: SidecarClient) -> None:
    before = client.image("one/a").touch_time.ToNanoseconds()
    run("touch", image)
    assert client.image("one/a").touch_time.ToNanoseconds() > before
    for which in ("-a", "-m", "-am"):
        assert message_of("touch", which, "-d", "2001-01-01", image) == "Read-only file system"
    for which in ("-a", "-m"):
        before = client.image("one/a").touch_time.ToNanoseconds()
        run("touch", which, image)
        assert client.image("one/a").touch_time.ToNanoseconds() > before


def test_a_sidecar_that_is_away(image: Path, sidecar: Sidecar, mount: Mount) -> None:
    expected = (image / "a-flat.vmdk").read_bytes()
    assert sidecar.stop() == 0
    assert message_of("mkdir", mount.path / "one" / "new") == "Host is down"
    assert message_of("rmdir", image) == "Host is down"
    assert message_of("rm", "-r", image).endswith("Host is down")
    # What is known is served, and read from the datastore itself.
    assert names(mount.path / "one") == {"a"}
    assert (image / "a-flat.vmdk").read_bytes() == expected
    sidecar.start()
    wait_until(lambda: run("mkdir", mount.path / "one" / "new", check=False).returncode == 0, "it is back", 10)
    (mount.path / "one" / "new").rmdir()
    run("rm", "-r", image)


def seconds_of(*command: str | Path) -> tuple[str, float]:
    begun = time.monotonic()
    message = message_of(*command)
    return message, time.monotonic() - begun


@pytest.mark.slow
def test_a_sidecar_that_hangs_is_down_within_seconds_and_hides_nothing(
    image: Path, sidecar: Sidecar, mount: Mount, client: SidecarClient
) -> None:
    expected = (image / "a-flat.vmdk").read_bytes()
    staged = mount.path / "one" / "staged"
    staged.mkdir()
    with hanging(sidecar):
        begun = time.monotonic()
        assert names(mount.path / "one") == {"a"}
        assert run("ls", "-lR", image).stdout.count("vmdk") == 2
        run("df", mount.path / "one")
        assert (image / "a-flat.vmdk").read_bytes() == expected
        assert time.monotonic() - begun < 2
        message, seconds = seconds_of("touch", image)
        assert message == "Host is down"
        assert seconds < 5
        message, seconds = seconds_of("rm", "-r", image)
        assert message.endswith("Host is down")
        assert seconds < 5
        message, seconds = seconds_of("mkdir", mount.path / "one" / "new")
        assert message == "Host is down"
        assert seconds < 5
        message, seconds = seconds_of("cp", "-r", image, mount.path / "two" / "b")
        assert message == "Host is down"
        assert seconds < 5
        begun = time.monotonic()
        run("rmdir", staged, check=False)
        assert time.monotonic() - begun < 5
    # Nothing that was refused is done behind the user's back; and then it works again, by itself.
    wait_until(lambda: run("touch", image, check=False).returncode == 0, "it is back", 10)
    assert names(mount.path / "one") == {"a"}
    assert [each.ref.image_id for each in client.images()] == ["a"]
    run("cp", "-r", image, mount.path / "two" / "b")
    run("rm", "-r", image)
    assert names(mount.path / "two") == {"b"}


@pytest.mark.slow
def test_images_of_which_only_the_names_are_known_are_not_waited_for_one_by_one(
    tmp_path: Path, sidecar: Sidecar, mount: Mount
) -> None:
    for number in range(4):
        write_image(tmp_path / "three", "vsan", f"a{number}")  # of this layout, files are asked for when somebody looks
    for number in range(4):
        wait_listed(mount, f"three/a{number}")
    with hanging(sidecar):
        begun = time.monotonic()
        run("ls", "-l", mount.path / "three")
        assert time.monotonic() - begun < 1
        message, seconds = seconds_of("ls", "-lR", mount.path / "three")
        assert message == "Host is down"
        assert seconds < 5  # as long as for one
    wait_until(lambda: run("ls", "-lR", mount.path / "three", check=False).returncode == 0, "it is back", 10)


@pytest.mark.slow
def test_a_copy_ends_within_seconds_when_the_sidecar_hangs_in_its_middle(
    image: Path, sidecar: Sidecar, mount: Mount
) -> None:
    target = mount.path / "two" / "b"
    target.mkdir()
    with (image / "a-flat.vmdk").open("rb") as source, (target / "a-flat.vmdk").open("wb") as copied:
        assert os.copy_file_range(source.fileno(), copied.fileno(), 65536) == 65536
        with hanging(sidecar):
            begun = time.monotonic()
            with pytest.raises(OSError, match="Host is down"):
                os.copy_file_range(source.fileno(), copied.fileno(), 65536)
            assert time.monotonic() - begun < 8
    # That copy may still come over whatever is written to the same place: only another directory is safe from it.
    assert message_of("cp", image / "a-flat.vmdk", target) == "Input/output error"
    assert message_of("cp", image / "a.vmdk", target) == "Input/output error"
    wait_until(lambda: not target.exists(), "nobody can complete it, so it is dropped")
    run("cp", "-r", image, target)


@pytest.mark.slow
def test_a_full_datastore(tmp_path: Path, stack: ExitStack) -> None:
    root = stack.enter_context(loop_mount(tmp_path / "loop", 96 * MIB, ("mkfs.ext4", "-q")))
    (tmp_path / "large").mkdir()
    arguments = (f"small={root},reserve=32MiB", f"large={tmp_path / 'large'}")
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", *arguments))
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))
    outside = tmp_path / "outside"
    make_disk(outside, "x.vmdk", size=80 * MIB, data=((0, 80 * MIB),))
    target = mount.path / "small" / "new"
    assert message_of("cp", "-r", outside, target) == "No space left on device"
    assert os.statvfs(root).f_bavail * os.statvfs(root).f_frsize > 8 * MIB
    run("rm", "-r", target)
    assert not list(root.glob("tmp_image_*"))
    run("cp", "-r", outside, mount.path / "large" / "new")
    source = wait_listed(mount, "large/new")
    assert message_of("cp", "-r", source, target) == "No space left on device"
    run("rm", "-rf", target)
    assert names(mount.path / "small") == set()
    # The reserve is not given to who asks in advance, either.
    target.mkdir()
    assert message_of("fallocate", "--length", str(60 * MIB), target / "x") == "No space left on device"
    assert os.statvfs(root).f_bavail * os.statvfs(root).f_frsize > 60 * MIB


def test_the_reserve_of_a_small_datastore_is_kept_too(tmp_path: Path, stack: ExitStack) -> None:
    root = stack.enter_context(loop_mount(tmp_path / "loop", 24 * MIB, ("mkfs.ext4", "-q")))
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"small={root},reserve=8MiB"))
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))
    outside = tmp_path / "outside"
    make_disk(outside, "x.vmdk", size=20 * MIB, data=((0, 20 * MIB),))
    assert message_of("cp", "-r", outside, mount.path / "small" / "new") == "No space left on device"
    assert os.statvfs(root).f_bavail * os.statvfs(root).f_frsize >= 7 * MIB  # but for the file system's own


def test_a_datastore_without_room_says_so_before_anything_is_copied(tmp_path: Path, stack: ExitStack) -> None:
    (tmp_path / "full").mkdir()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"full={tmp_path / 'full'},reserve=1024TiB"))
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))
    assert message_of("mkdir", mount.path / "full" / "new") == "No space left on device"
    assert run("df", "--output=avail", mount.path / "full").stdout.split()[1] == "0"
    assert not list((tmp_path / "full").glob("tmp_image_*"))


def test_whatever_fails_is_in_the_log_with_its_call_path_and_cause(
    image: Path, make_image: MakeImage, sidecar: Sidecar, mount: Mount
) -> None:
    make_image("one/deleted")
    run("rm", "-r", wait_listed(mount, "one/deleted"))
    assert sidecar.stop() == 0
    one = image.parent
    failing: dict[str, tuple[str | Path, ...]] = {
        "mkdir failed path=/one/new ": ("mkdir", one / "new"),
        "rmdir failed path=/one/a ": ("rmdir", image),
        "unlink failed path=/one/a/a.vmdk ": ("rm", image / "a.vmdk"),
        "utimens failed path=/one/a ": ("touch", image),
        "rename failed path=/one/.deleted/deleted ": ("mv", one / ".deleted" / "deleted", one),
        "unlink failed path=/one/.deleted/deleted/deleted.vmdk ": ("rm", "-r", one / ".deleted/deleted"),
    }
    for entry, command in failing.items():
        assert entry not in log_of(mount)
        assert message_of(*command) == "Host is down"
        [line] = [line for line in log_of(mount).splitlines() if entry in line]
        assert "reason=SIDECAR_UNAVAILABLE cause=the sidecar at unix:" in line


def test_a_name_that_is_not_utf_8(make_image: MakeImage, mount: Mount) -> None:
    make_image("one/a")
    bad = os.fsdecode(b"\xff")
    with pytest.raises(OSError, match="Invalid argument"):
        (mount.path / "one" / bad).mkdir()
    run("cp", "-r", wait_listed(mount, "one/a"), mount.path / "two" / "b")
    with pytest.raises(OSError, match="Invalid argument"):
        (mount.path / "two" / "b" / bad).write_bytes(b"")
    assert "Traceback" not in log_of(mount)


def test_a_datastore_of_which_nothing_is_known_is_not_an_empty_one(tmp_path: Path, stack: ExitStack) -> None:
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"gone={tmp_path / 'gone'},layout=compound"))
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))
    with pytest.raises(OSError, match="Input/output error"):
        os.listdir(mount.path / "gone")
    assert "opendir failed path=/gone cause=" in log_of(mount)
