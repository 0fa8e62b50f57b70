"""image-sidecar as a process: how it starts, how it ends, and what it tells."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from protos.images.v1 import image_service_pb2 as images
from protos.images.v1 import image_service_pb2_grpc as images_grpc
from protos.images.v1 import staging_service_pb2 as staging
from protos.images.v1 import staging_service_pb2_grpc as staging_grpc
from protos.images.v1 import types_pb2
from sidecar.cli import LineFormatter, Wakeups
from tests.support.processes import BIN, Sidecar, run, wait_until

LIMIT = 20.0


def make(directory: Path, config: str = "") -> Sidecar:
    (directory / "one").mkdir()
    return Sidecar(directory / "run", f"one={directory / 'one'}", config=config)


def staged(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory / "one") if name.startswith("tmp_image_")]


class Upload:
    """A WriteFile stream that does not end by itself."""

    def __init__(self, channel: grpc.Channel, root: Path) -> None:
        stub = staging_grpc.StagingServiceStub(channel)
        request = staging.CreateStagingRequest(ref=types_pb2.ImageRef(datastore="one", image_id="a"))
        created = stub.CreateStaging(request, timeout=LIMIT)
        self._id = created.staging_id
        self.end = threading.Event()
        self.call = stub.WriteFile.future(self._messages(), timeout=LIMIT)
        staged_file = root / created.directory / "a.bin"
        # The server has the call only when it has written: a message that gRPC took may still be on its way.
        wait_until(lambda: staged_file.exists() and staged_file.stat().st_size == 1, "the first byte is written")

    def _messages(self) -> Iterator[staging.WriteFileRequest]:
        yield staging.WriteFileRequest(staging_id=self._id, name="a.bin", data=b"x")
        self.end.wait(LIMIT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_sidecar_at_once_and_leaves_no_socket(tmp_path: Path, number: signal.Signals) -> None:
    with make(tmp_path) as sidecar, sidecar.client() as client:
        assert [datastore.name for datastore in client.datastores()] == ["one"]
        sidecar.signal(number)
        assert sidecar.process is not None
        assert sidecar.process.wait(LIMIT) == 0
        assert not Path(sidecar.address.removeprefix("unix:")).exists()
        assert "Traceback" not in sidecar.log.read_text()


def test_a_watch_does_not_hold_up_the_end_and_is_told_to_come_again(tmp_path: Path) -> None:
    config = "[limits]\nshutdown_seconds = 3600\n"
    with make(tmp_path, config) as sidecar, grpc.insecure_channel(sidecar.address) as channel:
        watch = images_grpc.ImageServiceStub(channel).WatchImages(images.WatchImagesRequest(), timeout=LIMIT)
        assert next(iter(watch)).snapshot_start
        started = time.monotonic()
        assert sidecar.stop(LIMIT) == 0
        assert time.monotonic() - started < 3
        with pytest.raises(grpc.RpcError) as caught:
            list(watch)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_call_that_runs_when_the_sidecar_is_told_to_end_may_end(tmp_path: Path) -> None:
    with make(tmp_path, f"[limits]\nshutdown_seconds = {LIMIT}\n") as sidecar:
        with grpc.insecure_channel(sidecar.address) as channel:
            upload = Upload(channel, tmp_path / "one")
            sidecar.signal(signal.SIGTERM)
            wait_until(lambda: "stopping signal=SIGTERM" in sidecar.log.read_text(), "the signal is seen")
            upload.end.set()
            assert upload.call.result(LIMIT).written_bytes == 1
        # Without a second signal, which would cancel what has not quite ended.
        assert sidecar.process is not None
        assert sidecar.process.wait(LIMIT) == 0
        assert "calls cancelled" not in sidecar.log.read_text()


def test_a_call_that_does_not_end_in_time_is_cancelled_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    with make(tmp_path, "[limits]\nshutdown_seconds = 0.1\n") as sidecar:
        with grpc.insecure_channel(sidecar.address) as channel:
            upload = Upload(channel, tmp_path / "one")
            assert staged(tmp_path)
            assert sidecar.stop(LIMIT) == 0
            assert isinstance(upload.call.exception(LIMIT), grpc.RpcError)
            upload.end.set()
        assert "Traceback" not in sidecar.log.read_text()
    assert staged(tmp_path) == []


def test_a_second_signal_does_not_wait_for_the_grace_time(tmp_path: Path) -> None:
    config = "[limits]\nshutdown_seconds = 3600\n"
    with make(tmp_path, config) as sidecar, grpc.insecure_channel(sidecar.address) as channel:
        upload = Upload(channel, tmp_path / "one")
        sidecar.signal(signal.SIGTERM)
        wait_until(lambda: "stopping signal=SIGTERM" in sidecar.log.read_text(), "the signal is seen")
        sidecar.signal(signal.SIGINT)
        assert sidecar.process is not None
        assert sidecar.process.wait(LIMIT) == 0
        upload.end.set()
    assert staged(tmp_path) == []


def test_a_killed_sidecar_does_not_keep_the_next_one_from_starting(tmp_path: Path) -> None:
    with make(tmp_path) as sidecar:
        sidecar.kill()
        assert Path(sidecar.address.removeprefix("unix:")).is_socket()
        sidecar.start()
        with sidecar.client() as client:
            assert [datastore.name for datastore in client.datastores()] == ["one"]


def test_a_second_sidecar_at_the_same_address_says_who_is_there_and_leaves_it_alone(tmp_path: Path) -> None:
    with make(tmp_path) as sidecar:
        again = ("serve", "--listen", sidecar.address, "--datastore", f"one={tmp_path / 'one'}")
        second = run(BIN / "image-sidecar", *again, check=False)
        assert second.returncode == 1
        assert f"another sidecar (process {sidecar.pid}) serves there" in second.stderr
        assert "Traceback" not in second.stderr
        with sidecar.client() as client:
            assert [datastore.name for datastore in client.datastores()] == ["one"]


def test_the_chosen_port_is_told(tmp_path: Path, stack: ExitStack) -> None:
    sidecar = make(tmp_path, 'listen = "127.0.0.1:0"\n')
    listen = sidecar._command.index("--listen")
    del sidecar._command[listen : listen + 2]
    stack.enter_context(sidecar)
    line = next(line for line in sidecar.log.read_text().splitlines() if line.startswith("image-sidecar: ready"))
    address = dict(pair.split("=", 1) for pair in line.split()[2:])["address"]
    assert address.startswith("127.0.0.1:")
    with grpc.insecure_channel(address) as channel:
        images_grpc.ImageServiceStub(channel).ListImages(images.ListImagesRequest(), timeout=LIMIT)


def test_a_faulty_configuration_is_told_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "images.toml"
    file.write_text('[datastore.one]\npath = "/one"\nlayout = "foo"\n')
    result = run(BIN / "image-sidecar", "serve", "--config", file, "--listen", "0.0.0.0:1", check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"image-sidecar: {file}: datastore.one.layout: 'foo' is not one of compound, sharded, vsan",
        "image-sidecar: --listen: '0.0.0.0' is not a loopback address: others are refused until there is TLS",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["foo"], "No such command 'foo'; see image-sidecar --help"),
        (["serve", "--foo"], "No such option '--foo'; see image-sidecar serve --help"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(arguments: list[str], told: str) -> None:
    result = run(BIN / "image-sidecar", *arguments, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"image-sidecar: {told}\n")


def test_help_and_version_are_no_errors() -> None:
    assert "serve" in run(BIN / "image-sidecar", "--help").stdout
    assert run(BIN / "image-sidecar", "--version").stdout.startswith("image-sidecar")
    nothing = run(BIN / "image-sidecar", check=False)
    assert nothing.returncode == 2
    assert "Usage: image-sidecar" in nothing.stderr + nothing.stdout


def test_a_signal_that_another_thread_gets_is_not_lost() -> None:
    """The main thread, which sleeps then, would run a handler only when something else wakes it."""
    main = threading.get_ident()

    def send() -> None:
        wait_until(lambda: sys._current_frames()[main].f_code.co_name == "wait", "the main thread waits")
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    with Wakeups() as wakeups:
        thread = threading.Thread(target=send)
        thread.start()
        assert wakeups.wait() == "SIGTERM"
        thread.join(LIMIT)


def test_what_a_client_sends_cannot_start_a_line_of_the_log() -> None:
    record = logging.LogRecord("sidecar", logging.INFO, "", 0, "copied ref=%s", ("a\nERROR é \x1b[2J",), None)
    line = LineFormatter().format(record)
    assert line.endswith(" INFO copied ref=a\\nERROR é \\x1b[2J")


def test_one_directory_under_two_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "store")
    flags = (f"--datastore=one={tmp_path}/store", f"--datastore=two={tmp_path}/alias")
    ended = run(BIN / "image-sidecar", "serve", f"--listen=unix:{tmp_path}/s.sock", *flags, check=False)
    assert ended.returncode == 2
    assert "one and two are the same directory" in ended.stderr
