"""SIGTERM while something runs: it ends within the limit or is cancelled, and nothing half made is left."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecar import errors
from sidecar.client import CopyCall, Part, SidecarClient
from tests.crash.support import LAYOUTS, answers, image_directory, remains, staging_directories, write_image
from tests.support.disks import MIB
from tests.support.processes import Sidecar, wait_until

BOUNDED = 15.0  # seconds; far more than a shutdown takes, far less than a hang


class Copying:
    """A copy whose end is waited for in a thread."""

    def __init__(self, call: CopyCall) -> None:
        self.answer = ""
        self._thread = threading.Thread(target=self._wait, args=(call,))
        self._thread.start()

    def _wait(self, call: CopyCall) -> None:
        self.answer = answers(call.wait)

    def join(self) -> str:
        self._thread.join(BOUNDED)
        assert not self._thread.is_alive(), "the stream of a copy ends with the sidecar"
        return self.answer


def start(tmp_path: Path, stack: ExitStack, layout: str, **limits: float) -> tuple[Sidecar, SidecarClient, Path]:
    root = tmp_path / "one"
    root.mkdir(exist_ok=True)
    config = "[limits]\n" + "".join(f"{key} = {value}\n" for key, value in limits.items())
    sidecar = stack.enter_context(Sidecar(tmp_path / "run", f"one={root},layout={layout}", config=config))
    return sidecar, stack.enter_context(sidecar.client()), root


def assert_gone(sidecar: Sidecar) -> None:
    socket = Path(sidecar.address.removeprefix("unix:"))
    assert not socket.exists()
    assert not socket.with_name(f"{socket.name}.new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_is_cancelled_when_the_limit_is_over_and_leaves_nothing(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    write_image(tmp_path / "one", layout, "source", size=384 * MIB, dense=True)
    sidecar, client, root = start(tmp_path, stack, layout, shutdown_seconds=0)
    directory = image_directory(root, layout, "target")
    copying = Copying(client.copy("one/source", "one/target"))
    wait_until(lambda: bool(staging_directories(root)), "the copy has begun")
    assert sidecar.stop(BOUNDED) == 0
    assert copying.join() in ("CANCELLED", "SIDECAR_UNAVAILABLE")
    # On a fast machine it may have been past its last look at the limit.
    assert remains(root, "source", "target") == []
    assert (directory / "image_timestamp.txt").exists() == directory.exists()
    assert_gone(sidecar)


@pytest.mark.slow
def test_a_copy_that_ends_within_the_limit_is_published(tmp_path: Path, stack: ExitStack) -> None:
    write_image(tmp_path / "one", "compound", "source", size=192 * MIB, dense=True)
    sidecar, client, root = start(tmp_path, stack, "compound", shutdown_seconds=60)
    copying = Copying(client.copy("one/source", "one/target"))
    wait_until(lambda: bool(staging_directories(root)), "the copy has begun")
    assert sidecar.stop(60) == 0
    assert copying.join() == "ok"
    assert remains(root, "source", "target") == []
    assert_gone(sidecar)


@pytest.mark.slow
def test_a_second_sigterm_cancels_at_once(tmp_path: Path, stack: ExitStack) -> None:
    write_image(tmp_path / "one", "compound", "source", size=384 * MIB, dense=True)
    sidecar, client, root = start(tmp_path, stack, "compound", shutdown_seconds=3600)
    copying = Copying(client.copy("one/source", "one/target"))
    wait_until(lambda: bool(staging_directories(root)), "the copy has begun")
    sidecar.signal(signal.SIGTERM)
    wait_until(lambda: "stopping signal=SIGTERM" in sidecar.log.read_text(), "the first one was seen")
    assert sidecar.process is not None and sidecar.process.poll() is None
    assert sidecar.stop(BOUNDED) == 0
    assert copying.join() in ("CANCELLED", "SIDECAR_UNAVAILABLE")
    assert remains(root, "source") == []
    assert_gone(sidecar)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_import_that_is_open_at_sigterm_leaves_nothing(tmp_path: Path, stack: ExitStack, layout: str) -> None:
    sidecar, client, root = start(tmp_path, stack, layout, shutdown_seconds=0)
    staging = client.create_staging("one/target")
    staging.write_file("target-flat.vmdk", [(0, bytes(MIB))])
    assert len(staging_directories(root)) == 1
    assert sidecar.stop(BOUNDED) == 0
    assert remains(root) == []
    assert_gone(sidecar)


def test_a_write_that_stalls_does_not_keep_the_sidecar(tmp_path: Path, stack: ExitStack) -> None:
    sidecar, client, root = start(tmp_path, stack, "compound", shutdown_seconds=0)
    staging = client.create_staging("one/target")
    written, go_on = threading.Event(), threading.Event()
    stack.callback(go_on.set)

    def parts() -> Iterator[Part]:
        yield 0, bytes(MIB)
        written.set()
        go_on.wait(BOUNDED)

    answer: list[str] = []
    writer = threading.Thread(target=lambda: answer.append(answers(lambda: staging.write_file("a-flat.vmdk", parts()))))
    writer.start()
    assert written.wait(BOUNDED)
    assert sidecar.stop(BOUNDED) == 0
    go_on.set()
    writer.join(BOUNDED)
    assert answer and answer[0] in ("CANCELLED", "SIDECAR_UNAVAILABLE")
    assert remains(root) == []


def test_watches_end_at_once_and_do_not_use_up_the_limit(tmp_path: Path, stack: ExitStack) -> None:
    sidecar, client, _ = start(tmp_path, stack, "compound", shutdown_seconds=3600)
    watch = client.watch()
    assert next(watch).snapshot_start
    began = time.monotonic()
    assert sidecar.stop(BOUNDED) == 0
    assert time.monotonic() - began < 4, "a watch that waits for news looks up at once"
    with pytest.raises(errors.SidecarUnavailable):
        next(watch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_that_waits_for_a_lock_does_not_keep_the_sidecar_and_leaves_nothing(
    tmp_path: Path, stack: ExitStack, layout: str
) -> None:
    """The lock is another process's, which hangs: neither may a shutdown hang with it, nor what is staged stay."""
    write_image(tmp_path / "one", layout, "source")
    directory = image_directory(tmp_path / "one", layout, "target")
    directory.parent.mkdir(exist_ok=True)
    lock = directory / "lock.ec_lock" if layout == "vsan" else directory.with_name("image_target.ec_lock")
    if layout == "sharded":
        lock = directory.with_name("target.ec_lock")
    lock.parent.mkdir(exist_ok=True)
    holder = os.open(lock, os.O_RDWR | os.O_CREAT)
    stack.callback(os.close, holder)
    fcntl.flock(holder, fcntl.LOCK_EX)
    sidecar, client, root = start(tmp_path, stack, layout, shutdown_seconds=0, lock_timeout_seconds=3600)
    copying = Copying(client.copy("one/source", "one/target"))
    wait_until(lambda: bool([*root.glob("**/tmp_*/**/image_timestamp.txt")]), "it wants the lock")
    assert sidecar.stop(BOUNDED * 2) == 0
    assert copying.join() in ("CANCELLED", "SIDECAR_UNAVAILABLE")
    assert staging_directories(root) == []
    assert not list(root.rglob("tmp_*.ec_lock"))
    assert_gone(sidecar)
