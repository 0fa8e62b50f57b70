"""Names that go without the kernel's doing: it would take them for directories for as long as it remembers them."""

import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusefs.kernel import KernelMemory, node_number
from sidecar.client import SidecarClient
from tests.mount.harness import is_name, log_of, names, wait_listed
from tests.support.disks import MIB, assert_same_disk, import_image, make_disk
from tests.support.processes import Mount, Sidecar, background, run, wait_until

_COPIER = """
import os, sys, time
os.mkdir(sys.argv[1])
file = open(sys.argv[1] + "/a-flat.vmdk", "wb", buffering=0)
file.write(b"x" * 4096)
time.sleep(60)
"""


@pytest.fixture
def lasting(sidecar: Sidecar, client: SidecarClient, tmp_path: Path) -> Iterator[Mount]:
    """A mount of which the kernel forgets no name by itself, with an image."""
    import_image(client, "one/a", make_disk(tmp_path / "source", size=32 * MIB, data=((0, 32 * MIB),)))
    with Mount(tmp_path / "lasting", sidecar.address, options="entry_timeout=3600") as mount:
        wait_listed(mount, "one/a")
        yield mount


def test_an_image_that_another_client_deleted_is_no_name_any_more(lasting: Mount, client: SidecarClient) -> None:
    image = lasting.path / "one" / "a"
    assert is_name(image / "a.vmdk")
    client.delete("one/a")
    wait_until(lambda: not is_name(image), f"the name is gone:\n{log_of(lasting)}")
    client.restore("one/a")
    wait_listed(lasting, "one/a")
    assert is_name(lasting.path / "one" / ".deleted") and is_name(image / "a.vmdk")


def test_an_image_that_another_client_purged_is_no_name_among_the_deleted(
    lasting: Mount, client: SidecarClient
) -> None:
    deleted = lasting.path / "one" / ".deleted" / "a"
    client.delete("one/a")
    wait_until(lambda: is_name(deleted), "it is among the deleted")
    client.purge("one/a")
    wait_until(lambda: not is_name(deleted), f"the name is gone:\n{log_of(lasting)}")


def test_a_copy_that_was_killed_can_be_repeated_as_soon_as_it_is_dropped(lasting: Mount) -> None:
    source, target = lasting.path / "one" / "a", lasting.path / "two" / "b"
    with background(sys.executable, "-c", _COPIER, target) as copier:
        wait_until((target / "a-flat.vmdk").exists, "it is being written")
        copier.kill()
    wait_until(lambda: not is_name(target), f"the name is gone:\n{log_of(lasting)}")
    run("cp", "-r", source, target)
    assert_same_disk(source / "a.vmdk", wait_listed(lasting, "two/b") / "b.vmdk")
    assert names(lasting.path / "two") == {"b"}


def test_what_is_no_mount_has_no_number(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        node_number(str(tmp_path))
    assert caught.value.errno == errno.ENOTCONN


def test_nobody_waits_for_the_kernel_to_be_told_after_the_end(tmp_path: Path) -> None:
    kernel, told = KernelMemory(str(tmp_path)), list[str]()
    kernel.start(lambda path: True)
    kernel.replaced("/one/a", [], lambda: told.append("before"))
    kernel.stop()
    kernel.replaced("/one/a", [], lambda: told.append("after"))
    assert told == ["before", "after"]
