"""VMs whose disks are linked clones of images: every one of their disks keeps its image, however it names it."""

import contextlib
import errno
import os
import socket
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.datastores.posix import PosixDatastore
from sidecar.images import usage_paths, vm_disks
from sidecar.images.layouts import LAYOUTS
from sidecar.images.store import ImageStore
from sidecar.images.usage import uses_of_image, uses_of_vm
from tests.support.places import Place, write_flat_disk
from tests.support.processes import run
from tests.usage.conftest import Host, delta

DATASTORES = ("one", "two", "three")


def write(directory: Path, hint: str, name: str = "disk.vmdk") -> Path:
    stem = name.removesuffix(".vmdk")
    (directory / f"{stem}-delta.vmdk").write_bytes(b"COWD" + bytes(508))
    path = directory / name
    path.write_text(delta(hint, extent=f"{stem}-delta.vmdk"))
    return path


@pytest.mark.parametrize("datastore", DATASTORES)
@pytest.mark.parametrize("image_of", DATASTORES)
def test_an_image_that_a_clone_names_is_in_use_on_every_datastore(host: Host, datastore: str, image_of: str) -> None:
    vm = host.vm("web", datastore)
    disk = write(vm, str(host.places[image_of].descriptor("a")))
    assert host.uses(vm, datastore) == {f"{image_of}/a": [f"VM web (disk {disk})"]}


def test_an_image_of_the_second_disk_only_is_not_swept(host: Host) -> None:
    vm = host.vm("1")
    write_flat_disk(vm, "a-first-disk")
    write(vm, "../image_a/a.vmdk", "second.vmdk")
    host.places["two"].plant("b")
    write(vm, str(host.places["two"].descriptor("b")), "third.vmdk")
    assert host.used(vm) == {"one/a", "two/b"}


def test_the_vm_is_called_what_people_call_it(host: Host) -> None:
    vm = host.vm("5f2c")
    disk = write(vm, "../image_a/a.vmdk")
    (vm / "web.vmx").write_text('displayName = "web |22prod|22"\nscsi0:0.fileName = "disk.vmdk"\n')
    assert host.uses(vm) == {"one/a": [f'VM web "prod" (disk {disk})']}


@pytest.mark.parametrize(
    "hint",
    [
        "/vmfs/volumes/one/image_a/a.vmdk",
        "/vmfs/volumes/one/./image_a//a.vmdk",
        "/vmfs/volumes/two/../one/image_a/a.vmdk",
        "[one] image_a/a.vmdk",
        "../image_a/a.vmdk",
        "..|2fimage_a|2Fa.vmdk",
    ],
)
def test_a_name_that_only_esx_understands_is_a_use_too(host: Host, hint: str) -> None:
    vm = host.vm("1")
    write(vm, hint)
    assert host.used(vm) == {"one/a"}


def test_a_volume_that_is_not_known_may_be_any_datastore(host: Host) -> None:
    vm = host.vm("1")
    write(vm, "/vmfs/volumes/5f0c2ad4-9d3c02f2-3b1a-0025b5aa0001/image_a/a.vmdk")
    assert host.used(vm) == {"one/a", "three/a"}  # not of `two`: its images are elsewhere


@pytest.mark.parametrize(
    "line",
    [
        'parentFileNameHint = "{}"',
        "parentFileNameHint={}",
        '# parentFileNameHint="{}"',
        'PARENTFILENAMEHINT="{}"\r',
    ],
)
def test_a_hint_is_found_wherever_a_program_would_find_it(host: Host, line: str) -> None:
    vm = host.vm("1")
    path = write(vm, "x")
    path.write_text(path.read_text().replace('parentFileNameHint="x"', line.format("../image_a/a.vmdk")))
    assert host.used(vm) == {"one/a"}


def test_a_name_with_a_quotation_mark_is_unescaped(host: Host) -> None:
    vm, other = host.vm("1"), host.vm('old "web" | ä')
    write(other, "../image_a/a.vmdk", 'base "1".vmdk')
    write(vm, "../vm_old |22web|22 |7C ä/base |221|22.vmdk")
    assert host.used(vm) == {"one/a"}


def test_chains_end_at_an_image_through_deltas_of_this_vm_and_of_another(host: Host) -> None:
    vm, other = host.vm("1"), host.vm("other", "two")
    write(vm, "disk-000001.vmdk", "disk-000002.vmdk")
    write(vm, str(other / "template.vmdk"), "disk-000001.vmdk")
    write(other, str(host.places["three"].descriptor("a")), "template.vmdk")
    assert host.used(vm) == {"three/a"}


def test_a_chain_through_a_directory_that_is_no_datastore_is_followed(host: Host, tmp_path: Path) -> None:
    vm, elsewhere = host.vm("1"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(vm, str(write(elsewhere, str(host.places["one"].descriptor("a")))))
    assert host.used(vm) == {"one/a"}


def test_a_disk_on_its_own_or_outside_every_datastore_uses_no_image(host: Host, tmp_path: Path) -> None:
    vm, elsewhere = host.vm("1"), tmp_path / "elsewhere"
    write_flat_disk(vm, "own")
    write_flat_disk(elsewhere, "base")
    write(vm, str(elsewhere / "base.vmdk"))
    assert host.used(vm) == set()


def test_an_image_that_is_gone_is_still_the_one_that_is_used(host: Host) -> None:
    vm = host.vm("1")
    write(vm, "../image_gone/gone.vmdk")
    assert host.used(vm) == {"one/gone"}


def test_a_link_anywhere_in_the_path_hides_no_image(host: Host, tmp_path: Path) -> None:
    vm, root = host.vm("1"), host.places["one"].root
    (tmp_path / "alias").symlink_to(root)
    (tmp_path / "file.vmdk").symlink_to(tmp_path / "alias" / "image_a" / "a.vmdk")
    write(vm, str(tmp_path / "file.vmdk"), "absolute.vmdk")
    (vm / "here.vmdk").symlink_to("../image_gone/gone.vmdk")
    host.places["two"].plant("linked")
    (vm / "images").symlink_to(host.places["two"].directory("linked"))
    assert host.used(vm) == {"one/a", "one/gone", "two/linked"}


def test_a_vm_behind_a_link_is_looked_at(host: Host, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "vm"
    elsewhere.mkdir(parents=True)
    write(elsewhere, str(host.places["one"].descriptor("a")))
    vm = host.places["one"].root / "vm_1"
    vm.symlink_to(elsewhere)
    # Relative to where the VM is known: that is what a program which opens it there goes by.
    write(elsewhere, "../image_b/b.vmdk", "relative.vmdk")
    assert host.used(vm) == {"one/a", "one/b"}


@pytest.mark.parametrize("what", [".", "image_a"], ids=["the datastore", "the image"])
def test_a_bind_mount_hides_no_image(host: Host, tmp_path: Path, what: str) -> None:
    vm, bound = host.vm("1"), tmp_path / "bound here"
    bound.mkdir()
    run("mount", "--bind", host.places["one"].root / what, bound)
    try:
        write(vm, str(bound / ("image_a" if what == "." else "") / "a.vmdk"))
        assert host.used(vm) == {"one/a"}
    finally:
        run("umount", bound)


@pytest.mark.parametrize("how", ["nested", "the same", "bound into"])
def test_a_datastore_in_another_one_hides_none_of_its_images(host: Host, how: str) -> None:
    """Of two datastores to which a path leads, the one that was found first had no such image."""
    vm, one = host.vm("1"), host.places["one"]
    inner = Place("inner", "compound", one.root / "inner")
    inner.root.mkdir()
    with ExitStack() as stack:
        if how == "nested":
            inner.plant("a")
        else:
            source = host.places["three"] if how == "bound into" else one
            run("mount", "--bind", source.root, inner.root)
            stack.callback(run, "umount", inner.root)
        if how != "bound into":
            datastore = stack.enter_context(closing(PosixDatastore("inner", str(inner.root))))
            host.stores["inner"] = ImageStore(datastore, LAYOUTS["compound"])
            stack.callback(host.stores.pop, "inner")
        write(vm, str(inner.descriptor("a")))
        expected = {"nested": {"inner/a"}, "the same": {"one/a", "inner/a"}, "bound into": {"three/a"}}
        assert host.used(vm) == expected[how]


def test_a_disk_that_only_the_configuration_names_is_a_use(host: Host) -> None:
    vm, other = host.vm("1"), host.vm("data", "two")
    write(other, str(host.places["two"].descriptor("a")))
    (vm / "1.vmx").write_text(
        f'scsi0:0.fileName = "{other}/disk.vmdk"\nide1:0.fileName = "/usr/lib/vmware/isoimages/linux.iso"\n'
        'scsi0:1.present = "FALSE"\nscsi0:1.fileName = "/vmfs/volumes/one/image_a/a.vmdk"\n'
        'ide1:1.fileName = "auto detect"\nfloppy0.fileName = "/dev/fd0"\n'
    )
    (vm / "1.vmsd").write_text('snapshot0.disk0.fileName = "/vmfs/volumes/three/image_a/a.vmdk"\n')
    assert host.used(vm) == {"one/a", "two/a", "three/a"}


def test_an_extent_in_an_image_s_directory_is_a_use(host: Host) -> None:
    vm = host.vm("1")
    extent = host.places["one"].file("a", "a-flat.vmdk")
    (vm / "disk.vmdk").write_text(
        f'# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW 4096 FLAT "{extent}" 0\n'
    )
    assert host.used(vm) == {"one/a"}


def test_what_a_guest_writes_on_its_disk_does_not_end_the_search(host: Host) -> None:
    vm = host.vm("1")
    write_flat_disk(vm, "disk")
    for hostile in (b"QFI\xfb" + b"\xff" * 508, b"KDMV" + b"\xff" * 508, delta("/nowhere/x.vmdk").encode()):
        (vm / "disk-flat.vmdk").write_bytes(hostile + bytes(2 << 20))
        assert host.used(vm) == set()


def test_a_descriptor_of_a_gigabyte_is_refused_without_being_read(host: Host) -> None:
    vm = host.vm("1")
    path = write(vm, "../image_a/a.vmdk")
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(errors.UseUnknown, match=rf"VM 1: {path}: a VMDK descriptor of {1 << 30} bytes"):
        host.uses(vm)


def faults(vm: Path) -> dict[str, tuple[Path, str]]:
    """What makes a VM one whose images are not known, and what is said of it."""
    made = {
        "parent missing": (write(vm, "not-there.vmdk", "1.vmdk"), "not there"),
        "parent not named": (write(vm, "", "2.vmdk"), "parentCID"),
        "empty": (vm / "3.vmdk", "no VMDK descriptor"),
        "dangling": (vm / "4.vmdk", "link"),
        "dangling directory": (vm / "disks", "link"),
        "no qcow2": (vm / "5.qcow2", "header"),
        "itself": (write(vm, "6.vmdk", "6.vmdk"), "comes back"),
        "a link to itself": (vm / "7.vmdk", "Too many levels"),
    }
    (vm / "3.vmdk").touch()
    (vm / "4.vmdk").symlink_to("/not/there")
    (vm / "disks").symlink_to("/not/mounted/disks")
    (vm / "5.qcow2").write_bytes(bytes(512))
    (vm / "7.vmdk").symlink_to("7.vmdk")
    return made


@pytest.mark.parametrize(
    "fault",
    [
        "parent missing",
        "parent not named",
        "empty",
        "dangling",
        "dangling directory",
        "no qcow2",
        "itself",
        "a link to itself",
    ],
)
def test_a_vm_that_cannot_be_understood_is_never_one_without_images(host: Host, tmp_path: Path, fault: str) -> None:
    (tmp_path / "vm").mkdir()
    path, said = faults(tmp_path / "vm")[fault]
    vm = host.vm("1")
    path.rename(vm / path.name)
    with pytest.raises(errors.UseUnknown) as raised:
        host.uses(vm)
    assert f"VM 1: {vm / path.name}: " in raised.value.message
    assert said in raised.value.message
    assert "remove the VM" in raised.value.message


def test_a_chain_that_comes_back_ends(host: Host) -> None:
    vm, other = host.vm("1"), host.vm("2")
    write(vm, "../vm_2/b.vmdk", "a.vmdk")
    write(other, "c.vmdk", "b.vmdk")
    write(other, "../vm_1/a.vmdk", "c.vmdk")
    with pytest.raises(errors.UseUnknown, match="comes back"):
        host.uses(vm)


def test_a_chain_without_end_ends(host: Host) -> None:
    vm = host.vm("1")
    for number in range(300):
        write(vm, f"{number + 1:03d}.vmdk", f"{number:03d}.vmdk")
    write(vm, "../image_a/a.vmdk", "300.vmdk")
    with pytest.raises(errors.UseUnknown, match="longer than 256"):
        host.uses(vm)


def test_a_vm_that_was_removed_meanwhile_uses_nothing_and_is_no_fault(host: Host) -> None:
    for name, directory in (("one", "vm_gone"), ("two", "vms/go/gone"), ("three", "vm_gone")):
        assert uses_of_vm(list(host.stores.values()), host.stores[name], directory) == {}


def test_a_datastore_that_another_one_is_mounted_over_is_not_one_of_empty_vms(host: Host) -> None:
    vm, root = host.vm("1"), host.places["one"].root
    write(vm, "../image_a/a.vmdk")
    assert host.used(vm) == {"one/a"}  # its root is open from here on
    run("mount", "-t", "tmpfs", "none", root)
    try:
        with pytest.raises(errors.UseUnknown, match="another file system is mounted there"):
            host.uses(vm)
        with pytest.raises(errors.DatastoreUnavailable):
            uses_of_image(list(host.stores.values()), host.key("one/a"))
    finally:
        run("umount", root)


def test_sockets_pipes_and_logs_of_a_running_vm_are_no_disks(host: Host) -> None:
    vm = host.vm("1")
    os.mkfifo(vm / "console")
    with contextlib.chdir(vm), socket.socket(socket.AF_UNIX) as server:  # a socket's path has at most 107 bytes
        server.bind("qmp")
        (vm / "vmware.log").write_text('parentFileNameHint="../image_a/a.vmdk"\n')
        (vm / ".lck-1").symlink_to("host:123")
        assert host.used(vm) == set()


def test_a_file_that_cannot_be_read_is_an_outage_and_says_which(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = host.vm("1")
    write(vm, "../image_a/a.vmdk")
    for number, kind in ((errno.EIO, errors.DatastoreUnavailable), (errno.EACCES, errors.DatastoreDenied)):

        def fail(fd: int, length: int, offset: int, number: int = number) -> bytes:
            raise OSError(number, os.strerror(number))

        with (
            monkeypatch.context() as patched,
            pytest.raises(kind, match=f"VM 1: {vm}/disk.*: cannot be read") as raised,
        ):
            patched.setattr(os, "pread", fail)
            host.uses(vm)
        assert "try again" in raised.value.message


def test_a_datastore_that_is_away_is_not_one_without_vms(host: Host) -> None:
    vm = host.vm("1")
    write(vm, "../image_a/a.vmdk")
    root = host.places["two"].root
    root.rename(root.with_name("away"))
    with pytest.raises(errors.DatastoreUnavailable):
        uses_of_image(list(host.stores.values()), host.key("one/a"))
    with pytest.raises(errors.DatastoreUnavailable, match="none can be purged"):
        host.uses(vm)


def test_a_vm_of_too_many_files_is_not_read_without_end(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = host.vm("1")
    monkeypatch.setattr(vm_disks, "_MOST_FILES", 10)
    for number in range(12):
        (vm / f"{number}.log").touch()
    with pytest.raises(errors.UseUnknown, match="more than 10 files"):
        host.uses(vm)


def test_disks_in_a_directory_below_that_of_the_vm_are_seen(host: Host) -> None:
    vm = host.vm("1")
    (vm / "snapshots" / "old").mkdir(parents=True)
    (vm / "snapshots" / "back").symlink_to(vm)
    write(vm / "snapshots" / "old", "../../../image_a/a.vmdk")
    assert host.used(vm) == {"one/a"}


def test_a_vm_that_is_one_file_is_looked_at(host: Host) -> None:
    directory = host.places["two"].root / "vms" / "we"
    directory.mkdir(parents=True)
    (host.places["two"].root / "vms" / "README").touch()
    write(directory, str(host.places["one"].descriptor("a")), "web.vmdk")
    assert host.used(directory / "web.vmdk", "two") == {"one/a"}


def test_a_volume_of_esx_that_is_a_link_on_this_host_is_resolved(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, volumes = host.vm("1"), tmp_path / "vmfs" / "volumes"
    volumes.mkdir(parents=True)
    (volumes / "datastore 1").symlink_to("5f0c2ad4-9d3c02f2")
    (volumes / "5f0c2ad4-9d3c02f2").symlink_to(host.places["three"].root)
    monkeypatch.setattr(usage_paths, "VOLUMES", str(volumes))
    write(vm, f"{volumes}/datastore 1/image_a/a.vmdk")
    write(vm, "[datastore 1] image_b/b.vmdk", "second.vmdk")
    assert host.used(vm) == {"three/a", "three/b"}


@pytest.mark.parametrize(
    "hint", [b"a\0b.vmdk", b"\xff\xfe.vmdk", b"x" * 300 + b".vmdk", b"x/" * 3000 + b"y.vmdk", b"|00"]
)
def test_a_name_that_no_file_can_have_is_a_fault_of_the_vm(host: Host, hint: bytes) -> None:
    vm = host.vm("1")
    path = write(vm, "HINT")
    path.write_bytes(path.read_bytes().replace(b"HINT", hint))
    with pytest.raises(errors.UseUnknown, match="VM 1: ") as raised:
        host.uses(vm)
    assert raised.value.message.isprintable()
    raised.value.message.encode()
