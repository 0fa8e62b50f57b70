"""image-sidecar: reads the configuration, wires the parts, serves until a signal ends it."""

import contextlib
import logging
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import click

from sidecar.config import Flags, SidecarConfig, load_config
from sidecar.errors import ImagesError
from sidecar.usage import usage_line

logger = logging.getLogger(__name__)

# For the parts to give up what they hold, after the last call.
CLOSE_SECONDS = 10.0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="datastore-images", prog_name="image-sidecar")
def image_sidecar() -> None:
    """Owns the life of VM images on this host's datastores."""


@image_sidecar.command()
@click.option("--config", "file", metavar="FILE", help="TOML; else the file that IMAGE_SIDECAR_CONFIG names.")
@click.option(
    "--datastore",
    "datastores",
    multiple=True,
    metavar="NAME=PATH[,KEY=VALUE]…",
    help="A directory that holds images; keys: layout (compound, sharded, vsan), type (local, nfs, vmfs, vsphere), "
    "server, reserve (64MiB) and the others of the file. NAME=,type=vsphere,server=… is reached by its server alone. "
    "May be repeated. Replaces those of IMAGE_SIDECAR_DATASTORES and of the file.",
)
@click.option("--listen", metavar="ADDRESS", help="unix:PATH, or HOST:PORT on loopback; port 0: any that is free.")
@click.option("--log-level", metavar="LEVEL", help="debug, info (the default), warning or error.")
def serve(file: str | None, datastores: tuple[str, ...], listen: str | None, log_level: str | None) -> None:
    """Serves until SIGTERM or SIGINT; a second one cancels what still runs."""
    try:
        config = load_config(file, os.environ, Flags(listen, datastores, log_level))
        # Who asks what holds a lock or a file is told a name: `python` is nobody's.
        Path("/proc/self/comm").write_text("image-sidecar", encoding="ascii")
        set_up_logging(config.log_level)
        clean = run(config)
    except ImagesError as error:
        for line in error.message.splitlines():
            click.echo(f"image-sidecar: {line}", err=True)
        sys.exit(error.exit_code)
    if not clean:
        # Threads that hang in the storage would keep the interpreter from ending.
        logging.shutdown()
        os._exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a usage error is one line, and exit code 2."""
    try:
        code = image_sidecar.main(args=arguments, prog_name="image-sidecar", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        help_wanted.show()
        sys.exit(help_wanted.exit_code)
    except click.UsageError as error:
        click.echo(f"image-sidecar: {usage_line(error, 'image-sidecar')}", err=True)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def run(config: SidecarConfig) -> bool:
    """Serves until a signal. False: something had to be left behind when it ended.

    Raises ListenError, or what a part raises that cannot start.
    """
    # Late, so that --help and a faulty configuration do not wait for gRPC.
    from sidecar.server import SidecarServer
    from sidecar.wiring import build

    raise_open_files_limit()
    # A signal before this is done ends the process at once, which is safe: storage that hangs must not keep it.
    parts = build(config)
    with Wakeups() as wakeups:
        try:
            server = SidecarServer(parts.services, config, interrupt=parts.interrupt)
            server.start()
        except BaseException:
            _bounded(parts.close, CLOSE_SECONDS)
            raise
        # Whatever the log level: who starts us waits for this line.
        names = ",".join(datastore.name for datastore in config.datastores)
        click.echo(f"image-sidecar: ready address={server.address} datastores={names}", err=True)
        name = wakeups.wait()
        logger.info("stopping signal=%s grace_seconds=%g", name, config.limits.shutdown_seconds)
        # Before the streams end: their clients come again at once, and must not find us.
        server.refuse()
        parts.end_streams()
        stopped: list[bool] = []

        def stop() -> None:
            try:
                stopped.append(server.stop())
            finally:
                wakeups.wake()

        threading.Thread(target=stop, name="stop", daemon=True).start()
        while (name := wakeups.wait()) is not None:
            logger.warning("cancelling the calls that still run signal=%s", name)
            server.cancel()
        closed = _bounded(parts.close, CLOSE_SECONDS)
    clean = stopped == [True] and closed
    logger.log(logging.INFO if clean else logging.ERROR, "stopped clean=%s", str(clean).lower())
    return clean


def raise_open_files_limit() -> None:
    """To what this process may have at most: a copy or a purge opens all files of an image at once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning("limit of open files not raised error=%s", error)


def _bounded(close: Callable[[], None], seconds: float) -> bool:
    """Runs it for at most that long: storage that hangs must not keep the process. False: it hangs, or it failed."""
    done: list[bool] = []

    def work() -> None:
        close()
        done.append(True)

    thread = threading.Thread(target=work, name="close", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        logger.error("close does not end waited_seconds=%g", seconds)
    return bool(done)


class Wakeups:
    """SIGTERM and SIGINT, and a wake-up of our own, as something to wait for.

    The interpreter writes the signal's number into a pipe at the moment the signal comes, in whatever thread. A handler
    in Python would run only when the main thread gets to it: never, when the signal comes just before it blocks.
    """

    def __enter__(self) -> "Wakeups":
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # A full pipe has thousands of them waiting already.
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._ignore) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        # The descriptors stay open: a thread that is late may still wake us, and the process ends with us.

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        """Only there so that the signal does not do what it does otherwise."""

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"\0")

    def wait(self) -> str | None:
        """The name of the signal that came, or None for a wake-up."""
        select.select([self._read], [], [])
        number = os.read(self._read, 1)[0]
        return signal.Signals(number).name if number else None


class LineFormatter(logging.Formatter):
    """One event, one line: time, level, text. What clients send cannot start a line of its own."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        line = super().formatMessage(record)
        return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
