"""Reap: what nobody makes any more goes, and what somebody makes stays, however old it is."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.datastores import posix
from sidecar.datastores.posix_files import remove_tree
from sidecar.errors import DatastoreUnavailable, OperationCancelled
from sidecar.images.deletion import purge_image
from sidecar.images.reaping import reap
from sidecar.images.staging import StagingDirectory
from sidecar.locks.interface import HeldLock
from tests.maintenance.conftest import DAY, Site
from tests.support.places import MARKER, TIMESTAMP, flat_files

HOURS = 3600.0


def staging(site: Site, name: str, age: float, image_id: str = "new") -> Path:
    """A staging directory as a dead process leaves it."""
    directory = site.store.layout.staging_place(image_id, name).directory
    path = site.place.root / directory
    path.mkdir(parents=True)
    (path / f"{image_id}-flat.vmdk").write_bytes(b"x" * 4096)
    site.set_age(path, age)
    return path


def test_an_abandoned_staging_directory_goes_when_it_is_older_than_the_grace_time(site: Site) -> None:
    old, young = staging(site, "old", 3 * HOURS), staging(site, "young", 1 * HOURS)
    reaped = reap(site.store, 2 * HOURS)
    assert not old.exists()
    assert young.exists()
    assert reaped.staging == [str(old.relative_to(site.place.root))]
    assert reaped.freed >= 4096
    assert len(reaped.kept) == 1
    assert reap(site.store, 0).staging == [str(young.relative_to(site.place.root))]
    site.place.assert_holds({})


def test_a_copy_that_runs_for_longer_than_the_grace_time_is_not_eaten(site: Site) -> None:
    # In the origin the lock of the temporary directory was documented, and never taken.
    with StagingDirectory(site.store, "new", "copy") as live:
        path = site.place.root / live.directory
        (path / "new-flat.vmdk").write_bytes(b"x")
        site.set_age(path, 10 * DAY)
        reaped = reap(site.store, 2 * HOURS)
        assert reaped.staging == []
        assert "for copy new" in reaped.kept[0]
        assert (path / "new-flat.vmdk").exists()
    site.place.assert_holds({})


def test_a_directory_that_is_written_to_without_a_lock_is_not_eaten(site: Site) -> None:
    """As an agent of the origin does that works on the same datastore."""
    path = staging(site, "origin", 10 * DAY)
    site.set_age(path / "new-flat.vmdk", HOURS)
    assert reap(site.store, 2 * HOURS).staging == []
    assert path.exists()


def test_a_copy_that_keeps_the_times_of_its_source_is_not_eaten(site: Site) -> None:
    """As `cp -a` and rsync do: every file in there may be years old by the time of its last write."""
    site.clock.seconds = time.time() + HOURS
    path = staging(site, "origin", 1000 * DAY)
    remains = site.place.directory("begun")
    remains.mkdir(parents=True)
    site.set_age(remains, 1000 * DAY)
    assert reap(site.store, 2 * HOURS).staging == []
    assert path.exists() and remains.exists()
    site.clock.seconds += 3 * HOURS
    reap(site.store, 2 * HOURS)
    site.place.assert_holds({})


def test_the_trash_goes_always_and_no_link_in_it_is_followed(make_site: Callable[[str], Site], tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    for name in ("one", "two"):
        site = make_site(name)
        trash = site.place.root / "deleted_images"
        (trash / "a" / "deep").mkdir(parents=True)
        (trash / "a" / "deep" / "a.vmdk").write_bytes(b"x" * 8192)
        (trash / "link").symlink_to(tmp_path / "precious")
        (trash / "file").touch()
        reaped = reap(site.store, DAY)
        assert len(reaped.trash) == 3
        assert reaped.freed >= 8192
        site.place.assert_holds({})
    assert (tmp_path / "precious" / "file").exists()


def test_images_vms_and_what_is_not_ours_are_left_alone(site: Site) -> None:
    site.plant("a", marked_ago=10 * DAY)
    site.place.root.joinpath("vm_1").mkdir()
    site.place.root.joinpath("tmp_image_file").touch()
    site.place.root.joinpath("notes.ec_lock").touch()
    site.set_age(site.place.root, 10 * DAY)
    before = site.place.contents()
    reaped = reap(site.store, 0)
    assert not reaped
    assert reaped.faults == []
    assert site.place.contents() == before


def test_lock_files_and_half_written_files_of_the_dead_go(site: Site) -> None:
    site.plant("a")
    site.place.file("a", "." + "0" * 32).touch()
    site.place.file("a", ".bashrc").touch()
    site.place.lock_file("a").touch()
    place = site.store.layout.staging_place("gone", "gone")
    lock = site.place.root / place.lock
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    site.set_age(site.place.root, DAY)
    reap(site.store, 2 * HOURS)
    site.place.assert_holds({"a": flat_files("a", ".bashrc")})


def test_who_begins_in_a_directory_that_is_being_reaped_keeps_it(
    make_site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layout vsan, in which the lock is in the directory: a reaper that removed it too would remove the next one's."""
    site = make_site("three")
    path = staging(site, "old", DAY)
    datastore, lock = site.store.datastore, site.store.layout.staging_place("new", "old").lock
    remove_directory = datastore.remove_directory

    def remove_once_another_one_has_it(directory: str) -> None:
        with datastore.lock(lock, "make", timeout=0):
            remove_directory(directory)

    monkeypatch.setattr(datastore, "remove_directory", remove_once_another_one_has_it)
    reap(site.store, 0)
    assert path.is_dir()
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("name", ["one", "two"])
def test_who_waits_for_the_lock_of_a_reaper_keeps_the_directory_that_he_makes(
    make_site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By coarse clocks, or those of two hosts, what was just made is older than the beginning of a reaping."""
    site = make_site(name)
    place, datastore = site.store.layout.staging_place("new", "begun"), site.store.datastore
    lock, directory = site.place.root / place.lock, site.place.root / place.directory
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    real = datastore.lock

    @contextlib.contextmanager
    def lock_for_the_next_one(path: str, operation: str, timeout: float) -> Iterator[HeldLock]:
        with real(path, operation, timeout) as held:
            yield held
        if path == place.lock:
            directory.mkdir()

    monkeypatch.setattr(datastore, "lock", lock_for_the_next_one)
    assert reap(site.store, 0).staging == []
    assert directory.is_dir()


def test_a_lock_that_is_held_stays_where_it_is(site: Site) -> None:
    site.plant("a")
    with site.place.locked("a"):
        site.set_age(site.place.root, DAY)
        reap(site.store, 0)
        assert site.place.lock_file("a").exists()


def test_remains_without_any_file_of_an_image_are_not_in_the_way_of_the_next_one(site: Site) -> None:
    directory = site.place.directory("a")
    directory.mkdir(parents=True)
    (directory / MARKER).write_text("1")
    site.set_age(directory, HOURS)
    reap(site.store, 2 * HOURS)
    assert directory.exists()  # somebody may be about to fill it
    site.set_age(directory, DAY)
    reap(site.store, 2 * HOURS)
    site.place.assert_holds({})


def test_an_image_without_descriptor_or_timestamp_is_not_reaped(site: Site) -> None:
    site.plant("a")
    site.place.file("a", TIMESTAMP).unlink()
    site.plant("b")
    for name in ("b.vmdk", "b-flat.vmdk"):
        site.place.file("b", name).unlink()
    site.set_age(site.place.root, 10 * DAY)
    before = site.place.contents()
    reap(site.store, 0)
    assert site.place.contents() == before


def test_what_cannot_be_freed_is_told_and_the_rest_is_freed(
    make_site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site("one")
    for name in ("a", "b"):
        (site.place.root / "deleted_images" / name).mkdir(parents=True)
    remove = remove_tree

    def fail(parent: int, name: str) -> int:
        if name == "a":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return remove(parent, name)

    monkeypatch.setattr(posix, "remove_tree", fail)
    reaped = reap(site.store, 0)
    assert reaped.trash == ["deleted_images/b"]
    assert len(reaped.faults) == 1
    assert "Input/output error" in reaped.faults[0]


def test_a_datastore_that_is_away_is_an_error_and_not_empty(site: Site) -> None:
    reap(site.store, 0)
    site.place.root.rename(site.place.root.with_name("away"))
    with pytest.raises(DatastoreUnavailable):
        reap(site.store, 0)


def test_a_reaping_ends_when_the_sidecar_does(site: Site) -> None:
    path = staging(site, "old", 3 * HOURS)

    def check() -> None:
        raise OperationCancelled("the sidecar is shutting down")

    with pytest.raises(OperationCancelled):
        reap(site.store, 0, check)
    assert path.exists()


def test_a_datastore_that_is_new_has_nothing_to_reap(site: Site) -> None:
    """The keeper may be there before the directories that all images share."""
    for path in site.place.root.iterdir():
        path.rmdir()
    reaped = reap(site.store, 0)
    assert not reaped and not reaped.faults


def test_a_discard_that_failed_takes_nothing_out_of_the_trash_that_a_reaper_has_begun_to_free(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image would be there again, without what the reaper of another host had removed by then."""
    site.plant("a")
    datastore, changed = site.store.datastore, list[str]()
    site.store.observe(changed.append)
    sync = datastore.sync_directory

    def fail(path: str) -> None:
        monkeypatch.setattr(datastore, "sync_directory", sync)
        for begun in (site.place.root / "deleted_images").rglob("a-flat.vmdk"):
            begun.unlink()
        raise DatastoreUnavailable(f"{path}: Input/output error")

    monkeypatch.setattr(datastore, "sync_directory", fail)
    with pytest.raises(DatastoreUnavailable):
        purge_image(site.store, "a", force=True)
    assert not site.place.file("a", TIMESTAMP).exists()
    assert changed == ["a"]
    if site.place.layout == "vsan":
        purge_image(site.store, "a", force=True)
    reap(site.store, 0)
    site.place.assert_holds({})


@pytest.mark.parametrize(
    ("name", "what"),
    # Layout vsan has no trash.
    [("one", "trash"), ("two", "trash"), ("one", "staging"), ("two", "staging"), ("three", "staging")],
)
def test_nothing_is_freed_on_a_datastore_that_is_hidden_while_it_is_reaped(
    make_site: Callable[[str], Site], name: str, what: str
) -> None:
    """It would come back with the file system that is mounted there for everybody else, or be missed with it."""
    site = make_site(name)
    if what == "staging":
        staging(site, "old", 3 * HOURS)
    else:
        (site.place.root / "deleted_images" / "a").mkdir()
    before = site.place.contents()
    root, hidden = site.place.root, site.place.root.with_name("hidden")

    def hide() -> None:
        if not hidden.exists():
            root.rename(hidden)

    with pytest.raises(DatastoreUnavailable):
        reap(site.store, 2 * HOURS, hide)
    hidden.rename(root)
    assert site.place.contents() == before
