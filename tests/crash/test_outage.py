"""Datastores that are away, fail, or are locked by somebody: others go on, and nothing is taken for "not there"."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sidecar import client_calls, errors
from sidecar.client import SidecarClient
from sidecar.datastores.posix import PosixDatastore
from sidecar.images.catalog import Catalog
from sidecar.images.discovery import Discovery
from sidecar.images.layouts import LAYOUTS as IMAGE_LAYOUTS
from sidecar.images.store import ImageStore
from sidecar.locks.interface import HeldLock, LockHolder
from tests.crash.support import LAYOUTS, TIMESTAMP, answers, image_directory, write_image, write_image_files
from tests.support.disks import MIB
from tests.support.processes import Sidecar, loop_mount, run, wait_until

QUICK = 5.0  # seconds; a call that waits for a datastore that is away takes longer


def ids(client: SidecarClient, datastore: str = "") -> list[str]:
    return [f"{image.ref.datastore}/{image.ref.image_id}" for image in client.images(datastore)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_datastore_that_is_missing_at_the_start_delays_nobody_and_comes_to_life(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    write_image(tmp_path / "here", layout, "a")
    away = tmp_path / "mnt" / "away"
    sidecar = stack.enter_context(
        Sidecar(tmp_path / "run", f"here={tmp_path / 'here'},layout={layout}", f"away={away},layout={layout}")
    )
    client = stack.enter_context(sidecar.client())
    began = time.monotonic()
    (page,) = client.image_pages()
    assert [image.ref.image_id for image in page.images] == ["a"]
    assert len(page.incomplete_datastores) == 1
    assert page.incomplete_datastores[0].startswith(f"away: cannot open {away}: "), "named once"
    watch = stack.enter_context(client.watch())
    first = next(watch)
    assert [image.ref.image_id for image in first.images] == ["a"]
    assert {store.name: store.accessible for store in first.datastores} == {"here": True, "away": False}
    assert time.monotonic() - began < QUICK, "neither a listing nor a watch waits for it"
    store = client.datastore("away")
    assert not store.accessible and store.fault.startswith(f"cannot open {away}: ")
    (line,) = [line for line in sidecar.log.read_text().splitlines() if "datastore changed datastore=away" in line]
    assert " WARNING " in line and str(away) in line
    assert answers(lambda: client.image("away/b")) == "DATASTORE_UNAVAILABLE"
    assert answers(lambda: client.copy("here/a", "away/b").wait()) == "DATASTORE_UNAVAILABLE"
    client.copy("here/a", "here/b").wait()

    write_image(away, layout, "b")
    wait_until(lambda: ids(client, "away") == ["away/b"], "it is found by itself")
    wait_until(lambda: {s.name: s.accessible for s in client.datastores()}["away"], "it is accessible")
    assert not any(page.incomplete_datastores for page in client.image_pages())
    client.copy("here/a", "away/c").wait()


@pytest.mark.parametrize("layout", ("compound", "vsan"))
def test_an_io_error_is_never_not_found_and_the_catalogue_keeps_what_it_knew(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    root = stack.enter_context(loop_mount(tmp_path / "fs", 320 * MIB, ("mkfs.xfs", "-q")))
    write_image(root, layout, "a")
    write_image(tmp_path / "here", layout, "a")
    sidecar = stack.enter_context(
        Sidecar(tmp_path / "run", f"broken={root},layout={layout}", f"here={tmp_path / 'here'},layout={layout}")
    )
    client = stack.enter_context(sidecar.client(timeout=5.0))
    assert ids(client) == ["broken/a", "here/a"]
    run("xfs_io", "-x", "-c", "shutdown", root)
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: client.image("broken/a"),
        "get of what never was": lambda: client.image("broken/b"),
        "touch": lambda: client.touch("broken/a"),
        "validate": lambda: client.validate("broken/a"),
        "delete": lambda: client.delete("broken/a"),
        "force": lambda: client.delete("broken/a", force=True),
        "copy from": lambda: client.copy("broken/a", "here/b").wait(),
        "copy to": lambda: client.copy("here/a", "broken/b").wait(),
        "import": lambda: client.create_staging("broken/b"),
        "read": lambda: list(client.read_file("broken/a", "a.vmdk")),
    }
    found = {what: answers(call) for what, call in calls.items()}
    assert found == dict.fromkeys(calls, "DATASTORE_UNAVAILABLE")
    wait_until(lambda: not client.datastore("broken").accessible, "it is told to be away")
    assert ids(client) == ["broken/a", "here/a"], "an outage empties no listing"
    assert any("broken" in text for page in client.image_pages() for text in page.incomplete_datastores)
    client.copy("here/a", "here/c").wait()
    assert "Traceback" not in sidecar.log.read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lock_that_another_process_holds_is_a_timeout_that_names_it(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    root = tmp_path / "one"
    write_image(root, layout, "a")
    sidecar = stack.enter_context(
        Sidecar(tmp_path / "run", f"one={root},layout={layout}", config="[limits]\nlock_timeout_seconds = 1\n")
    )
    client = stack.enter_context(sidecar.client())
    directory = image_directory(root, layout, "a")
    lock = directory / "lock.ec_lock" if layout == "vsan" else directory.with_name(f"{directory.name}.ec_lock")
    holder = os.open(lock, os.O_RDWR | os.O_CREAT)
    stack.callback(os.close, holder)
    fcntl.flock(holder, fcntl.LOCK_EX)
    since = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    os.write(holder, LockHolder("esx-7", 4711, "hostd", "sweep a", since).to_bytes())
    for call in (
        lambda: client.delete("one/a"),
        lambda: client.touch("one/a"),
        lambda: client.delete("one/a", force=True),
    ):
        began = time.monotonic()
        with pytest.raises(errors.LockTimeout) as raised:
            call()
        assert time.monotonic() - began >= 1.0, "it waits first"
        for part in ("hostd", "4711", "esx-7", "sweep a", "2026-01-02 03:04:05"):
            assert part in raised.value.message
    assert client.image("one/a").ref.image_id == "a", "reading needs no lock"
    fcntl.flock(holder, fcntl.LOCK_UN)
    client.delete("one/a")


def test_an_outage_at_the_start_is_not_told_as_the_end_of_its_images(tmp_path: Path, stack: ExitStack) -> None:
    write_image(tmp_path / "here", "compound", "a")
    away = tmp_path / "away"
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"here={tmp_path / 'here'}", f"away={away}"))
    client = stack.enter_context(sidecar.client())
    watch = stack.enter_context(client.watch())
    first = next(watch)
    assert first.snapshot_complete
    assert list(first.incomplete_datastores) == ["away"]
    assert not first.resume_token, "who goes on from here would never hear what vanished"
    write_image(away, "compound", "b")
    again = next(answer for answer in watch if answer.snapshot_start)
    assert again.snapshot_complete and again.resume_token
    assert not again.incomplete_datastores
    assert [image.ref.datastore for image in again.images].count("away") == 1
    assert {store.name for store in again.datastores} == {"here", "away"}


def test_what_is_mounted_over_a_datastore_is_not_taken_for_it(tmp_path: Path, stack: ExitStack) -> None:
    root = tmp_path / "one"
    write_image(root, "compound", "a")
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root}"))
    client = stack.enter_context(sidecar.client())
    assert ids(client) == ["one/a"]
    run("mount", "-t", "tmpfs", "none", root)
    with ExitStack() as mounted:
        mounted.callback(run, "umount", root)
        store = client.datastore("one")
        assert not store.accessible and "another file system is mounted" in store.fault
        assert ids(client) == ["one/a"]
    assert client.datastore("one").accessible


@contextlib.contextmanager
def mounted_over(root: Path) -> Iterator[None]:
    run("mount", "-t", "tmpfs", "none", root)
    try:
        yield
    finally:
        run("umount", root)


@contextlib.contextmanager
def moved_away(root: Path) -> Iterator[None]:
    root.rename(root.with_name("elsewhere"))
    try:
        yield
    finally:
        root.with_name("elsewhere").rename(root)


@contextlib.contextmanager
def replaced(root: Path) -> Iterator[None]:
    with moved_away(root):
        root.mkdir()
        try:
            yield
        finally:
            root.rmdir()


def contents(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(root)): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in root.rglob("*")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [mounted_over, moved_away, replaced])
def test_what_is_done_to_a_hidden_datastore_is_not_lost_with_it(
    tmp_path: Path,
    stack: ExitStack,
    layout: str,
    hidden: Callable[[Path], contextlib.AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies and purges went into the directory that nobody sees, and were reported as done."""
    monkeypatch.setattr(client_calls, "ATTEMPTS", 1)  # or the sidecar would notice it between two of the calls
    root, here = tmp_path / "one", tmp_path / "here"
    for image_id in ("a", "deleted"):
        write_image(root, layout, image_id)
    write_image(here, layout, "a")
    sidecar = stack.enter_context(
        Sidecar(tmp_path / "run", f"one={root},layout={layout}", f"here={here},layout={layout}")
    )
    client = stack.enter_context(sidecar.client())
    assert len(ids(client)) == 3
    client.delete("one/deleted")
    open_before = client.create_staging("one/c")
    open_before.write_file("c.bin", [(0, b"x")])
    complete = client.create_staging("one/d")
    write_image_files(root / complete.directory, "d")
    (root / complete.directory / TIMESTAMP).unlink()
    changes: dict[str, Callable[[], object]] = {
        "touch": lambda: client.touch("one/a"),
        "update": lambda: client.update_metadata("one/a", files={"x": b"x"}),
        "delete": lambda: client.delete("one/a"),
        "force": lambda: client.delete("one/a", force=True),
        "restore": lambda: client.restore("one/deleted"),
        "purge": lambda: client.purge("one/deleted"),
        "copy inside": lambda: client.copy("one/a", "one/b").wait(),
        "copy to": lambda: client.copy("here/a", "one/b").wait(),
        "import": lambda: client.create_staging("one/b"),
        "commit": complete.commit,
    }
    others: dict[str, Callable[[], object]] = {
        "get": lambda: client.image("one/a"),
        "validate": lambda: client.validate("one/a"),
        "repair": lambda: client.validate("one/a", repair=True),
        "read": lambda: list(client.read_file("one/a", "a.vmdk")),
        "copy from": lambda: client.copy("one/a", "here/b").wait(),
        "write": lambda: open_before.write_file("c.bin", [(0, b"y")]),
        "clone": lambda: open_before.clone_range("here/a", "a.vmdk", 0, "c.bin", 0, 512),
        "clone a disk": lambda: list(open_before.clone_disk("here/a")),
    }
    before = contents(root)
    with hidden(root):
        found = {what: answers(call) for what, call in changes.items()}
        assert found == dict.fromkeys(changes, "DATASTORE_UNAVAILABLE"), "before the sidecar has noticed it"
        store = client.datastore("one")
        assert not store.accessible and "by itself" in store.fault
        calls = {**changes, **others}
        found = {what: answers(call) for what, call in calls.items()}
        assert found == dict.fromkeys(calls, "DATASTORE_UNAVAILABLE")
        with pytest.raises(errors.DatastoreUnavailable) as caught:
            client.image("one/a")
        assert store.fault in caught.value.message
        client.copy("here/a", "here/c").wait()
        assert "one/a" in ids(client), "the listing is what was known"
    assert contents(root).keys() == before.keys()
    with hidden(root):
        open_before.abort()
    wait_until(lambda: answers(lambda: client.image("one/a")) == "ok", "it goes on by itself", 15)
    assert not (root / open_before.directory).exists(), "an abort gives back what it holds all the same"
    complete.commit()
    client.purge("one/deleted")
    client.copy("one/a", "one/b").wait()
    assert {"one/a", "one/b", "one/d"} <= set(ids(client))


@pytest.mark.parametrize("when", ["before the lock", "while it is waited for"])
def test_a_lock_that_a_hidden_datastore_refuses_tidies_nothing_away_there(
    tmp_path: Path, stack: ExitStack, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "one"
    (root / "image_a").mkdir(parents=True)
    datastore = stack.enter_context(contextlib.closing(PosixDatastore("one", str(root))))
    store = ImageStore(datastore, IMAGE_LAYOUTS["vsan"])
    assert datastore.names("") == ["image_a"]
    lock, hidden = datastore.lock, contextlib.ExitStack()

    def late(path: str, operation: str, timeout: float, check: Callable[[], None]) -> HeldLock:
        held = lock(path, operation, timeout, check)
        hidden.enter_context(moved_away(root))
        return held

    if when == "before the lock":
        hidden.enter_context(moved_away(root))
    else:
        monkeypatch.setattr(datastore, "lock", late)
    with hidden, pytest.raises(errors.DatastoreUnavailable), store.lock("a", "test"):
        pass
    assert (root / "image_a").is_dir()


def test_a_datastore_that_hangs_is_told_to_be_away(tmp_path: Path) -> None:
    # Whatever asks it does not come back, so nothing but the time says so.
    now = [100.0]
    datastore = PosixDatastore("one", str(tmp_path))
    try:
        discovery = Discovery(ImageStore(datastore, IMAGE_LAYOUTS["compound"]), Catalog(), monotonic=lambda: now[0])
        assert discovery.check().fault == ""
        now[0] += 14
        assert discovery.status.fault == ""
        now[0] += 2
        assert "has not answered since" in discovery.status.fault
        discovery.check()
        assert discovery.status.fault == ""
    finally:
        datastore.close()
