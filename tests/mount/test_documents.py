"""`.image.json`, `.datastore.json` and extended attributes: what is known, for people and scripts in the mount."""

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sidecar.client import SidecarClient
from tests.mount.harness import hanging, import_sparse, message_of, names, wait_listed
from tests.support.disks import make_disk
from tests.support.processes import Mount, Sidecar, run, wait_until


@pytest.fixture
def image(client: SidecarClient, mount: Mount, tmp_path: Path) -> Path:
    import_sparse(client, "one/a", make_disk(tmp_path / "source"), companions={"disk.ecv": b'{"k": "\xc3\xa4"}'})
    return wait_listed(mount, "one/a")


def document(path: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(run("cat", path).stdout)
    return parsed


def test_an_image_tells_its_state_sizes_use_and_metadata(image: Path) -> None:
    with (image / "a-flat.vmdk").open("rb"):
        known = document(image / ".image.json")
    assert known["image"] == "one/a"
    assert known["state"] == "VALID"
    assert known["capacity_bytes"] == 8 << 20
    assert known["touch_time"].endswith("Z")
    assert known["metadata"] == {"k": "ä"}
    assert {file["name"] for file in known["files"]} == {"a.vmdk", "a-flat.vmdk", "a.ecv"}
    assert any("image-mount" in user for user in known["users"])
    assert document(image / ".image.json")["users"] == []


def test_no_listing_and_no_copy_has_the_document(image: Path, tmp_path: Path) -> None:
    assert (image / ".image.json").exists()
    assert ".image.json" not in os.listdir(image)
    run("cp", "-r", image, tmp_path / "out")
    run("cp", "-r", image, image.with_name("b"))
    assert not (tmp_path / "out" / ".image.json").exists()
    assert names(image.with_name("b")) == {"b.vmdk", "b-flat.vmdk", "b.ecv"}
    run("cp", image / ".image.json", tmp_path / "document")
    assert json.loads((tmp_path / "document").read_text())["image"] == "one/a"


def test_the_document_is_nobodys_to_change(image: Path) -> None:
    path = image / ".image.json"
    assert message_of("sh", "-c", 'echo x >"$0"', path) == "Read-only file system"
    assert message_of("rm", path) == "Operation not permitted"
    assert message_of("mv", path, image / "b.json") == "Operation not permitted"
    assert document(path)["state"] == "VALID"


def test_a_staged_image_says_why_it_is_not_published(mount: Mount, tmp_path: Path) -> None:
    staged = mount.path / "one" / "new"
    staged.mkdir()
    assert document(staged / ".image.json")["state"] == "STAGED"
    with (staged / "new.vmdk").open("wb") as file:
        assert document(staged / ".image.json")["reason"] == "files open for writing: 1"
        file.write(b"no descriptor")
    assert run("sync", staged, check=False).returncode != 0
    known = document(staged / ".image.json")
    assert "new.vmdk" in known["reason"]
    assert [file["name"] for file in known["files"]] == ["new.vmdk"]
    # It takes room and is not listed: whoever looks for that finds it here.
    assert document(mount.path / "one" / ".datastore.json")["staged"] == {"new": known["reason"]}
    assert document(mount.path / "two" / ".datastore.json")["staged"] == {}


def test_a_deleted_image_tells_since_when(image: Path) -> None:
    run("rm", "-r", image)
    known = document(image.parent / ".deleted" / "a" / ".image.json")
    assert known["state"] == "TOMBSTONED"
    assert known["tombstone_time"].endswith("Z")


def test_a_datastore_tells_its_room_and_whether_it_is_followed(image: Path, sidecar: Sidecar) -> None:
    path = image.parent / ".datastore.json"
    known = document(path)
    assert known["name"] == "one"
    assert known["layout"] == "compound"
    assert known["free_bytes"] > 0
    assert known["stale_since"] is None
    assert sidecar.process is not None
    sidecar.process.send_signal(signal.SIGKILL)
    wait_until(lambda: document(path)["stale_since"] is not None, "the mount knows that the sidecar is gone")
    stale = document(image / ".image.json")
    assert stale["state"] == "VALID"
    assert stale["stale_because"]


def test_a_datastore_tells_since_when_the_sidecar_hangs(image: Path, sidecar: Sidecar) -> None:
    """Its stream is up, and silent."""
    path = image.parent / ".datastore.json"
    with hanging(sidecar):
        since = document(path)["stale_since"]
        assert since.endswith("Z")
        assert document(image / ".image.json")["stale_since"] == since
        assert document(path)["stale_since"] == since
    wait_until(lambda: document(path)["stale_since"] is None, "it is back")


def test_an_import_that_lacks_an_extent_says_so_once_it_was_left_alone(mount: Mount, disk: Path) -> None:
    staged = mount.path / "one" / "new"
    staged.mkdir()
    run("cp", disk, staged)
    wait_until(
        lambda: "disk-flat.vmdk" in document(staged / ".image.json")["reason"], "the reason names what is missing"
    )
    assert document(staged / ".image.json")["state"] == "STAGED"


def test_extended_attributes_are_there_when_asked_for(
    image: Path, sidecar: Sidecar, tmp_path: Path, stack: ExitStack
) -> None:
    """And only then: the kernel asks for several of every entry of a listing."""
    assert run("getfattr", "-d", image, check=False).stdout == ""
    other = stack.enter_context(Mount(tmp_path / "other", sidecar.address, options="xattr"))
    shown = run("getfattr", "--absolute-names", "-d", other.path / "one" / "a").stdout
    assert 'user.image.state="VALID"' in shown
    assert f'user.image.size_bytes="{sum(path.stat().st_size for path in image.iterdir())}"' in shown
    assert run("getfattr", "-n", "user.image.nothing", other.path / "one" / "a", check=False).returncode != 0
    run("ls", "-l", other.path / "one")
    run("cp", "-a", other.path / "one" / "a", other.path / "one" / "b")
    assert names(other.path / "one" / "b") == {"b.vmdk", "b-flat.vmdk", "b.ecv"}
