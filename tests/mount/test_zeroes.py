"""Disks of which a part is zeroes that take space: copiers leave these out, and the copy is whole all the same."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import pytest

from fusefs.contents import LocalPlace
from fusefs.processes import NOBODY
from fusefs.provenance import Generation, SourceFile
from fusefs.reading import LocalReader, Reader
from fusefs.rules import Rules
from fusefs.staged import StagedDirectory, StagedFile
from fusefs.tree import Tree
from sidecar.client import ImageRef, Staging
from tests.crash.support import image_directory, write_image
from tests.mount.harness import names, published_as
from tests.support.disks import MIB, allocated, make_disk
from tests.support.processes import Mount, Sidecar, imagectl, loop_mount, run, wait_until

DATA_THEN_ZEROES = (b"d" * MIB) + bytes(3 * MIB)


@pytest.fixture
def mount(tmp_path: Path, stack: ExitStack) -> Mount:
    """With the image `one/a`: at every 16 MiB of its disk, 1 MiB of data and 3 MiB of zeroes; else holes."""
    with write_image(tmp_path / "one", "compound", "a", size=64 * MIB).open("r+b") as file:
        for offset in range(0, 64 * MIB, 16 * MIB):
            os.pwrite(file.fileno(), DATA_THEN_ZEROES, offset)
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={tmp_path / 'one'}"))
    return stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))


def test_a_copy_without_the_zeroes_of_its_source_is_whole(mount: Mount, tmp_path: Path) -> None:
    """GNU cp makes holes of them; the image was never published, and cp had said that all is well."""
    run("cp", "-r", mount.path / "one" / "a", mount.path / "one" / "b")
    assert "b" in names(mount.path / "one")
    assert published_as(mount, "one/b") == "one/a"
    original, copied = (image_directory(tmp_path / "one", "compound", name) for name in "ab")
    run("cmp", original / "a-flat.vmdk", copied / "b-flat.vmdk")
    assert allocated(copied / "b-flat.vmdk") < 5 * MIB


def test_a_copy_that_lacks_a_byte_among_the_zeroes_is_not_whole(mount: Mount) -> None:
    source, target = mount.path / "one" / "a", mount.path / "one" / "b"
    target.mkdir()
    with (source / "a-flat.vmdk").open("rb") as reading, (target / "a-flat.vmdk").open("wb", buffering=0) as writing:
        for offset in range(0, 48 * MIB, 16 * MIB):  # and not the last one
            os.pwrite(writing.fileno(), os.pread(reading.fileno(), MIB, offset), offset)
        writing.truncate(64 * MIB)
    run("cp", source / "a.vmdk", target)
    wait_until(lambda: "not published yet image=one/b" in mount.log.read_text(), "the publisher has looked at it")
    assert names(mount.path / "one") == {"a"}


class Ticks:
    """A clock on which every look takes a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._now = 0.0

    def __call__(self) -> float:
        self._now += self._seconds
        return self._now


@contextmanager
def half_looked_at(tmp_path: Path, ticks: Ticks) -> Iterator[tuple[Rules, StagedDirectory, StagedFile, SourceFile]]:
    """A staged disk that lacks 8 MiB of its source: what these are, nobody has looked at yet."""
    path = tmp_path / "source"
    path.write_bytes(b"d" * MIB + bytes(8 * MIB))
    status = path.stat()
    generation = Generation(status.st_ino, status.st_mtime_ns, status.st_size)
    source = SourceFile("one", "a", "a.vmdk", generation)

    def open_source(_: SourceFile) -> Reader:
        return LocalReader(str(path), generation)

    place = tmp_path / "staging"
    place.mkdir()
    directory = StagedDirectory(
        ImageRef(datastore="one", image_id="b"),
        cast(Staging, None),  # nothing is published here
        LocalPlace(str(place), lambda fd: 1 << 40),
        number=1,
        maker=NOBODY,
        clock=lambda: 0.0,
    )
    file = directory.create("a.vmdk")
    try:
        file.content.write(memoryview(b"d" * MIB), 0)
        file.content.truncate(status.st_size)
        file.provenance.learn(source, lambda: [(0, status.st_size)])
        file.provenance.wrote(0, MIB, source)
        yield Rules(Tree(), open_source, ticks), directory, file, source
    finally:
        file.content.close()
        directory.place.close()


def test_looking_for_zeroes_takes_a_bounded_time_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """A request of the kernel that read 100 GiB of zeroes would hold up cp's close for minutes."""
    with half_looked_at(tmp_path, Ticks(0.2)) as (rules, directory, _, _):
        answers: list[bool] = []
        while (held := rules.held_back(directory)) is not None and len(answers) < 20:
            answers.append(held.undecided)
        assert held is None
        assert 2 <= len(answers) < 8
        assert all(answers)


def test_zeroes_that_were_written_over_meanwhile_are_not_taken_for_the_sources(tmp_path: Path) -> None:
    with half_looked_at(tmp_path, Ticks(0.2)) as (rules, directory, file, source):
        held = rules.held_back(directory)
        assert held is not None
        assert held.undecided
        with file.lock:
            file.provenance.wrote(1 * MIB, MIB)
            file.provenance.wrote(8 * MIB, MIB)
        while (held := rules.held_back(directory)) is not None and held.undecided:
            pass
        assert held is None  # complete: with other bytes
        assert not file.provenance.is_copy(source)


@pytest.fixture
def xfs(tmp_path: Path, stack: ExitStack) -> Path:
    return stack.enter_context(loop_mount(tmp_path / "xfs", 400 * MIB, ("mkfs.xfs", "-q", "-m", "reflink=1")))


@pytest.mark.parametrize("way", ("cp", "imagectl"))
def test_an_import_takes_no_space_for_its_holes(way: str, xfs: Path, tmp_path: Path, stack: ExitStack) -> None:
    """XFS allocates beyond the end of a file that grows, as much again as it has; in a gap that stayed."""
    parts = tuple((offset, 3 * MIB) for offset in range(0, 256 * MIB, 32 * MIB))
    outside = make_disk(tmp_path / "new", "new.vmdk", size=256 * MIB, data=parts)
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={xfs}"))
    image = image_directory(xfs, "compound", "new") / "new-flat.vmdk"
    if way == "cp":
        mount = stack.enter_context(Mount(tmp_path / "mnt", sidecar.address))
        run("cp", "-r", outside.parent, mount.path / "one")
        run("sync", mount.path / "one" / "new")
    else:
        imagectl(sidecar.address, "import", outside, "one/new")
    assert allocated(image) == len(parts) * 3 * MIB
