"""Looking around and reading, with the tools that people use."""

import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from tests.mount.harness import import_sparse, names, wait_listed
from tests.support.disks import MIB, allocated, assert_same_disk, digest, import_image, make_disk
from tests.support.processes import Mount, Sidecar, loop_mount, run, wait_until

MakeImage = Callable[[str], Path]


@pytest.mark.parametrize("datastore", ["one", "two", "three"])
def test_lists_images_and_their_files_and_nothing_of_the_sidecars_own(
    datastore: str, mount: Mount, client: SidecarClient, tmp_path: Path
) -> None:
    descriptor = make_disk(tmp_path / "source", "x.vmdk")
    import_image(client, f"{datastore}/a", descriptor, companions={"x.ecv": b'{"k": 1}'})
    image = wait_listed(mount, f"{datastore}/a")
    assert run("ls", mount.path).stdout.split() == ["one", "three", "two"]
    assert run("ls", mount.path / datastore).stdout.split() == ["a"]
    # In the order that makes a copy complete with its last file.
    assert run("ls", "-U", image).stdout.split() == ["a.ecv", "a-flat.vmdk", "a.vmdk"]
    assert run("find", image, "-type", "f", "-printf", "%f %s\n").stdout.splitlines()[1] == f"a-flat.vmdk {8 * MIB}"
    assert (image / "a.ecv").read_bytes() == b'{"k": 1}'


def test_stat_shows_what_the_datastore_has(mount: Mount, client: SidecarClient, tmp_path: Path) -> None:
    import_sparse(client, "one/a", make_disk(tmp_path / "source"))
    image = wait_listed(mount, "one/a")
    for name in names(image):
        real, shown = os.stat(tmp_path / "one" / "image_a" / name), os.stat(image / name)
        assert (shown.st_size, shown.st_blocks, shown.st_mtime_ns) == (real.st_size, real.st_blocks, real.st_mtime_ns)
        assert oct(shown.st_mode) == oct(0o100444)
        assert (shown.st_uid, shown.st_gid, shown.st_nlink) == (os.getuid(), os.getgid(), 1)
    assert oct(os.stat(image).st_mode) == oct(0o40755)
    inodes = [os.stat(path).st_ino for path in (mount.path, mount.path / "one", image, *sorted(image.iterdir()))]
    assert len(set(inodes)) == len(inodes)
    assert inodes == [
        os.stat(path).st_ino for path in (mount.path, mount.path / "one", image, *sorted(image.iterdir()))
    ]
    assert (image / "a-flat.vmdk").stat().st_blocks * 512 < 8 * MIB


def disk_usage(directory: Path) -> int:
    return int(run("du", "--summarize", "--block-size=1", directory).stdout.split()[0])


def test_du_shows_what_images_take_however_they_came(mount: Mount, client: SidecarClient, tmp_path: Path) -> None:
    """With holes: what they have of them is the datastore's to say."""
    descriptor = make_disk(tmp_path / "source", "x.vmdk")
    import_sparse(client, "one/a", descriptor)
    run("cp", "-r", wait_listed(mount, "one/a"), mount.path / "one" / "copied")
    run("cp", "-r", descriptor.parent, mount.path / "one" / "imported")
    run("sync", mount.path / "one" / "imported")
    for name in ("a", "copied", "imported"):
        image, real = mount.path / "one" / name, tmp_path / "one" / f"image_{name}"
        assert disk_usage(image) == sum(allocated(real / file) for file in names(image)) < 3 * MIB
    staged = mount.path / "one" / "staged"
    staged.mkdir()
    run("cp", descriptor.with_name("x-flat.vmdk"), staged)
    run("sync", staged / "x-flat.vmdk")
    assert disk_usage(staged) == 2 * MIB


def test_inode_numbers_are_the_same_for_the_life_of_the_mount(mount: Mount, client: SidecarClient, disk: Path) -> None:
    """Who follows a directory, a backup or `find`, takes one with another number for another one."""
    image = mount.path / "one" / "new"
    image.mkdir()
    inode = image.stat().st_ino
    for path in disk.parent.iterdir():
        run("cp", path, image / ".part")
        file_inode = (image / ".part").stat().st_ino
        run("mv", image / ".part", image / path.name)
        assert (image / path.name).stat().st_ino == file_inode
    assert len({path.stat().st_ino for path in image.iterdir()}) == 2
    run("sync", image)
    assert names(mount.path / "one") == {"new"}
    assert image.stat().st_ino == inode
    files = {name: (image / name).stat().st_ino for name in names(image)}
    run("rm", "-r", image)
    assert (mount.path / "one" / ".deleted" / "new").stat().st_ino == inode
    run("mv", mount.path / "one" / ".deleted" / "new", mount.path / "one")
    client.touch("one/new")
    client.delete("one/new")
    wait_until(lambda: names(mount.path / "one") == set(), "its deletion by another client is seen")
    client.restore("one/new")
    wait_listed(mount, "one/new")
    assert image.stat().st_ino == inode
    assert {name: (image / name).stat().st_ino for name in names(image)} == files


def test_df_shows_the_datastores_capacity(mount: Mount, client: SidecarClient) -> None:
    datastore = client.datastore("one")
    shown = os.statvfs(mount.path / "one")
    assert shown.f_blocks * shown.f_frsize == datastore.capacity_bytes // 4096 * 4096
    assert 0 < shown.f_bavail < shown.f_bfree <= shown.f_blocks
    size, free, target = run("df", "-B1", "--output=size,avail,target", mount.path / "one").stdout.split()[-3:]
    assert (int(size), target) == (datastore.capacity_bytes // 4096 * 4096, str(mount.path))
    assert abs(int(free) - (datastore.free_bytes - datastore.reserve_bytes)) < 1 << 30  # others write there, too


def test_df_of_each_datastore_follows_what_others_write_there(tmp_path: Path, stack: ExitStack) -> None:
    root = stack.enter_context(loop_mount(tmp_path / "small", 64 * MIB, ("mkfs.ext4", "-q")))
    (tmp_path / "large").mkdir()
    datastores = (f"small={root},reserve=0", f"large={tmp_path / 'large'}")
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", *datastores))
    mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))

    def free(path: Path) -> int:
        return int(run("df", "-B1", "--output=avail", path).stdout.split()[1])

    assert free(mount.path / "small") == free(root) < free(mount.path / "large")
    run("fallocate", "--length", str(30 * MIB), root / "other")
    wait_until(lambda: free(mount.path / "small") == free(root), "df follows")


def test_reads_the_same_bytes_by_every_way(mount: Mount, make_image: MakeImage, tmp_path: Path) -> None:
    source = make_image("two/a")
    image = wait_listed(mount, "two/a")
    assert_same_disk(source, image / "a.vmdk")
    assert '"virtual-size": 8388608' in run("qemu-img", "info", "-U", "--output=json", image / "a.vmdk").stdout
    run("cp", "-r", image, tmp_path / "out")
    assert digest(tmp_path / "out" / "a-flat.vmdk") == digest(source.with_name("disk-flat.vmdk"))
    run("cmp", tmp_path / "out" / "a-flat.vmdk", image / "a-flat.vmdk")


# Boot code that says "up" on the serial line and ends the machine, with exit code 1.
BOOT_SECTOR = bytes.fromhex("ba f803 b075 ee b070 ee ba f400 30c0 ee f4").ljust(510, b"\0") + b"\x55\xaa"


def test_a_machine_boots_from_it(mount: Mount, client: SidecarClient, tmp_path: Path) -> None:
    """With what it writes in a file of its own, as a VM has its base image."""
    descriptor = make_disk(tmp_path / "source")
    with descriptor.with_name("disk-flat.vmdk").open("r+b") as file:
        file.write(BOOT_SECTOR)
    import_sparse(client, "one/a", descriptor)
    base, overlay = wait_listed(mount, "one/a") / "a.vmdk", tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "vmdk", "-b", base, overlay)
    machine = ("-accel", "tcg", "-nodefaults", "-display", "none", "-serial", "stdio")
    ended = ("-device", "isa-debug-exit,iobase=0xf4", "-drive", f"file={overlay},format=qcow2,if=virtio")
    booted = run("qemu-system-x86_64", *machine, *ended, check=False)
    assert (booted.returncode, booted.stdout) == (1, "up"), booted.stderr


def test_several_readers_at_once(mount: Mount, make_image: MakeImage) -> None:
    make_image("one/a")
    path = wait_listed(mount, "one/a") / "a-flat.vmdk"
    readers = [subprocess.Popen(["sha256sum", path], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    sums = {reader.communicate(timeout=60)[0] for reader in readers}
    assert sums == {f"{digest(path)}  {path}\n"}


def test_an_open_file_is_a_use_of_its_image(mount: Mount, make_image: MakeImage, client: SidecarClient) -> None:
    make_image("one/a")
    path = wait_listed(mount, "one/a") / "a-flat.vmdk"
    with path.open("rb"):
        assert any("image-mount" in user for user in client.image("one/a").users)
    wait_until(lambda: not client.image("one/a").users, "the file is not in use any more")


def test_lists_ten_thousand_images_without_asking_for_each(
    sidecar: Sidecar, tmp_path: Path, mount: Mount, make_image: MakeImage
) -> None:
    make_image("one/seed")
    wait_listed(mount, "one/seed")
    before = sidecar.log.read_text().count("GetImage")
    for number in range(1000):
        directory = tmp_path / "one" / f"image_bulk{number:05d}"
        directory.mkdir()
        for name in ("seed.vmdk", "image_timestamp.txt"):
            os.link(tmp_path / "one" / "image_seed" / name, directory / name.replace("seed", f"bulk{number:05d}"))
    wait_until(lambda: len(os.listdir(mount.path / "one")) == 1001, "all images are listed", 60)
    listing = run("ls", "-l", mount.path / "one").stdout.splitlines()
    assert len(listing) == 1002
    assert sidecar.log.read_text().count("GetImage") == before


def test_an_image_that_was_purged_and_made_again_shows_no_old_page(
    mount: Mount, make_image: MakeImage, client: SidecarClient, tmp_path: Path
) -> None:
    make_image("one/a")
    path = wait_listed(mount, "one/a") / "a-flat.vmdk"
    first = digest(path)
    client.delete("one/a", force=True)
    import_image(client, "one/a", make_disk(tmp_path / "other", "disk.vmdk", seed=99))
    inode = client.image("one/a").files[0].inode
    real = tmp_path / "one" / "image_a" / "a-flat.vmdk"
    assert real.stat().st_ino == inode or digest(real) != first

    def shows_the_new_one() -> bool:
        try:
            return digest(path) == digest(real)
        except FileNotFoundError:  # between the two there is none
            return False

    wait_until(shows_the_new_one, "the mount shows the new image", 10)
    assert digest(path) != first


def test_what_others_do_is_seen_within_seconds(mount: Mount, make_image: MakeImage, client: SidecarClient) -> None:
    make_image("one/a")
    image = wait_listed(mount, "one/a")
    assert (image / "a.vmdk").exists()
    client.delete("one/a")
    wait_until(lambda: "a" not in os.listdir(mount.path / "one"), "the deleted image is not listed")
    wait_until(lambda: not (image / "a.vmdk").exists(), "its files are not there", 10)
    client.restore("one/a")
    wait_listed(mount, "one/a")
    wait_until((image / "a.vmdk").exists, "its files are there again", 10)


def test_details_of_a_slow_datastore_are_asked_for_once(sidecar: Sidecar, mount: Mount, make_image: MakeImage) -> None:
    make_image("three/a")
    image = wait_listed(mount, "three/a")
    run("ls", "-l", mount.path / "three")
    for _ in range(3):
        assert names(image) == {"a.vmdk", "a-flat.vmdk"}
    assert sidecar.log.read_text().count("method=GetImage ref=three/a") <= 2
