"""Datastores that their server says are VSAN."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pyVmomi import vim

from sidecar.vsphere import properties
from tests.support.disks import assert_same_disk
from tests.support.places import MIB, TIMESTAMP, flat_files
from tests.support.processes import BIN, run, wait_until
from tests.vsphere.conftest import Served

Serve = Callable[..., Served]


def tasks(served: Served) -> list[str]:
    """What the server was asked for lately, the last one last."""

    def read(content: vim.ServiceInstanceContent) -> list[str]:
        assert content.taskManager is not None
        recent = properties.read(content, content.taskManager, ["recentTask"]).get("recentTask", [])
        return [properties.read(content, task, ["info.descriptionId"])["info.descriptionId"] for task in recent]

    return served.site.connection().call("read the tasks", read)


@pytest.mark.parametrize("path", [True, False], ids=["path", "alone"])
def test_the_layout_follows_what_the_server_says_unless_it_is_told(serve: Serve, tmp_path: Path, path: bool) -> None:
    served = serve(path=path, layout="", types={"one": "vsan", "two": "VMFS"})
    served.import_image("one/a", tmp_path)
    served.imagectl("cp", "one/a", "two/b")
    said = run(BIN / "imagectl", "--sidecar", served.sidecar.address, "--output", "json", "datastores").stdout
    assert '"layout": "vsan"' in said and '"layout": "compound"' in said
    served.places["one"].assert_holds({"a": flat_files("a", "a.ecv")})
    wait_until((served.places["two"].root / "deleted_images").is_dir, "two is compound")
    assert not (served.places["one"].root / "deleted_images").exists()


@pytest.mark.parametrize("path", [True, False], ids=["path", "alone"])
def test_the_details_of_an_image_that_was_made_here_are_listed_though_they_are_slow_to_read(
    serve: Serve, tmp_path: Path, path: bool
) -> None:
    served = serve(path=path, layout="vsan", types={"one": "vsan", "two": "vsan"})
    served.import_image("one/a", tmp_path)
    served.imagectl("cp", "one/a", "two/b")
    for image in served.client.images():
        assert image.details_known
        assert (image.capacity_bytes, image.disk_type) == (8 * MIB, "monolithicFlat")


def test_publishing_has_the_server_move_the_disk(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False, layout="vsan", types={"one": "vsan", "two": "vsan"})
    source = served.import_image("one/a", tmp_path)
    served.imagectl("cp", "one/a", "two/b")
    assert tasks(served).count("VirtualDiskManager.moveVirtualDisk") == 2
    assert_same_disk(source, served.places["two"].descriptor("b"))
    served.places["two"].assert_holds({"b": flat_files("b", "b.ecv")})
    served.assert_tidy()


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized", "twoGbMaxExtentFlat"])
def test_a_disk_that_the_server_moves_in_part_is_published_whole(serve: Serve, tmp_path: Path, subformat: str) -> None:
    """It misses the data where it has it itself, and says that the disk is not there."""
    served = serve(path=False, layout="vsan", types={"one": "vsan"})
    source = served.import_image("one/a", tmp_path, subformat=subformat)
    assert_same_disk(source, served.places["one"].descriptor("a"))
    served.imagectl("validate", "one/a")
    served.assert_tidy()


@pytest.mark.parametrize("path", [True, False], ids=["path", "alone"])
def test_a_purge_has_the_server_remove_the_disk_which_it_may_then(serve: Serve, tmp_path: Path, path: bool) -> None:
    served = serve(path=path, layout="vsan", types={"one": "vsan", "two": "vsan"})
    served.import_image("one/a", tmp_path)
    descriptor = served.places["one"].descriptor("a")
    text = descriptor.read_text()
    descriptor.write_text(text + 'ddb.deletable = "false"\n')
    served.imagectl("rm", "one/a")
    served.imagectl("purge", "one/a")
    assert "VirtualDiskManager.deleteVirtualDisk" in tasks(served)
    served.assert_tidy()
    served.places["one"].assert_holds({})


def test_a_disk_whose_data_is_lost_can_be_purged(serve: Serve, tmp_path: Path) -> None:
    served = serve(path=False, layout="vsan")
    served.import_image("one/a", tmp_path)
    served.places["one"].file("a", "a-flat.vmdk").unlink()
    served.places["one"].file("a", TIMESTAMP).unlink()
    served.imagectl("rm", "--force", "one/a")
    served.places["one"].assert_holds({})


@pytest.mark.parametrize("path", [True, False], ids=["path", "alone"])
def test_a_datastore_whose_layout_the_server_has_to_tell_is_not_empty_while_it_is_away(
    serve: Serve, path: bool
) -> None:
    served = serve(path=path, layout="", types={"one": "vsan"})
    served.sidecar.stop()
    served.site.simulator.kill()
    served.sidecar.start()

    def seen() -> tuple[bool, str]:
        (one,) = (each for each in served.client.datastores() if each.name == "one")
        return one.accessible, one.fault

    wait_until(lambda: not seen()[0] and "server sim: cannot log in" in seen()[1], "it says why")
    log = served.sidecar.log.read_text
    served.places["one"].plant("a")
    served.site.simulator.start()
    wait_until(lambda: seen()[0], "it is there again", 30)
    wait_until(lambda: [image.ref.image_id for image in served.client.images("one")] == ["a"], "it is listed", 30)
    # Where the path is there, only what the server has to tell is missing: told once, however often it was looked.
    assert log().count("datastore unreadable datastore=one") == int(path)
