"""An image that somebody reads stays, and one that is taken away is not read half."""

import signal
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from sidecar import errors
from tests.crash.stopping import held_back, stop_in_the_middle
from tests.crash.support import LAYOUTS, answers, image_directory, remains, staging_directories, write_image
from tests.support.disks import MIB
from tests.support.processes import Sidecar, wait_until


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_purge_while_somebody_reads_is_refused_and_the_reader_gets_every_byte(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    root = tmp_path / "one"
    extent = write_image(root, layout, "a", size=32 * MIB, dense=True)  # more than a stream holds on its way
    content = extent.read_bytes()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    reading = client.read_file("one/a", "a-flat.vmdk")
    read = next(reading).data
    client.delete("one/a")
    for call in (partial(client.purge, "one/a"), partial(client.delete, "one/a", force=True)):
        with pytest.raises(errors.ImageInUse) as raised:
            call()
        assert str(sidecar.pid) in raised.value.message, "it says who"
    read += b"".join(part.data for part in reading)
    assert read == content
    wait_until(lambda: answers(partial(client.purge, "one/a")) == "ok", "it can be purged when the reader is done")
    assert remains(root) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_source_of_a_running_copy_is_not_purged(tmp_path: Path, stack: ExitStack, layout: str) -> None:
    root = tmp_path / "one"
    size = 384 * MIB
    write_image(root, layout, "source", size=size, dense=True)
    copying = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}", name="a"))
    other = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}", name="b"))
    client, second = stack.enter_context(copying.client()), stack.enter_context(other.client())
    go_on = stack.enter_context(ExitStack())
    go_on.enter_context(held_back(root, layout, "target"))
    copy = client.copy("one/source", "one/target")
    assert stop_in_the_middle(copying, root, layout, "target")
    stack.callback(copying.signal, signal.SIGCONT)
    with pytest.raises(errors.ImageInUse) as raised:
        second.delete("one/source", force=True)
    assert str(copying.pid) in raised.value.message
    second.delete("one/source")
    go_on.close()
    copying.signal(signal.SIGCONT)
    assert copy.wait().ref.image_id == "target", "a tombstone does not end what had begun"
    assert second.purge("one/source") >= size
    client.validate("one/target")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_whose_source_is_being_purged_ends_with_a_clean_error(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    root = tmp_path / "one"
    root.mkdir()
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    for _ in range(8):
        write_image(root, layout, "a", dense=True)
        copy = client.copy("one/a", "one/b")
        purged = answers(partial(client.delete, "one/a", force=True))
        copied = answers(copy.wait)
        assert purged in ("ok", "IMAGE_IN_USE")
        assert copied in ("ok", "IMAGE_NOT_FOUND", "IMAGE_INCOMPLETE", "IMAGE_IN_USE")
        assert purged == "ok" or copied == "ok", "not both may lose"
        for ref in ("one/a", "one/b"):
            answers(partial(client.delete, ref, force=True))
        assert remains(root) == []
    assert "Traceback" not in sidecar.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_that_its_client_cancels_leaves_nothing_a_second_later(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    root = tmp_path / "one"
    size = 384 * MIB
    write_image(root, layout, "source", size=size, dense=True)
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}"))
    client = stack.enter_context(sidecar.client())
    # The lock is held until the copy has to be gone: this is also the cancelling of a copy that waits for it.
    with held_back(root, layout, "target"):
        copy = client.copy("one/source", "one/target")
        assert stop_in_the_middle(sidecar, root, layout, "target")
        copy.cancel()
        sidecar.signal(signal.SIGCONT)
        began = time.monotonic()
        wait_until(lambda: not staging_directories(root), "nothing is staged any more")
        took = time.monotonic() - began
    with suppress(FileNotFoundError):
        image_directory(root, layout, "target").rmdir()  # layout vsan: for the lock
    assert took < 5, f"it took {took:.1f} s; a second where the disk is not busy"
    assert answers(copy.wait) == "CANCELLED"
    assert answers(partial(client.image, "one/target")) == "IMAGE_NOT_FOUND"
    wait_until(lambda: remains(root, "source") == [], "the lock of what was staged is gone")
