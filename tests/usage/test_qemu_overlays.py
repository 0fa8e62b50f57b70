"""VMs of QEMU: overlays in its own formats, made by qemu-img, on images of ours."""

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.images.disk_parents import names_in
from tests.support.processes import background, run, wait_until
from tests.usage.conftest import Host

FORMATS = {"qcow2": (), "qcow2 of version 2": ("-o", "compat=0.10"), "qcow": (), "qed": (), "vmdk": ()}


def overlay(path: Path, backing: Path | str, backing_format: str = "vmdk", kind: str = "qcow2", *options: str) -> Path:
    made = ("-f", kind, "-u", *options, "-b", str(backing), "-F", backing_format)
    run("qemu-img", "create", "-q", *made, path, "2M")
    return path


def vmdk_overlay(path: Path, backing: Path | str) -> Path:
    run("qemu-img", "create", "-q", "-f", "vmdk", "-b", backing, "-F", "vmdk", path)
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_an_image_under_an_overlay_is_in_use(host: Host, kind: str, absolute: bool) -> None:
    vm, image = host.vm("web"), host.places["one"].descriptor("a")
    backing = str(image) if absolute else "../image_a/a.vmdk"
    disk = vm / "disk.img"
    if kind == "vmdk":
        vmdk_overlay(disk, backing if absolute else image)
    else:
        overlay(disk, backing, "vmdk", kind.split(maxsplit=1)[0], *FORMATS[kind])
    assert host.uses(vm) == {"one/a": [f"VM web (disk {disk})"]}


def test_a_chain_of_several_formats_ends_at_the_image(host: Host, tmp_path: Path) -> None:
    vm = host.vm("1")
    base = vmdk_overlay(vm / "base.vmdk", host.places["two"].descriptor("a"))
    middle = overlay(tmp_path / "middle.qcow2", base)
    top = overlay(vm / "top.qcow2", middle, "qcow2")
    assert host.uses(vm)["two/a"][0] == f"VM 1 (disk {base})"
    # QEMU finds the same names.
    told = json.loads(run("qemu-img", "info", "-U", "--backing-chain", "--output=json", top).stdout)
    assert [link.get("backing-filename") for link in told[:2]] == [str(middle), str(base)]


@contextmanager
def block_device(content: Path) -> Iterator[Path]:
    """A block device with that in it, as a logical volume would have it."""
    device = run("losetup", "--find", "--show", content).stdout.strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


@pytest.mark.parametrize("name", ["{device}", "host_device:{device}"])
def test_an_overlay_on_a_block_device_keeps_its_image(host: Host, tmp_path: Path, name: str) -> None:
    """As the disks of VMs on LVM are, and those that others are made on."""
    vm, clone = host.vm("1"), host.vm("2")
    with block_device(overlay(tmp_path / "volume", host.places["two"].descriptor("a"))) as device:
        disk = vm / "disk.qcow2"
        disk.symlink_to(device)
        assert host.uses(vm) == {"two/a": [f"VM 1 (disk {disk})"]}
        top = overlay(clone / "top.qcow2", name.format(device=device), "qcow2")
        assert host.uses(clone) == {"two/a": [f"VM 2 (disk {top})"]}
        disk.unlink()
        (vm / "1.vmx").write_text(f'scsi0:0.fileName = "{device}"\n')
        assert host.used(vm) == {"two/a"}


def test_a_block_device_with_a_guests_bytes_is_a_disk_of_its_own(host: Host, tmp_path: Path) -> None:
    vm = host.vm("1")
    (tmp_path / "volume").write_bytes(b"\xeb\x3c\x90" * 8192)
    with block_device(tmp_path / "volume") as device:
        (vm / "disk.raw").symlink_to(device)
        (vm / "console").symlink_to("/dev/tty")
        assert host.used(vm) == set()


@pytest.mark.parametrize(
    "backing",
    [
        "file:{image}",
        'json:{{"driver":"vmdk","file":{{"driver":"file","filename":"{image}"}}}}',
        'json:{{"driver":"vmdk","file.driver":"file","file.filename":"{image}"}}',
        'json:{{"driver":"raw","file":{{"driver":"raw","file":{{"driver":"file","filename":"{extent}"}}}}}}',
    ],
)
def test_an_image_is_recognised_however_qemu_is_told_of_it(host: Host, backing: str) -> None:
    vm, place = host.vm("1"), host.places["one"]
    name = backing.format(image=place.descriptor("a"), extent=place.file("a", "a-flat.vmdk"))
    overlay(vm / "disk.qcow2", name)
    assert host.used(vm) == {"one/a"}


def test_the_data_file_of_an_overlay_is_a_use_too(host: Host) -> None:
    vm = host.vm("1")
    (vm / "data.raw").touch()
    disk = vm / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={vm}/data.raw", disk, "2M")
    assert host.used(vm) == set()
    (vm / "data.raw").unlink()
    (vm / "data.raw").symlink_to(host.places["one"].file("a", "a-flat.vmdk"))
    assert host.used(vm) == {"one/a"}


def test_an_image_that_is_gone_is_still_named_by_its_overlay(host: Host) -> None:
    vm = host.vm("1")
    overlay(vm / "disk.qcow2", host.places["one"].descriptor("gone"))
    assert host.used(vm) == {"one/gone"}


def test_a_server_that_an_overlay_names_is_never_called(host: Host) -> None:
    vm = host.vm("1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        overlay(vm / "disk.qcow2", f"nbd://127.0.0.1:{server.getsockname()[1]}/a", "raw")
        assert host.used(vm) == set()
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("backing", ["/not/there.qcow2", 'json:{"driver":'])
def test_a_backing_file_that_cannot_be_found_is_not_taken_for_none(host: Host, backing: str) -> None:
    vm = host.vm("1")
    disk = overlay(vm / "disk.qcow2", "x" * len(backing), "qcow2")
    disk.write_bytes(disk.read_bytes().replace(b"x" * len(backing), backing.encode()))
    with pytest.raises(errors.UseUnknown, match=f"VM 1: {disk}: "):
        host.uses(vm)


@pytest.mark.parametrize("length", [1, 3, 4, 19, 20, 64, 100, 103, 104, 300])
@pytest.mark.parametrize("kind", ["qcow2", "qed", "vmdk"])
def test_a_torn_overlay_is_never_one_without_an_image(host: Host, kind: str, length: int) -> None:
    vm = host.vm("1")
    name = f"disk.{kind}"
    if kind == "vmdk":
        vmdk_overlay(vm / name, host.places["one"].descriptor("a"))
    else:
        overlay(vm / name, host.places["one"].descriptor("a"), "vmdk", kind)
    with (vm / name).open("r+b") as file:
        file.truncate(length)
    try:
        assert host.used(vm) == {"one/a"}  # what is left has the whole name
    except errors.UseUnknown as error:
        assert str(vm / name) in error.message


def test_a_loop_of_overlays_ends(host: Host) -> None:
    vm = host.vm("1")
    overlay(vm / "a.qcow2", vm / "b.qcow2", "qcow2")
    overlay(vm / "b.qcow2", vm / "a.qcow2", "qcow2")
    with pytest.raises(errors.UseUnknown, match="comes back"):
        host.uses(vm)


@pytest.mark.parametrize("program", ["qemu-system-x86_64", "qemu-nbd"])
def test_an_overlay_that_a_running_vm_holds_can_be_asked(host: Host, program: str) -> None:
    vm = host.vm("1")
    disk = overlay(vm / "disk.qcow2", host.places["one"].descriptor("a"))
    with tempfile.TemporaryDirectory() as name:
        pid_file = Path(name) / "pid"
        started: list[str | Path]
        if program == "qemu-nbd":
            started = ["-f", "qcow2", "--persistent", "--socket", f"{name}/s", "--pid-file", pid_file, disk]
        else:
            started = ["-S", "-nographic", "-nodefaults", "-accel", "tcg", "-pidfile", pid_file]
            started += ["-drive", f"file={disk},format=qcow2,if=virtio"]
        with background(program, *started):
            wait_until(pid_file.exists, f"{program} has opened the disk")
            assert host.uses(vm) == {"one/a": [f"VM 1 (disk {disk})"]}


def test_whatever_is_in_a_header_is_an_answer_or_a_fault(tmp_path: Path) -> None:
    """No other error, and no endless work, by headers that somebody made up."""
    made = [overlay(tmp_path / f"x.{kind}", "/base.vmdk", "vmdk", kind) for kind in ("qcow2", "qed")]
    for path in made:
        content = path.read_bytes()[:4096]
        for position in range(4, 128):
            for value in (0, 1, 0x7F, 0xFF):
                damaged = bytearray(content)
                damaged[position] = value
                damaged[position + 1 : position + 4] = bytes([value]) * 3
                try:
                    names_in("x.qcow2", len(damaged), lambda at, length, data=damaged: bytes(data[at : at + length]))  # type: ignore[misc]
                except errors.InvalidDisk:
                    continue


@pytest.mark.parametrize("name", ["\\u0000", "\\ud800", "x" * 400])
def test_a_json_name_that_no_file_can_have_is_a_fault_of_the_vm(host: Host, name: str) -> None:
    vm = host.vm("1")
    backing = f'json:{{"driver":"file","filename":"{name}"}}'
    disk = overlay(vm / "disk.qcow2", "x" * len(backing))
    disk.write_bytes(disk.read_bytes().replace(b"x" * len(backing), backing.encode()))
    with pytest.raises(errors.UseUnknown, match="VM 1: "):
        host.uses(vm)
