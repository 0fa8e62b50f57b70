"""Ctrl-C: what was to be made is not made, the sidecar gives up what it did, and that is said."""

import gzip
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ctl.conftest import Imagectl
from tests.support.disks import make_disk
from tests.support.processes import Sidecar, wait_until

MIB = 1 << 20
LARGE = 768 * MIB


@pytest.fixture
def large_disk(tmp_path: Path) -> Path:
    """Data that takes a while to copy."""
    descriptor = make_disk(tmp_path / "large", size=LARGE, data=())
    block = os.urandom(MIB)
    with descriptor.with_name("disk-flat.vmdk").open("r+b") as file:
        for _ in range(LARGE // MIB):
            file.write(block)
    return descriptor


@pytest.fixture
def slow_disk(tmp_path: Path) -> Path:
    """64 GiB of zeroes, gzipped: half a minute and more to unpack."""
    descriptor = make_disk(tmp_path / "slow", size=64 << 30, data=())
    descriptor.with_name("disk-flat.vmdk").unlink()
    descriptor.with_name("disk-flat.vmdk.gz").write_bytes(gzip.compress(bytes(64 * MIB)) * 1024)
    return descriptor


@pytest.fixture
def stopped(sidecar: Sidecar) -> Iterator[None]:
    """Whatever happens: a sidecar that is held up goes on, so that it can be ended."""
    yield
    sidecar.signal(signal.SIGCONT)


def staged(root: Path) -> list[Path]:
    return [*root.glob("tmp_image_*"), *root.glob("tmp_images/*"), *root.glob("image_*/tmp_image_*")]


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    output, message = process.communicate(timeout=30)
    return process.returncode, output, message


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("datastore", ["one", "two", "three"])
def test_an_interrupted_copy_is_cancelled_at_the_sidecar(
    datastore: str, imagectl: Imagectl, sidecar: Sidecar, large_disk: Path, tmp_path: Path
) -> None:
    imagectl("import", large_disk, "one/large")
    process = imagectl.start("cp", "one/large", f"{datastore}/b")
    wait_until(lambda: bool(staged(tmp_path / datastore)), "the copy runs")
    # Held up, so that the copy cannot be faster than the signal.
    sidecar.signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    sidecar.signal(signal.SIGCONT)
    code, output, message = ended(process)
    assert (code, output) == (130, "")
    assert message == f"imagectl: cancelled: nothing was made at {datastore}/b\n"
    wait_until(lambda: not staged(tmp_path / datastore), "the sidecar dropped what it had")
    assert [image["image"] for image in imagectl.json("ls", "--all")] == ["one/large"]


# A known defect, seen in about one of thirty runs on a busy machine: the exception that a signal raises is swallowed
# in a finaliser of gRPC, and the command goes on. To be mended in imagectl; until then it must not hide other failures.
signal_may_be_lost = pytest.mark.xfail(strict=False, reason="a signal in the middle of a stream may be swallowed")


@signal_may_be_lost
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGINT, 130, "imagectl: cancelled: nothing was made at one/a\n"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGHUP, 129, ""),
    ],
)
def test_an_interrupted_import_leaves_nothing(
    number: signal.Signals, code: int, told: str, imagectl: Imagectl, slow_disk: Path, tmp_path: Path
) -> None:
    process = imagectl.start("import", slow_disk, "one/a")
    wait_until(lambda: bool(staged(tmp_path / "one")), "the import runs")
    process.send_signal(number)
    assert ended(process) == (code, "", told)
    assert staged(tmp_path / "one") == []
    assert imagectl.json("ls", "--all") == []


def test_an_import_whose_sidecar_dies_says_so(
    imagectl: Imagectl, sidecar: Sidecar, slow_disk: Path, tmp_path: Path
) -> None:
    process = imagectl.start("import", slow_disk, "one/a")
    wait_until(lambda: bool(staged(tmp_path / "one")), "the import runs")
    sidecar.kill()
    code, output, message = ended(process)
    assert (code, output) == (6, "")
    assert sidecar.address in message


@signal_may_be_lost
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(
    number: signal.Signals, imagectl: Imagectl, large_disk: Path, tmp_path: Path
) -> None:
    imagectl("import", large_disk, "one/large")
    before = set(tmp_path.iterdir())
    process = imagectl.start("export", "one/large", tmp_path / "out")
    wait_until(lambda: bool(list(tmp_path.glob(".out.partial-*/*flat*"))), "the export runs")
    process.send_signal(number)
    code, output, message = ended(process)
    assert (code, output) == (128 + number, "")
    assert "Traceback" not in message
    assert set(tmp_path.iterdir()) == before


def test_a_bar_is_shown_where_somebody_watches_and_nowhere_else(
    imagectl: Imagectl, large_disk: Path, tmp_path: Path
) -> None:
    assert "━" in imagectl.on_terminal("import", large_disk, "one/a")
    assert "━" in imagectl.on_terminal("cp", "one/a", "two/b")
    assert "━" in imagectl.on_terminal("export", "one/a", tmp_path / "out")
    # The last line is the result, whole.
    assert "one/a copied to two/c: 768 MiB" in imagectl.on_terminal("cp", "one/a", "two/c").splitlines()[-1]
    assert imagectl.result("cp", "one/a", "two/d").stderr == ""
