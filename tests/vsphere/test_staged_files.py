"""A datastore by its server's API alone, below the images: bytes that come and go, and what is staged meanwhile."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from pyVmomi import vim

from sidecar.datastores import spool
from sidecar.datastores.api_readable import ApiReadable
from sidecar.datastores.interface import Datastore
from sidecar.datastores.posix import PosixDatastore
from sidecar.datastores.posix_files import write_all
from sidecar.datastores.spool import SpooledFile
from sidecar.datastores.vsphere_api import VsphereApiDatastore
from sidecar.errors import DatastoreUnavailable, DiskFileFault, FileChanged, InvalidRequest, LockTimeout
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import Discovery
from sidecar.images.layouts import LAYOUTS
from sidecar.images.names import TIMESTAMP
from sidecar.images.progress import Progress
from sidecar.images.publishing import publish
from sidecar.images.reaping import reap
from sidecar.images.staging import StagingDirectory
from sidecar.images.store import ImageStore
from sidecar.locks.identity import own_identity
from sidecar.locks.interface import HeldLock
from sidecar.vsphere import files
from sidecar.vsphere.disks import DatastoreAddress
from sidecar.vsphere.faults import ServerUnreachable, error_of
from sidecar.vsphere.files import ServerFiles
from sidecar.vsphere.folder import Folder
from tests.support.disks import make_disk
from tests.support.places import Place, flat_files
from tests.support.processes import wait_until
from tests.vsphere.conftest import PATIENCE, MakeSite, Site

PIECE = bytes(range(256)) * 4096


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_site(kind="host")


@pytest.fixture
def root(site: Site) -> Path:
    return site.roots["one"]


@pytest.fixture
def open_datastore(site: Site) -> Iterator[Callable[..., VsphereApiDatastore]]:
    opened: list[VsphereApiDatastore] = []

    def open_datastore(timeout: float = PATIENCE) -> VsphereApiDatastore:
        opened.append(VsphereApiDatastore("one", DatastoreAddress(site.connection(timeout=timeout), "one")))
        return opened[-1]

    yield open_datastore
    for each in opened:
        each.close()


@pytest.fixture
def datastore(open_datastore: Callable[..., VsphereApiDatastore]) -> VsphereApiDatastore:
    return open_datastore()


def test_a_file_is_read_for_longer_than_the_timeout_of_a_request(
    open_datastore: Callable[..., VsphereApiDatastore], root: Path
) -> None:
    (root / "file").write_bytes(8 * PIECE)
    datastore = open_datastore(timeout=1.0)
    with closing(datastore.open_readable("file")) as file:
        read = file.read(0, 1000)
        while data := file.read(len(read), 2 << 20):
            read += data
            time.sleep(0.6)
    assert read == 8 * PIECE


def test_a_file_is_written_for_longer_than_the_timeout_of_a_request(site: Site, root: Path) -> None:
    connection = site.connection(timeout=1.0)

    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            time.sleep(0.6)
            yield PIECE

    Folder(connection, DatastoreAddress(connection, "one").find).write("file", 3 * len(PIECE), pieces)
    assert (root / "file").read_bytes() == 3 * PIECE


def test_a_download_that_the_server_has_ended_goes_on_where_it_was(
    datastore: VsphereApiDatastore, site: Site, root: Path
) -> None:
    (root / "file").write_bytes(8 * PIECE)
    with closing(datastore.open_readable("file")) as file:
        read = file.read(0, 1000) + file.read(1000, 1000)
        site.simulator.kill()
        site.simulator.start()
        while data := file.read(len(read), 1 << 20):
            read += data
    assert read == 8 * PIECE


def test_a_path_that_leads_out_of_the_datastore_is_never_sent(datastore: VsphereApiDatastore, site: Site) -> None:
    (site.roots["two"] / "file").write_bytes(b"x")
    folder = Folder(datastore.address.connection, datastore.known)
    for path in ("../two/file", "a/../../two/file", "a//b", ""):
        for act in (folder.size, lambda path: folder.read(path, 0, 1), lambda path: folder.write(path, 0, list)):
            with pytest.raises(InvalidRequest):
                act(path)


def test_what_is_read_from_behind_the_end_is_an_error_and_no_content(
    datastore: VsphereApiDatastore, root: Path
) -> None:
    (root / "file").write_bytes(b"12345")
    with pytest.raises(FileChanged, match="file ends before 7 now: it was cut off or replaced"):
        Folder(datastore.address.connection, datastore.known).open("file", 7)
    (root / "file").write_bytes(b"")
    with closing(datastore.open_writable("file")) as file:
        assert file.size() == 0


def stage(datastore: Datastore, path: str, content: bytes, *, sync: bool = False) -> None:
    with closing(datastore.open_writable(path)) as file:
        file.write(0, content)
        if sync:
            file.sync()


@pytest.fixture
def keeping_disks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server removes no directory with a disk in it, as newer ones are said to, and no descriptor that has data."""
    remove = ServerFiles.remove

    def refuse(self: ServerFiles, path: str) -> None:
        flat = root / path.replace(".vmdk", "-flat.vmdk")
        if any((root / path).rglob("*.vmdk")) or (path.endswith(".vmdk") and flat.exists()):
            raise error_of(vim.fault.CannotDeleteFile(file=path), "sim", f"remove {path}")
        remove(self, path)

    monkeypatch.setattr(ServerFiles, "remove", refuse)


@pytest.mark.parametrize("subformat", ["monolithicFlat", "monolithicSparse", "twoGbMaxExtentSparse"])
@pytest.mark.usefixtures("keeping_disks")
def test_a_directory_is_removed_though_the_server_removes_none_that_has_a_disk(
    datastore: VsphereApiDatastore, root: Path, subformat: str
) -> None:
    make_disk(root / "trash" / "image_a-1", "a-1.vmdk", subformat=subformat)
    make_disk(root / "trash" / "image_a-1" / "tmp", "flat.vmdk", subformat=subformat)
    (root / "trash" / "image_a-1" / "a-1-notes.json").write_bytes(b"{}")
    assert datastore.remove_tree("trash/image_a-1") > 0
    assert list((root / "trash").iterdir()) == []


@pytest.mark.usefixtures("keeping_disks")
def test_the_data_of_another_image_is_not_removed_with_a_disk_that_names_it(
    datastore: VsphereApiDatastore, root: Path
) -> None:
    """As somebody else may have made one: the server removes what a descriptor names, wherever that is."""
    make_disk(root / "image_base", "base.vmdk")
    (root / "trash" / "image_a").mkdir(parents=True)
    text = (root / "image_base" / "base.vmdk").read_text().replace('"base-flat', '"../../image_base/base-flat')
    for name in ("a.vmdk", "b.vmdk"):
        (root / "trash" / "image_a" / name).write_text(text)
    datastore.remove_disk("trash/image_a/b.vmdk")
    datastore.remove_tree("trash/image_a")
    assert not (root / "trash" / "image_a").exists()
    assert (root / "image_base" / "base-flat.vmdk").exists()


@pytest.mark.parametrize("path", ["a", "a/file"])
def test_what_the_server_refuses_to_remove_for_another_reason_is_told(
    datastore: VsphereApiDatastore, root: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def refuse(self: ServerFiles, path: str) -> None:
        raise error_of(vim.fault.CannotDeleteFile(file=path), "sim", f"remove {path}")

    monkeypatch.setattr(ServerFiles, "remove", refuse)
    (root / "a").mkdir()
    (root / "a" / "file").touch()
    with pytest.raises(DiskFileFault, match="CannotDeleteFile"):
        datastore.remove_tree(path)


@pytest.mark.parametrize("sent", ["neither", "source", "destination", "both"])
def test_no_staged_file_is_renamed_over_another_one(datastore: VsphereApiDatastore, root: Path, sent: str) -> None:
    (root / "d").mkdir()
    stage(datastore, "d/source", b"source", sync=sent in ("source", "both"))
    stage(datastore, "d/destination", b"destination", sync=sent in ("destination", "both"))
    with pytest.raises(FileExistsError):
        datastore.rename("d/source", "d/destination")
    datastore.remove_file("d/destination")
    datastore.rename("d/source", "d/destination")
    datastore.sync_file("d/destination")
    assert {path.name: path.read_bytes() for path in (root / "d").iterdir()} == {"destination": b"source"}


def test_what_is_written_while_a_file_is_sent_is_sent_again(
    datastore: VsphereApiDatastore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "d").mkdir()
    with closing(datastore.open_writable("d/file")) as file:
        file.write(0, 3 * PIECE)
        pieces = SpooledFile.pieces

        def written_meanwhile(spooled: SpooledFile, size: int) -> Iterator[bytes]:
            for number, piece in enumerate(pieces(spooled, size)):
                yield piece
                if not number:
                    file.write(0, b"new")
                    file.resize(5 * len(PIECE) if size < 4 * len(PIECE) else 2 * len(PIECE))

        monkeypatch.setattr(SpooledFile, "pieces", written_meanwhile)
        file.sync()  # it becomes longer
        file.sync()  # and shorter
        monkeypatch.undo()
        file.sync()
    assert (root / "d" / "file").read_bytes() == b"new" + (2 * PIECE)[3:]


def test_a_write_that_ends_after_a_file_was_sent_is_sent_again(
    datastore: VsphereApiDatastore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write begins before the file is sent, and its bytes are there after that."""
    (root / "d").mkdir()
    stage(datastore, "d/file", b"old", sync=True)
    late = threading.Event()
    waiting = threading.Event()

    def write_late(fd: int, data: bytes, offset: int) -> None:
        waiting.set()
        late.wait(10)
        write_all(fd, data, offset)

    monkeypatch.setattr(spool, "write_all", write_late)
    writer = threading.Thread(target=stage, args=(datastore, "d/file", b"new"))
    writer.start()
    assert waiting.wait(10)
    sender = threading.Thread(target=datastore.sync_file, args=("d/file",))
    sender.start()
    sender.join(1)  # it may wait for the write
    late.set()
    sender.join()
    writer.join()
    datastore.sync_file("d/file")
    assert (root / "d" / "file").read_bytes() == b"new"


def test_a_file_that_changed_after_it_was_sent_leaves_nothing_under_its_old_name(
    datastore: VsphereApiDatastore, root: Path
) -> None:
    (root / "d").mkdir()
    stage(datastore, "d/file", b"old", sync=True)
    stage(datastore, "d/file", b"new")
    datastore.rename("d/file", "d/other")
    datastore.sync_file("d/other")
    assert datastore.names("d") == ["other"]
    assert [path.name for path in (root / "d").iterdir()] == ["other"]
    assert (root / "d" / "other").read_bytes() == b"new"


def test_the_time_of_a_staged_file_is_when_it_was_set_and_not_when_it_was_sent(
    datastore: VsphereApiDatastore, root: Path
) -> None:
    (root / "d").mkdir()
    stage(datastore, "d/file", b"", sync=True)
    os.utime(root / "d" / "file", (1e9, 1e9))
    with datastore.set_modified("d/file", time.time_ns()):
        assert (root / "d" / "file").stat().st_mtime > 1.5e9


@pytest.fixture
def store(datastore: VsphereApiDatastore) -> ImageStore:
    store = ImageStore(datastore, LAYOUTS["compound"])
    store.layout.prepare(datastore)
    return store


def staged(store: ImageStore) -> StagingDirectory:
    staging = StagingDirectory(store, "b", "import")
    for name in ("b.vmdk", "b-flat.vmdk"):
        stage(store.datastore, staging.path(name), b"x")
    return staging


def test_an_image_whose_publishing_was_done_without_an_answer_is_published(
    store: ImageStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = ServerFiles.move

    def move_unanswered(files: ServerFiles, source: str, destination: str, *, replace: bool = False) -> None:
        move(files, source, destination, replace=replace)
        if destination == "image_b":
            raise ServerUnreachable("no answer")

    monkeypatch.setattr(ServerFiles, "move", move_unanswered)
    with staged(store) as staging:
        publish(staging)
    assert {path.name for path in (root / "image_b").iterdir()} == {"b.vmdk", "b-flat.vmdk", TIMESTAMP}
    assert store.datastore.lock_holder("image_b.ec_lock") is None


def test_an_image_that_is_published_late_is_never_what_the_removal_of_its_staging_has_left(
    store: ImageStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server gives no answer, and moves the directory when it is being removed."""
    move, remove = ServerFiles.move, ServerFiles.remove
    late: list[Callable[[], None]] = []

    def move_late(files: ServerFiles, source: str, destination: str, *, replace: bool = False) -> None:
        if destination == "image_b":
            late.append(lambda: move(files, source, destination))
            raise ServerUnreachable("no answer")
        move(files, source, destination, replace=replace)

    def remove_part(files: ServerFiles, path: str) -> None:
        if late and not path.endswith(".ec_lock"):
            (root / path / "b-flat.vmdk").unlink()
            with suppress(FileNotFoundError):
                late.pop()()
        remove(files, path)

    monkeypatch.setattr(ServerFiles, "move", move_late)
    monkeypatch.setattr(ServerFiles, "remove", remove_part)
    with pytest.raises(ServerUnreachable), staged(store) as staging:
        publish(staging)
    assert not late
    assert not (root / "image_b").exists()


def test_what_was_staged_is_given_up_also_when_the_server_is_away_at_the_end(
    store: ImageStore, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = ServerFiles.move

    def go_away(files: ServerFiles, source: str, destination: str, *, replace: bool = False) -> None:
        if destination == "image_b":
            site.simulator.kill()
        move(files, source, destination, replace=replace)

    monkeypatch.setattr(ServerFiles, "move", go_away)
    with pytest.raises(ServerUnreachable), staged(store) as staging:
        publish(staging)
    open_files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [path for path in open_files if path.startswith("/var/tmp/")] == []


def test_a_directory_that_a_server_tells_nothing_of_is_not_an_empty_one(
    datastore: VsphereApiDatastore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "d" / "e").mkdir(parents=True)
    assert datastore.names("d") == ["e"]
    monkeypatch.setattr(files, "run_task", lambda *arguments: None)
    for act in (datastore.names, datastore.remove_directory, lambda path: datastore.tree()):
        with pytest.raises(DatastoreUnavailable, match="tells nothing"):
            act("d")
    assert (root / "d" / "e").exists()


def test_an_image_that_cannot_be_read_hides_no_details_of_the_others(
    datastore: VsphereApiDatastore, store: ImageStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place("one", "compound", root)
    for image_id in ("a", "b", "c"):
        place.plant(image_id)
    read_range = datastore.read_range

    def read(path: str, offset: int, length: int) -> bytes:
        if path.startswith("image_a/"):
            raise DatastoreUnavailable("it is open elsewhere")
        return read_range(path, offset, length)

    monkeypatch.setattr(datastore, "read_range", read)
    catalog = Catalog()

    def detailed() -> set[str]:
        known = {image_id: catalog.get(store.key(image_id)) for image_id in catalog.ids("one")}
        return {image_id for image_id, image in known.items() if image and image.details_known}

    discovery = Discovery(store, catalog, rescan_seconds=0.1)
    discovery.start()
    try:
        wait_until(lambda: detailed() == {"b", "c"}, "the others are read")
        assert catalog.ids("one") == ["a", "b", "c"]
    finally:
        discovery.close()


def test_locks_that_somebody_died_over_are_reaped(
    datastore: VsphereApiDatastore, store: ImageStore, root: Path
) -> None:
    dead = replace(own_identity(), pid=ended_pid(), started=1)
    for name, holder in {
        "image_a.ec_lock": str(dead),
        "image_b.0123456789abcdef.ec_lock": "",
        "image_c.ec_lock": "x",
    }.items():
        (root / name).mkdir()
        if holder:
            (root / name / holder).touch()
    with datastore.lock("image_d.ec_lock", "touch d", 0):
        reap(store, -60)
        assert {path.name for path in root.glob("*.ec_lock")} == {"image_c.ec_lock", "image_d.ec_lock"}


def test_locks_that_somebody_died_over_within_an_image_are_reaped_and_the_image_is_not(
    datastore: VsphereApiDatastore, root: Path
) -> None:
    """Layout vsan: also one that was let go of, and is under a name of its own."""
    vsan = Place("one", "vsan", root)
    vsan.plant("a")
    dead = replace(own_identity(), pid=ended_pid(), started=1)
    for name in ("lock.ec_lock", "lock.0123456789abcdef.ec_lock"):
        (vsan.directory("a") / name).mkdir()
        (vsan.directory("a") / name / str(dead)).touch()
    store = ImageStore(datastore, LAYOUTS["vsan"])
    reap(store, -60)
    vsan.assert_holds({"a": flat_files("a")})


@pytest.mark.parametrize("held", [True, False], ids=["held", "empty"])
@pytest.mark.parametrize("layout", ["compound", "sharded", "vsan"])
def test_what_a_reaper_left_of_a_lock_in_an_image_directory_without_an_image_is_reaped(
    datastore: VsphereApiDatastore, root: Path, layout: str, held: bool
) -> None:
    """It died while it gave back a lock that it had taken from a process that died before."""
    place = Place("one", layout, root)
    lock = place.directory("ab") / "lock.0123456789abcdef.fedcba9876543210.ec_lock"
    lock.mkdir(parents=True)
    if held:
        (lock / str(replace(own_identity(), pid=ended_pid(), started=1))).touch()
    store = ImageStore(datastore, LAYOUTS[layout])
    reap(store, 60)
    assert lock.exists()  # within the grace time
    reap(store, -60)
    place.assert_holds({})


def test_a_host_with_a_path_reaps_what_is_left_of_the_locks_of_those_without(root: Path) -> None:
    dead = replace(own_identity(), pid=ended_pid(), started=1)
    vsan = Place("one", "vsan", root)
    vsan.plant("a")
    for path in ("image_a/lock.ec_lock", "image_b/lock.0123456789abcdef.fedcba9876543210.ec_lock"):
        (root / path).mkdir(parents=True)
        (root / path / str(dead)).touch()
    (root / "image_a" / "lock.0123456789abcdef.ec_lock").mkdir()
    with closing(PosixDatastore("one", str(root))) as datastore:
        reap(ImageStore(datastore, LAYOUTS["vsan"]), -60)
    vsan.assert_holds({"a": flat_files("a")})


def test_a_directory_is_removed_though_its_lock_was_held_and_let_go_of_in_the_moment_of_trying(
    datastore: VsphereApiDatastore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who let go of it may have left the directory, as there was something in it: the lock that this try prepared."""
    (root / "d").mkdir()
    (root / "d" / "lock.ec_lock").touch()
    real, tried = datastore.lock, []

    def lock(path: str, operation: str, timeout: float) -> HeldLock:
        tried.append(path)
        if len(tried) == 1:
            (root / path).unlink()
            raise LockTimeout("held")
        return real(path, operation, timeout)

    monkeypatch.setattr(datastore, "lock", lock)
    datastore.remove_directory("d")
    assert not (root / "d").exists()


def test_a_directory_whose_lock_is_held_stays(datastore: VsphereApiDatastore, root: Path) -> None:
    (root / "d").mkdir()
    with datastore.lock("d/lock.ec_lock", "make", 0), pytest.raises(FileExistsError):
        datastore.remove_directory("d")
    datastore.remove_directory("d")


def ended_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_data_whose_descriptor_has_another_name_is_copied_by_the_server_all_the_same(
    datastore: VsphereApiDatastore, root: Path
) -> None:
    (root / "image_a").mkdir()
    (root / "image_a" / "a.vmdk").write_bytes(b"descriptor")
    (root / "image_a" / "disk-flat.vmdk").write_bytes(PIECE)
    datastore.make_directory("d")
    with ExitStack() as stack:
        for source, name in {"a.vmdk": "b.vmdk", "disk-flat.vmdk": "b-flat.vmdk"}.items():
            readable = stack.enter_context(closing(datastore.open_readable(f"image_a/{source}")))
            writable = stack.enter_context(closing(datastore.open_writable(f"d/{name}")))
            assert writable.clone(readable, 0, 0, readable.size, Progress()) == readable.size
    datastore.sync_file("d/b-flat.vmdk")
    datastore.sync_file("d/b.vmdk")
    assert (root / "d" / "b-flat.vmdk").read_bytes() == PIECE
    assert (root / "d" / "b.vmdk").read_bytes() == b"descriptor"


def replaced(path: Path) -> None:
    """By another file of the same size, as by a host that purged the image and made it anew."""
    path.unlink()
    path.write_bytes(bytes(len(PIECE)))
    os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("change", [replaced, Path.unlink])
def test_what_is_not_there_any_more_while_it_is_read_is_told_and_not_taken_for_a_defect(
    datastore: VsphereApiDatastore, root: Path, change: Callable[[Path], None]
) -> None:
    (root / "file").write_bytes(PIECE)
    file = datastore.open_readable("file")
    assert isinstance(file, ApiReadable)
    with closing(file):
        file.require_same()
        change(root / "file")
        with pytest.raises(FileChanged, match="one: file was removed or replaced while it was read"):
            file.read(0, 10)
            file.require_same()


@pytest.mark.parametrize("change", [replaced, Path.unlink])
@pytest.mark.parametrize("whole", [True, False], ids=["by the server", "by this host"])
def test_a_copy_of_what_another_host_took_away_is_never_complete(
    datastore: VsphereApiDatastore, root: Path, change: Callable[[Path], None], whole: bool
) -> None:
    (root / "file").write_bytes(PIECE)
    (root / "d").mkdir()
    with (
        closing(datastore.open_readable("file")) as source,
        closing(datastore.open_writable("d/copy")) as copy,
    ):
        copy.clone(source, 0, 0, len(PIECE), Progress())
        change(root / "file")
        with pytest.raises((FileChanged, FileNotFoundError)):
            copy.sync() if whole else copy.resize(len(PIECE) + 1)


def test_a_file_that_only_the_server_has_is_not_renamed_over_one_that_is_only_staged(
    datastore: VsphereApiDatastore, root: Path
) -> None:
    (root / "d").mkdir()
    (root / "d" / "copied").write_bytes(b"copied")
    stage(datastore, "d/staged", b"staged")
    with pytest.raises(FileExistsError):
        datastore.rename("d/copied", "d/staged")
    with pytest.raises(FileExistsError):
        datastore.rename("d/staged", "d/copied")
    assert datastore.read_file("d/copied", 10) == b"copied"
    assert datastore.read_file("d/staged", 10) == b"staged"
