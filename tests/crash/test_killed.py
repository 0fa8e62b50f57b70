"""A sidecar that is killed in the middle of a copy or an import, and the one that starts after it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.client import Part
from sidecar.datastores.posix import PosixDatastore
from tests.crash.stopping import held_back, stop_in_the_middle
from tests.crash.support import (
    LAYOUTS,
    answers,
    image_directory,
    staging_directories,
    write_image,
)
from tests.support.disks import MIB, allocated, assert_same_disk, import_image
from tests.support.processes import Sidecar, wait_until

SIZE = 384 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_killed_in_the_middle_leaves_no_image_and_the_next_copy_succeeds(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    root = tmp_path / "one"
    source = write_image(root, layout, "source", size=SIZE, dense=True)
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    with held_back(root, layout, "target"):
        copy = client.copy("one/source", "one/target")
        staging = stop_in_the_middle(sidecar, root, layout, "target")
        sidecar.kill()
    assert staging is not None
    with pytest.raises(errors.SidecarUnavailable):
        copy.wait()
    assert staging.is_dir()
    sidecar.start()
    assert answers(lambda: client.image("one/target")) == "IMAGE_NOT_FOUND"
    assert [image.ref.image_id for image in client.images("one")] == ["source"]
    client.copy("one/source", "one/target").wait()
    assert_same_disk(source.with_name("source.vmdk"), image_directory(root, layout, "target") / "target.vmdk")
    # The reaper may take what the dead one left: nobody holds its lock any more.
    assert staging.is_dir()
    lock = staging / "lock.ec_lock" if layout == "vsan" else staging.with_name(f"{staging.name}.ec_lock")
    datastore = PosixDatastore("one", str(root))
    datastore.lock(str(lock.relative_to(root)), "test", timeout=0).release()
    datastore.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_import_killed_in_the_middle_leaves_no_image_and_the_next_import_succeeds(
    tmp_path: Path, stack: ExitStack, layout: str, disk: Path
) -> None:
    root = tmp_path / "one"
    root.mkdir()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    staging = client.create_staging("one/target")

    def parts() -> Iterator[Part]:
        yield 0, os.urandom(1 * MIB)
        wait_until(lambda: any(allocated(place) for place in staging_directories(root)), "the first part is staged")
        sidecar.kill()
        yield 1 * MIB, os.urandom(1 * MIB)

    with pytest.raises(errors.SidecarUnavailable):
        staging.write_file("target-flat.vmdk", parts())
    assert len(staging_directories(root)) == 1
    sidecar.start()
    assert answers(staging.renew) == "STAGING_NOT_FOUND", "its maker learns that it has to start again"
    assert answers(lambda: client.image("one/target")) == "IMAGE_NOT_FOUND"
    import_image(client, "one/target", disk)
    assert_same_disk(disk, image_directory(root, layout, "target") / "target.vmdk")


def test_directories_that_vanished_are_made_again_and_are_no_defect(tmp_path: Path, stack: ExitStack) -> None:
    """Between the start and the first look at a new datastore, or when somebody cleaned up too much."""
    root = tmp_path / "one"
    root.mkdir()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout=sharded"))
    client = stack.enter_context(sidecar.client())
    assert list(client.images("one")) == []
    for name in ("images", "tmp_images", "deleted_images"):
        (root / name).rmdir()
    client.create_staging("one/a").abort()
