"""What a server knows of its VMs counts: an image that one needs is kept, wherever the VM's files are."""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sidecar import errors
from sidecar.client import Scan
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.vsphere import VsphereDatastore
from sidecar.datastores.vsphere_api import VsphereApiDatastore
from sidecar.datastores.writers import Writers
from sidecar.images.layouts import LAYOUTS
from sidecar.images.store import ImageStore
from sidecar.images.usage import uses_of_image
from sidecar.locks.flock import Flock
from sidecar.vsphere.connection import Connection
from sidecar.vsphere.disks import DatastoreAddress
from sidecar.vsphere.stub import SessionStub
from tests.support.places import MARKER, TIMESTAMP, Place
from tests.support.processes import wait_until
from tests.support.vms import Vms, remove_disks
from tests.vsphere.conftest import MakeSite, Served, Site, end_sessions

DAY = 86_400
WEB = "VM web (disk [one] web/web.vmdk)"
# What a host alone does not have.
ON_A_VCENTER = pytest.mark.parametrize("kind", ["vcenter"], indirect=True)


def make_stores(
    connection: Connection, roots: dict[str, Path], *, datacenter: str | None = None, pathless: Sequence[str] = ()
) -> dict[str, ImageStore]:
    """Those of a host with datastores of one server, which share it."""
    writers = Writers()
    stores = {}
    for name, root in roots.items():
        address = DatastoreAddress(connection, name, datacenter)
        datastore = (
            VsphereApiDatastore(name, address)
            if name in pathless
            else VsphereDatastore(name, str(root), Flock(), writers, address)
        )
        stores[name] = ImageStore(datastore, LAYOUTS["compound"])
    for store in stores.values():
        store.share_host(list(stores.values()))
    return stores


def users(stores: dict[str, ImageStore], ref: str) -> list[str]:
    name, _, image_id = ref.partition("/")
    return list(uses_of_image(list(stores.values()), stores[name].key(image_id)))


@pytest.fixture
def stores(site: Site) -> Iterator[dict[str, ImageStore]]:
    stores = make_stores(site.connection(), site.roots)
    yield stores
    for store in stores.values():
        store.datastore.close()


@pytest.fixture
def vms(site: Site) -> Vms:
    return Vms(site.connection(), site.roots)


@pytest.mark.parametrize("refer", [False, True], ids=["by name", "by reference"])
def test_the_parent_of_a_disk_is_in_use(stores: dict[str, ImageStore], vms: Vms, refer: bool) -> None:
    vm = vms.create("web", ("[one] web/web.vmdk", "[one] image_a/a.vmdk"), refer=refer)
    for change in (None, lambda vm: vm.PowerOn()):
        if change is not None:
            vms.do(vm, change)
        assert users(stores, "one/a") == [WEB]
        assert users(stores, "one/b") == []
        assert users(stores, "two/a") == []
    vms.do(vm, lambda vm: vm.PowerOff())
    vms.do(vm, lambda vm: vm.Destroy())
    assert users(stores, "one/a") == []


def test_a_disk_that_lies_in_the_image_is_a_use_of_it(stores: dict[str, ImageStore], vms: Vms) -> None:
    vms.create("web", ("[one] image_a/a.vmdk",))
    assert users(stores, "one/a") == ["VM web (disk [one] image_a/a.vmdk)"]


def test_every_disk_counts_and_every_parent(stores: dict[str, ImageStore], vms: Vms) -> None:
    vms.create(
        "web",
        ("[one] web/first.vmdk", "[one] image_a/a.vmdk"),
        ("[one] web/second.vmdk", "[two] other/middle.vmdk", "[one] image_b/b.vmdk", "[two] image_c/c.vmdk"),
    )
    assert users(stores, "one/a") == ["VM web (disk [one] web/first.vmdk)"]
    assert users(stores, "one/b") == users(stores, "two/c") == ["VM web (disk [one] web/second.vmdk)"]


def test_a_vm_of_another_datastore_counts(stores: dict[str, ImageStore], vms: Vms) -> None:
    vms.create("web", ("[two] web/web.vmdk", "[one] image_a/a.vmdk"), on="two")
    assert users(stores, "one/a") == ["VM web (disk [two] web/web.vmdk)"]
    del stores["two"]
    assert users(stores, "one/a") == ["VM web (disk [two] web/web.vmdk)"]


def test_links_on_a_datastore_are_followed(stores: dict[str, ImageStore], vms: Vms, site: Site) -> None:
    (site.roots["one"] / "base").symlink_to(site.roots["two"] / "image_a")
    vms.create("web", ("[one] web/web.vmdk", "[one] base/a.vmdk"))
    assert users(stores, "two/a") == [WEB]


def test_a_directory_of_vsan_may_be_that_of_any_image(stores: dict[str, ImageStore], vms: Vms) -> None:
    """VSAN names it by its object, and the image by the file in it."""
    vms.create("web", ("[one] web/web.vmdk", "[one] 5a1b2c3d-0123-4567-89ab-0025b5c0a0a0/a.vmdk"))
    assert users(stores, "one/a") == [WEB]
    assert users(stores, "one/b") == []


def test_what_only_a_snapshot_holds_counts(stores: dict[str, ImageStore], vms: Vms) -> None:
    vm = vms.create("web", ("[one] web/web.vmdk", "[one] image_a/a.vmdk"))
    vms.do(vm, lambda vm: vm.CreateSnapshot("empty", "", False, False))
    vms.do(vm, lambda vm: vm.CreateSnapshot("second", "", False, False))
    assert users(stores, "one/a") == [WEB]
    vms.do(vm, remove_disks)
    assert users(stores, "one/a") == [WEB]
    vms.do(vm, lambda vm: vm.RemoveAllSnapshots())
    assert users(stores, "one/a") == []


@ON_A_VCENTER
def test_folders_are_looked_into(stores: dict[str, ImageStore], vms: Vms) -> None:
    vms.create("web", ("[one] web/web.vmdk", "[one] image_a/a.vmdk"), folders=("outer", "inner"))
    assert users(stores, "one/a") == [WEB]


@ON_A_VCENTER
def test_templates_count(stores: dict[str, ImageStore], vms: Vms) -> None:
    vm = vms.create("web", ("[one] web/web.vmdk", "[one] image_a/a.vmdk"))
    vms.do(vm, lambda vm: vm.MarkAsTemplate())
    assert users(stores, "one/a") == [WEB]


@ON_A_VCENTER
def test_the_vms_of_a_vapp_count(stores: dict[str, ImageStore], vms: Vms) -> None:
    vms.create("web", ("[one] web/web.vmdk", "[one] image_a/a.vmdk"), vapp="app")
    assert users(stores, "one/a") == [WEB]


def test_one_name_in_two_datacenters(make_site: MakeSite) -> None:
    """The reference decides where there is one; a name alone may be meant, so the image is in use."""
    site = make_site(datacenters=2)
    vms = Vms(site.connection(), site.roots)
    stores = make_stores(site.connection(), site.roots, datacenter="DC1")
    vms.create("here", ("[one] here/here.vmdk", "[one] image_a/a.vmdk"), datacenter=1, refer=True)
    vms.create("there", ("[one] there/there.vmdk", "[one] image_b/b.vmdk"), refer=True)
    vms.create("anywhere", ("[one] anywhere/anywhere.vmdk", "[one] image_c/c.vmdk"))
    assert users(stores, "one/a") == ["VM here (disk [one] here/here.vmdk)"]
    assert users(stores, "one/b") == []
    assert users(stores, "one/c") == ["VM anywhere (disk [one] anywhere/anywhere.vmdk)"]


def test_a_datastore_of_this_host_alone_is_known_by_its_name(site: Site, vms: Vms) -> None:
    """A host may mount what this one mounts, under that name, and nobody has configured so."""
    stores = make_stores(site.connection(), {"one": site.roots["one"]})
    stores["two"] = ImageStore(PosixDatastore("two", str(site.roots["two"])), LAYOUTS["compound"])
    vms.create("web", ("[one] web/web.vmdk", "[two] image_a/a.vmdk"), refer=True)
    assert users(stores, "two/a") == [WEB]


def test_of_a_datastore_without_a_directory_the_server_alone_is_asked(site: Site, vms: Vms) -> None:
    stores = make_stores(site.connection(), site.roots, pathless=("one",))
    vms.create("web", ("[one] web/web.vmdk", "[one] image_a/a.vmdk"))
    vms.create("db", ("[two] db/db.vmdk", "[one] image_a/a.vmdk"), on="two", refer=True)
    overlay = site.roots["two"] / "vm_1" / "disk.vmdk"
    overlay.parent.mkdir()
    overlay.write_text(
        '# Disk DescriptorFile\nversion=1\nCID=8f3a1c2e\nparentCID=fffffffe\ncreateType="vmfsSparse"\n'
        'parentFileNameHint="/vmfs/volumes/one/image_a/a.vmdk"\nRW 4096 VMFSSPARSE "disk-delta.vmdk"\n'
    )
    assert sorted(users(stores, "one/a")) == [
        f"VM 1 (disk {overlay})",
        "VM db (disk [two] db/db.vmdk)",
        WEB,
    ]
    assert users(stores, "one/b") == users(stores, "two/a") == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each method of a server was called."""
    calls: Counter[str] = Counter()
    send = SessionStub.InvokeMethod

    def count(stub: SessionStub, mo: Any, info: Any, *arguments: Any) -> Any:
        calls[info.wsdlName] += 1
        return send(stub, mo, info, *arguments)

    monkeypatch.setattr(SessionStub, "InvokeMethod", count)
    return calls


def test_one_request_reads_all_vms(stores: dict[str, ImageStore], vms: Vms, calls: Counter[str], site: Site) -> None:
    for number in range(200):
        vms.create(f"vm{number}", (f"[one] vm{number}/disk.vmdk", f"[one] image_{number % 10}/{number % 10}.vmdk"))
    assert len(users(stores, "one/3")) == 20
    calls.clear()
    assert len(users(stores, "one/3")) == 20
    assert calls == {"RetrievePropertiesEx": 1}


def test_a_session_that_was_ended_is_no_server_without_vms(stores: dict[str, ImageStore], vms: Vms, site: Site) -> None:
    vms.create("web", ("[one] web/web.vmdk", "[one] image_a/a.vmdk"))
    for _ in range(2):
        assert users(stores, "one/a") == [WEB]
        end_sessions(site)


def test_a_datastore_that_the_server_does_not_have_is_no_datastore_without_vms(site: Site) -> None:
    stores = make_stores(site.connection(), {**site.roots, "three": site.roots["two"]})
    with pytest.raises(errors.DatastoreUnavailable, match="server sim has no datastore three"):
        users(stores, "one/a")


def plant(served: Served) -> Place:
    """The images a and b on the datastore one, which nobody touched for a day."""
    place = served.places["one"]
    for image_id in ("a", "b"):
        place.plant(image_id)
        os.utime(place.file(image_id, TIMESTAMP), (time.time() - DAY,) * 2)
    return place


def scan(served: Served) -> Scan:
    run_id = served.client.maintenance.start_scan("one", vm_rate=1e6, image_rate=1e6).run.run_id
    return served.client.maintenance.wait_scan("one", run_id, lambda scan: None)


def sweep(served: Served) -> dict[str, str]:
    """What is said of each image."""
    said: dict[str, str] = {}
    run_id = served.client.maintenance.start_sweep("one", rate=1e6).run.run_id
    served.client.maintenance.wait_sweep(
        "one", run_id, lambda sweep, results: said.update({result.image_id: result.reason for result in results})
    )
    return said


def test_an_image_that_a_vm_needs_is_kept_by_all_that_would_free_it(serve: Callable[..., Served]) -> None:
    served = serve()
    place = plant(served)
    vms = Vms(served.site.connection(), served.site.roots)
    vm = vms.create("web", ("[one] web/web.vmdk", "[two] web/base.vmdk", "[one] image_a/a.vmdk"))

    scanned = scan(served)
    assert (scanned.read_vms, scanned.used_images, scanned.marked_images) == (1, 1, 1)
    assert not place.file("a", MARKER).exists()
    place.file("a", MARKER).write_text(str(int(time.time())))
    with pytest.raises(errors.ImageInUse, match=f"one/a is in use by {re.escape(WEB)}"):
        served.client.delete("one/a", force=True)
    assert sweep(served)["a"] == f"it is in use by {WEB}"
    assert place.directory("a").exists()
    assert not place.directory("b").exists()
    assert served.client.image("one/a", with_vms=True).users == [WEB]
    served.client.delete("one/a")
    with pytest.raises(errors.ImageInUse, match=f"one/a is in use by {re.escape(WEB)}"):
        served.client.purge("one/a")
    (kept,) = served.client.maintenance.reap("one", purge_grace=0).kept
    assert f"one/a: it is in use by {WEB}" in kept

    vms.do(vm, lambda vm: vm.Destroy())
    served.client.purge("one/a")
    assert not place.directory("a").exists()


@pytest.mark.parametrize("layout", ["compound", "sharded", "vsan"])
def test_where_paths_are_those_of_other_datastores_nothing_is_unused(serve: Callable[..., Served], layout: str) -> None:
    """The server would tell of what is there in truth, and of another image of that name have the disk removed."""
    served = serve(paths={"one": "two", "two": "one"}, layout=layout)
    place = plant(served)
    other = served.places["two"]
    other.plant("b")
    Vms(served.site.connection(), served.site.roots).create("web", ("[two] web/web.vmdk", "[two] image_a/a.vmdk"))
    wait_until(lambda: {image.ref.image_id for image in served.client.images("one")} == {"a", "b"}, "they are listed")
    served.client.delete("one/b")
    before = place.snapshot(), other.snapshot()
    for free in (
        lambda: served.client.purge("one/b"),
        lambda: served.client.delete("one/a", force=True),
        lambda: scan(served),
    ):
        with pytest.raises(errors.DatastoreUnavailable, match="is not where the server has its datastore"):
            free()
    assert (place.snapshot(), other.snapshot()) == before


def test_what_is_no_image_keeps_none_from_being_freed(serve: Callable[..., Served]) -> None:
    """Where the server's datastore is to be proved, a file has to be made in some image's directory."""
    served = serve()
    place = served.places["one"]
    (place.root / "image_0").write_text("somebody's")
    (place.root / "image_1").mkdir()
    place.plant("b")
    place.descriptor("b").unlink()
    served.client.delete("one/b", force=True)
    assert not place.directory("b").exists()
    assert sorted(path.name for path in place.root.glob("image_*")) == ["image_0", "image_1"]


@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_while_the_server_does_not_answer_nothing_is_unused(serve: Callable[..., Served], how: str) -> None:
    served = serve(timeout=1)
    place = plant(served)
    served.client.delete("one/a")
    place.file("b", MARKER).write_text(str(int(time.time())))
    before = place.snapshot()
    with ExitStack() as stack:
        if how == "killed":
            served.site.simulator.kill()
        else:
            stack.enter_context(served.site.simulator.hanging())
        calls: list[Callable[[], object]] = [
            lambda: served.client.purge("one/a"),
            lambda: served.client.delete("one/b", force=True),
            lambda: scan(served),
            lambda: sweep(served),
        ]
        for call in calls:
            start = time.monotonic()
            with pytest.raises(errors.DatastoreUnavailable, match="server sim: cannot"):
                call()
            assert time.monotonic() - start < 8
        (user,) = served.client.image("one/b", with_vms=True).users
        assert user.startswith("unknown, server sim: cannot")
    assert place.snapshot() == before
