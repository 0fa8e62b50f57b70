"""The descriptors of staged files, and what a failed write-back means."""

import errno
import os
from pathlib import Path

import pytest

from fusefs.contents import LocalContent, LocalPlace
from fusefs.processes import NOBODY
from fusefs.staged import StagedDirectory, State
from sidecar.client import ImageRef, SidecarClient
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
