"""image-mount: shows the images of a sidecar as directories."""

import logging
import logging.handlers
import os
import sys
from collections.abc import Sequence

import click

from fusefs.binding import BINDINGS
from fusefs.daemon import EndSignals, Parent, into_background
from fusefs.mount import CALL_SECONDS, MountError, run
from fusefs.options import MountOptions, OptionError, parse_options
from sidecar.client import SidecarClient, default_address
from sidecar.errors import ImagesError
from sidecar.usage import usage_line

_SYSLOG_SOCKET = "/dev/log"
_LEVELS = ("debug", "info", "warning", "error")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("places", nargs=-1, metavar="[SOURCE] MOUNTPOINT")
@click.option(
    "--sidecar", "address", metavar="ADDRESS", envvar="IMAGE_SIDECAR", help="Of the sidecar: unix:PATH or HOST:PORT."
)
@click.option("--foreground", "-f", is_flag=True, help="Stay in the foreground, with the log on standard error.")
@click.option("--binding", type=click.Choice(BINDINGS), default=BINDINGS[0], show_default=True, help="Of libfuse.")
@click.option("--log", "log_path", type=click.Path(dir_okay=False), help="Append the log to this file.")
@click.option("--log-level", type=click.Choice(_LEVELS), default="info", show_default=True)
@click.option("-o", "options", multiple=True, metavar="OPTION,…", help="settle=SECONDS, ro, allow_other, uid=, …")
def image_mount(
    places: tuple[str, ...],
    address: str | None,
    foreground: bool,
    binding: str,
    log_path: str | None,
    log_level: str,
    options: tuple[str, ...],
) -> None:
    """Mount the images of a sidecar at MOUNTPOINT, and unmount with fusermount3 -u MOUNTPOINT.

    SOURCE is the sidecar's address too, or `none`: as mount -t fuse.image-mount and /etc/fstab have it.
    """
    try:
        parsed = parse_options(options)
    except OptionError as error:
        raise click.UsageError(str(error)) from None
    if not 1 <= len(places) <= 2:
        raise click.UsageError("name a directory to mount at, and nothing but the sidecar's address before it")
    *sources, mountpoint = places
    if sources and sources != ["none"]:
        address = sources[0]
    # Paths of the command line are meant from here; the daemon leaves for the root directory.
    mountpoint = os.path.abspath(mountpoint)
    log_path = os.path.abspath(log_path) if log_path else None
    if log_path:
        try:
            with open(log_path, "ab"):
                pass
        except OSError as error:
            raise click.BadParameter(f"cannot write {log_path}: {error.strerror}", param_hint="--log") from None
    parent = Parent(None) if foreground else into_background()
    # Who asks what has an image open is told a name: `python` is nobody's.
    with open("/proc/self/comm", "w", encoding="ascii") as name:
        name.write("image-mount")
    _start_log(log_path, log_level, foreground=foreground)
    try:
        _serve(mountpoint, address or default_address(), parsed, binding, parent)
    except (MountError, ImagesError) as error:
        if not parent.failed(str(error)):
            click.echo(f"image-mount: {error}", err=True)
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a usage error is one line, and exit code 2."""
    try:
        image_mount.main(args=arguments, prog_name="image-mount", standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"image-mount: {usage_line(error, 'image-mount')}", err=True)
        sys.exit(error.exit_code)


def _serve(mountpoint: str, address: str, options: MountOptions, binding: str, parent: Parent) -> None:
    signals = EndSignals()
    with SidecarClient(address, timeout=CALL_SECONDS) as client:
        run(mountpoint, client, options, binding, signals, parent.ready)


def _start_log(path: str | None, level: str, *, foreground: bool) -> None:
    handler: logging.Handler
    layout = "%(asctime)s %(levelname)s %(name)s %(message)s"
    if path is not None:
        handler = logging.FileHandler(path)
    elif foreground:
        handler = logging.StreamHandler()
    elif os.path.exists(_SYSLOG_SOCKET):
        handler = logging.handlers.SysLogHandler(_SYSLOG_SOCKET)
        layout = "image-mount[%(process)d]: %(levelname)s %(message)s"
    else:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(layout))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # What the bindings say at debug is every call, with traceback: more than anyone can read.
    logging.getLogger("fuse").setLevel(max(logging.INFO, logging.getLogger().level))


if __name__ == "__main__":
    main()
