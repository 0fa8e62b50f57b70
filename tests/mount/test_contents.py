"""The descriptors of staged files, and what a failed write-back means."""

import errno
import os
import threading
from pathlib import Path
from typing import cast

import pytest

from fusefs.contents import LocalContent, LocalPlace, RemotePlace
from fusefs.processes import NOBODY
from fusefs.pulse import Pulse
from fusefs.staged import StagedDirectory, StagedFile, State
from sidecar.client import ImageRef, SidecarClient, Staging
from sidecar.errors import InvalidRequest
from tests.support.processes import Mount, run


def test_a_descriptor_is_closed_once_and_never_anothers(tmp_path: Path) -> None:
    """Whoever opens something next has its number."""
    place = LocalPlace(str(tmp_path), lambda fd: 1 << 40)
    content = place.create("a")
    content.close()
    place.close()
    others = [os.open(tmp_path / "a", os.O_RDONLY) for _ in range(4)]
    content.close()
    place.close()
    for fd in others:
        os.fstat(fd)
        os.close(fd)
    with pytest.raises(OSError) as caught:
        content.status()
    assert caught.value.errno == errno.EBADF


def test_what_could_not_be_written_back_is_not_published_by_a_second_try(
    client: SidecarClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells once: the next fsync succeeds, and the bytes are lost."""
    with client.create_staging("one/new") as staging:
        place = LocalPlace(str(tmp_path / "one" / staging.directory), lambda fd: 1 << 40)
        directory = StagedDirectory(ImageRef(datastore="one", image_id="new"), staging, place, 1, NOBODY, lambda: 0.0)
        file = directory.create("new.vmdk")
        failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

        def sync(content: LocalContent) -> None:
            if failures:
                raise failures.pop()

        monkeypatch.setattr(LocalContent, "sync", sync)
        with pytest.raises(OSError, match="Input/output error"):
            directory.sync(file)
        directory.sync(file)
        assert "Input/output error" in file.given_up
        directory.end(State.GONE)


class Watched(LocalPlace):
    """Starts a thread in the middle of each change of a name, which wants to write by the name of that file."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), lambda fd: 1 << 40)
        self.file: StagedFile | None = None
        self.seen: list[tuple[str, bool]] = []
        self.threads: list[threading.Thread] = []

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        self._want_to_write()

    def remove(self, name: str) -> None:
        super().remove(name)
        self._want_to_write()

    def _want_to_write(self) -> None:
        self.threads.append(threading.Thread(target=self._look))
        self.threads[-1].start()

    def _look(self) -> None:
        assert self.file is not None
        with self.file.lock:
            self.seen.append((self.file.name, self.file.removed))


def test_what_the_sidecar_writes_by_a_files_name_waits_for_a_new_one(tmp_path: Path) -> None:
    """By the old one it would make another file, and the file would lack what was written."""
    place = Watched(tmp_path)
    ref = ImageRef(datastore="one", image_id="new")
    directory = StagedDirectory(ref, cast(Staging, None), place, number=1, maker=NOBODY, clock=lambda: 0.0)
    place.file = directory.create("old")
    directory.rename("old", "new", 0)
    place.threads[0].join(20)
    directory.remove("new")
    place.threads[1].join(20)
    assert place.seen == [("new", False), ("new", True)]
    directory.released(place.file, writable=True)
    place.close()


def test_a_staged_file_of_another_host_is_renamed_and_removed_there(client: SidecarClient, tmp_path: Path) -> None:
    with client.create_staging("one/new") as staging:
        place = RemotePlace(client, Pulse(client), staging)
        directory = StagedDirectory(ImageRef(datastore="one", image_id="new"), staging, place, 1, NOBODY, lambda: 0.0)
        there = tmp_path / "one" / staging.directory
        first, second = directory.create("first"), directory.create("second")
        first.content.write(memoryview(b"first"), 0)
        directory.rename("first", "second", 0)
        first.content.write(memoryview(b" and more"), 5)
        assert first.content.read(100, 0) == b"first and more"
        assert {path.name: path.read_bytes() for path in there.iterdir()} == {"second": b"first and more"}
        with pytest.raises(OSError, match="removed where it is staged"):
            second.content.write(memoryview(b"second"), 0)
        directory.remove("second")
        assert list(there.iterdir()) == []
        with pytest.raises(OSError, match="removed where it is staged"):
            first.content.truncate(0)
        assert directory.spoiled == ""


def test_a_name_that_is_refused_on_another_host_spoils_nothing_and_one_without_an_answer_does(
    client: SidecarClient,
) -> None:
    with client.create_staging("one/new") as staging:
        place = RemotePlace(client, Pulse(client), staging)
        directory = StagedDirectory(ImageRef(datastore="one", image_id="new"), staging, place, 1, NOBODY, lambda: 0.0)
        directory.create("file")
        with pytest.raises(InvalidRequest):
            directory.rename("file", "x" * 300, 0)
        directory.rename("file", "other", 0)
        staging.remove_file("other")  # by somebody else, or by a request whose answer was lost
        with pytest.raises(OSError, match="has no file 'other'"):
            directory.rename("other", "file", 0)
        assert "nobody knows what its files are called" in directory.spoiled


def test_what_the_sidecar_has_dropped_can_be_removed_here(client: SidecarClient) -> None:
    """As after a publish that failed on the way: rm -r finds nothing to do, and is not told Stale file handle."""
    with client.create_staging("one/new") as staging:
        place = RemotePlace(client, Pulse(client), staging)
        directory = StagedDirectory(ImageRef(datastore="one", image_id="new"), staging, place, 1, NOBODY, lambda: 0.0)
        directory.create("file")
        staging.abort()
        directory.remove("file")
        assert directory.files == []


def test_a_listing_that_was_opened_before_the_publish_shows_no_other_files_size(mount: Mount, disk: Path) -> None:
    target = mount.path / "one" / "new"
    run("cp", "-r", disk.parent, target)
    size = (disk.parent / "disk-flat.vmdk").stat().st_size
    directory = os.open(target, os.O_RDONLY)
    try:
        run("sync", target)
        for number in range(6):  # they take the numbers that the published files had in the daemon
            (mount.path / "two" / f"other{number}").mkdir()
            (mount.path / "two" / f"other{number}" / "x").write_text("x" * 222)
        os.listdir(directory)
    finally:
        os.close(directory)
    assert (target / "new-flat.vmdk").stat().st_size == size
    assert len((target / "new-flat.vmdk").read_bytes()) == size
