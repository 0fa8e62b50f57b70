"""Ctrl-C: what was to be made is not made, the sidecar gives up what it did, and that is said.

Each command is held up in its middle by something real, so that the signal always comes there: a copy by another
holder of its destination's lock, an import by zeroes without end, an export by a relay that keeps the data.
"""

import fcntl
import gzip
import os
import shlex
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from protos.images.v1.datastore_service_pb2 import ListDatastoresResponse
from sidecar.ctl import signals
from sidecar.ctl.signals import Signals
from tests.ctl.conftest import Imagectl
from tests.ctl.relay import Relay, holding_back
from tests.support.disks import make_disk
from tests.support.places import LAYOUTS, Place
from tests.support.processes import Sidecar, wait_until

MIB = 1 << 20
HELD_BYTES = MIB // 2
# Enough of HTTP/2 for a call to be made, and too little for its answer.
GREETING_BYTES = 64
# What HTTP/2 has around an answer that gets through, and less than the whole of the next one.
ENVELOPE_BYTES = 190
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
MakeImage = Callable[[str], Path]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(imagectl: Imagectl, stack: ExitStack) -> Start:
    """Starts imagectl; it is gone at the end of the test, whatever happened."""

    def begin(*arguments: str | Path, address: str = "") -> "subprocess.Popen[str]":
        process = (Imagectl(address) if address else imagectl).start(*arguments)
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        return process

    return begin


@pytest.fixture(scope="session")
def zeroes() -> bytes:
    """16 GiB, gzipped: seconds to unpack."""
    return gzip.compress(bytes(64 * MIB)) * 256


@pytest.fixture
def slow_disk(tmp_path: Path, zeroes: bytes) -> Path:
    descriptor = make_disk(tmp_path / "slow", size=16 << 30, data=())
    descriptor.with_name("disk-flat.vmdk").unlink()
    descriptor.with_name("disk-flat.vmdk.gz").write_bytes(zeroes)
    return descriptor


@pytest.fixture
def relay(sidecar: Sidecar, tmp_path: Path) -> Iterator[Relay]:
    with holding_back(tmp_path / "relay.sock", sidecar.address, HELD_BYTES) as relay:
        yield relay


def place(name: str, tmp_path: Path) -> Place:
    return Place(name, LAYOUTS[name], tmp_path / name)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    output, message = process.communicate(timeout=30)
    return process.returncode, output, message


# --- what was begun is taken back ---


@pytest.mark.parametrize("datastore", ["one", "two", "three"])
def test_an_interrupted_copy_is_cancelled_at_the_sidecar(
    datastore: str, start: Start, imagectl: Imagectl, make_image: MakeImage, tmp_path: Path
) -> None:
    make_image("one/a")
    destination = place(datastore, tmp_path)
    with destination.locked("b"):
        process = start("cp", "one/a", f"{datastore}/b")
        wait_until(lambda: bool(destination.complete_staging_directories()), "the copy waits for the lock")
        process.send_signal(signal.SIGINT)
        told = f"imagectl: cancelled: nothing was made at {datastore}/b\n"
        assert ended(process) == (130, "", told)
        wait_until(lambda: not destination.staging_directories(), "the sidecar dropped what it had")
    assert [image["image"] for image in imagectl.json("ls", "--all")] == ["one/a"]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_an_interrupted_import_leaves_nothing(
    number: signal.Signals, code: int, start: Start, imagectl: Imagectl, slow_disk: Path, tmp_path: Path
) -> None:
    destination = place("one", tmp_path)
    process = start("import", slow_disk, "one/a")
    wait_until(lambda: bool(destination.staging_directories()), "the import runs")
    process.send_signal(number)
    assert ended(process) == (code, "", "imagectl: cancelled: nothing was made at one/a\n")
    assert destination.staging_directories() == []
    assert imagectl.json("ls", "--all") == []


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_an_interrupted_export_leaves_nothing(
    number: signal.Signals, code: int, start: Start, make_image: MakeImage, relay: Relay, tmp_path: Path
) -> None:
    make_image("one/a")
    before = set(tmp_path.iterdir())
    process = start("export", "one/a", tmp_path / "out", address=relay.address)
    wait_until(relay.holding.is_set, "the export waits for data")
    assert list(tmp_path.glob(".out.partial-*/a-flat.vmdk"))
    process.send_signal(number)
    assert ended(process) == (code, "", f"imagectl: cancelled: {tmp_path}/out was not made\n")
    assert set(tmp_path.iterdir()) == before


def test_a_staging_directory_whose_name_is_still_on_its_way_is_dropped_too(
    start: Start, slow_disk: Path, sidecar: Sidecar, tmp_path: Path
) -> None:
    destination = place("one", tmp_path)
    with sidecar.client() as client:
        # It is asked for before anything is made, and its answer is let through.
        listed = ListDatastoresResponse(datastores=client.datastores()).ByteSize()
    with holding_back(tmp_path / "relay.sock", sidecar.address, GREETING_BYTES + ENVELOPE_BYTES + listed) as relay:
        process = start("import", slow_disk, "one/a", address=relay.address)
        wait_until(lambda: bool(destination.staging_directories()), "the sidecar made it")
        process.send_signal(signal.SIGINT)
        relay.release()
        assert ended(process) == (130, "", "imagectl: cancelled: nothing was made at one/a\n")
    assert destination.staging_directories() == []


def test_an_import_that_is_being_published_is_not_called_cancelled(
    start: Start, make_image: MakeImage, imagectl: Imagectl, disk: Path, tmp_path: Path
) -> None:
    destination = place("one", tmp_path)
    with destination.locked("a"):
        process = start("import", disk, "one/a")
        wait_until(lambda: bool(destination.complete_staging_directories()), "it waits for the lock")
        process.send_signal(signal.SIGINT)
        code, output, message = ended(process)
    assert (code, output) == (130, "")
    assert "may appear yet" in message


def test_impatience_changes_nothing(start: Start, slow_disk: Path, tmp_path: Path) -> None:
    destination = place("one", tmp_path)
    process = start("import", slow_disk, "one/a")
    wait_until(lambda: bool(destination.staging_directories()), "the import runs")
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    code, output, message = ended(process)
    assert code in (130, 143)  # two that are pending at once have no order
    assert (output, message) == ("", "imagectl: cancelled: nothing was made at one/a\n")
    assert destination.staging_directories() == []


@pytest.mark.slow
def test_a_sidecar_that_hangs_does_not_keep_whoever_was_interrupted(
    start: Start, slow_disk: Path, sidecar: Sidecar, tmp_path: Path, stack: ExitStack
) -> None:
    process = start("import", slow_disk, "one/a")
    wait_until(lambda: bool(list((tmp_path / "one").glob("tmp_image_*/*-flat.vmdk"))), "data is on its way")
    stack.callback(sidecar.signal, signal.SIGCONT)
    sidecar.stop_now()
    process.send_signal(signal.SIGINT)
    code, output, message = ended(process)
    assert (code, output) == (130, "")
    assert "staging not aborted" in message
    assert "whether one/a was made before that is not known" in message


# --- where there is nothing to take back ---


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_a_command_that_waits_for_a_file(
    number: signal.Signals, code: int, start: Start, disk: Path, tmp_path: Path, stack: ExitStack
) -> None:
    os.mkfifo(tmp_path / "meta")
    process = start("import", disk, "one/a", "--metadata", tmp_path / "meta")
    writer = opened_by_a_reader(tmp_path / "meta")
    stack.callback(os.close, writer)
    process.send_signal(number)
    assert ended(process) == (code, "", "imagectl: interrupted\n")


def opened_by_a_reader(fifo: Path) -> int:
    """Its writing end: there is one once somebody reads."""
    opened: list[int] = []

    def is_read() -> bool:
        try:
            opened.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    wait_until(is_read, "somebody reads")
    return opened[0]


def test_a_signal_ends_a_command_whose_output_nobody_reads(
    imagectl: Imagectl, disk: Path, tmp_path: Path, stack: ExitStack
) -> None:
    (tmp_path / "meta").write_text('{"a": "' + "x" * 100_000 + '"}')
    imagectl("import", disk, "one/a", "--metadata", tmp_path / "meta")
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    capacity = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    # The same pipe for the messages: there is no room for another one.
    command = imagectl.command("show", "one/a")
    process = subprocess.Popen(command, stdout=writing, stderr=writing, env=imagectl.env())
    stack.callback(process.wait, 10)
    stack.callback(process.kill)
    os.close(writing)
    wait_until(lambda: waiting_bytes(reading) == capacity, "the pipe is full")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143


def waiting_bytes(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), "little")


def test_a_signal_at_any_moment_of_the_start_ends_it(start: Start) -> None:
    processes = []
    for delay in range(0, 240, 20):
        process = start("watch")
        time.sleep(delay / 1000)  # which moment that is, does not matter
        process.send_signal(signal.SIGINT)
        processes.append(process)
    for process in processes:
        code, _, message = ended(process)
        # By the kernel, by us, or by Python before any line of ours: that is a 1 while it looks for its modules.
        assert code in (-signal.SIGINT, 130) or (code == 1 and message.endswith("KeyboardInterrupt\n"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_stays_ignored(
    number: signal.Signals, imagectl: Imagectl, make_image: MakeImage, tmp_path: Path, stack: ExitStack
) -> None:
    make_image("one/a")
    destination = place("one", tmp_path)
    with destination.locked("b"):
        # As nohup, and a shell that starts a job in the background, do.
        command = ["bash", "-c", f'trap "" {number.name}; exec "$@"', "bash", *imagectl.command("cp", "one/a", "one/b")]
        process = subprocess.Popen(command, env=imagectl.env(), stdout=subprocess.DEVNULL)
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        wait_until(lambda: bool(destination.complete_staging_directories()), "the copy waits for the lock")
        process.send_signal(number)
    assert process.wait(20) == 0
    assert [image["image"] for image in imagectl.json("ls")] == ["one/a", "one/b"]


def catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_signal_ends_also_what_can_tell_nobody(closed: str, imagectl: Imagectl, stack: ExitStack) -> None:
    watch = f"exec {shlex.join(imagectl.command('watch'))} {closed}"
    process = subprocess.Popen(
        ["env", "--default-signal=INT,HUP,TERM", "bash", "-c", watch], env=imagectl.env(), stdout=subprocess.DEVNULL
    )
    stack.callback(process.wait, 10)
    stack.callback(process.kill)
    wait_until(lambda: catches(process.pid, signal.SIGTERM), "the signals are looked after")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143


def test_a_signal_still_ends_what_could_not_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.0)
    ends, cancelled = threading.Event(), threading.Event()

    def cancel() -> None:
        cancelled.set()
        raise ZeroDivisionError

    def end(number: int, message: str) -> None:
        ends.set()

    with Signals(end) as watched, watched.held(cancel):  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        assert cancelled.wait(10)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ends.wait(10)


def test_what_cannot_be_taken_back_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else only kill -9 would end what hangs in a file system."""
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.0)
    told: list[tuple[int, str]] = []

    def end(number: int, message: str) -> None:
        told.append((number, message))

    cancelled: list[None] = []
    before = signal.getsignal(signal.SIGTERM)
    with Signals(end) as watched, watched.held(lambda: cancelled.append(None)):  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: bool(cancelled), "the first one cancels")
        assert (watched.number, told) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: bool(told), "the second one ends")
    assert told[0][0] == signal.SIGTERM
    assert "may be left" in told[0][1]
    assert len(cancelled) == 1
    assert signal.getsignal(signal.SIGTERM) == before


# --- others ---


def test_an_import_whose_sidecar_dies_says_so(start: Start, sidecar: Sidecar, slow_disk: Path, tmp_path: Path) -> None:
    process = start("import", slow_disk, "one/a")
    wait_until(lambda: bool(place("one", tmp_path).staging_directories()), "the import runs")
    sidecar.kill()
    code, output, message = ended(process)
    assert (code, output) == (6, "")
    assert sidecar.address in message


def test_a_bar_is_shown_where_somebody_watches_and_nowhere_else(imagectl: Imagectl, disk: Path, tmp_path: Path) -> None:
    assert "━" in imagectl.on_terminal("import", disk, "one/a")
    assert "━" in imagectl.on_terminal("cp", "one/a", "two/b")
    assert "━" in imagectl.on_terminal("export", "one/a", tmp_path / "out")
    # The last line is the result, whole.
    assert "one/a copied to two/c: 8.0 MiB" in imagectl.on_terminal("cp", "one/a", "two/c").splitlines()[-1]
    assert imagectl.result("cp", "one/a", "two/d").stderr == ""
