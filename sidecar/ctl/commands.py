"""imagectl: the group of commands, and how each of them ends: what it says, and its exit code."""

import contextlib
import errno
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from sidecar import errors
from sidecar.ctl.session import BROKEN_PIPE, Interrupted, Session
from sidecar.usage import usage_line

# Every command: its module, the command in it, and what the list of commands says. A command's module is imported when
# it is called, so that a short command is not slowed by what a long one needs.
COMMANDS = {
    "ls": ("ls", "ls"),
    "show": ("show", "show"),
    "cp": ("cp", "cp"),
    "rm": ("rm", "rm"),
    "restore": ("restore", "restore"),
    "purge": ("purge", "purge"),
    "touch": ("touch", "touch"),
    "validate": ("validate", "validate"),
    "import": ("import_", "import_image"),
    "export": ("export", "export"),
    "scan": ("scan", "scan"),
    "unused": ("unused", "unused"),
    "sweep": ("sweep", "sweep"),
    "reap": ("reap", "reap"),
    "watch": ("watch", "watch"),
    "datastores": ("datastores", "datastores"),
    "locks": ("locks", "locks"),
}
USAGE = 2


class Commands(click.Group):
    """The commands, imported when they are needed; their errors become a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"sidecar.ctl.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        session: Session = ctx.obj
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except Interrupted as error:
            session.report(error.reason, error.message)
            return 128 + error.number
        except errors.ImagesError as error:
            session.report(error.reason, error.message)
            return error.exit_code
        except OSError as error:
            return _reported(session, error)
        return result

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except OSError as error:  # --help and --version are printed here
            raise click.exceptions.Exit(_reported(extra["obj"], error)) from None


def _reported(session: Session, error: OSError) -> int:
    """The exit code for what this machine refused, which is told, unless it is that nobody reads any more."""
    if isinstance(error, BrokenPipeError):
        # The reader has what it wanted. What is still buffered must not fail once more when Python flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return BROKEN_PIPE
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    session.report(errors.NoSpace.reason if full else "OS_ERROR", f"{where}{error.strerror or error}")
    return errors.NoSpace.exit_code if full else 1


def _version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        try:
            version = importlib.metadata.version("datastore-images")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        click.echo(f"imagectl {version}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--sidecar", metavar="ADDRESS", help="unix:PATH or HOST:PORT; else IMAGE_SIDECAR, else the usual socket.")
@click.option("--output", "-o", type=click.Choice(["table", "json"]), help="For people (the default), or for programs.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Say it, and exit.")
@click.pass_obj
def imagectl(session: Session, sidecar: str | None, output: str | None) -> None:
    """Images on datastores. An image is written DATASTORE/IMAGE.

    Exit codes: 0 done, 2 usage, 3 not found, 4 already exists, 5 not in the state for it (deleted, incomplete, in use),
    6 unavailable, 7 no space, 130 interrupted, 1 anything else.
    """
    session.choose(sidecar, output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs imagectl; returns its exit code."""
    # gRPC writes about connections to stderr, where our own messages belong.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(format="imagectl: %(message)s", level=logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding does not have is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    session = Session()
    try:
        with session.signals:
            code = imagectl.main(args=arguments, prog_name="imagectl", standalone_mode=False, obj=session)
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        with contextlib.suppress(OSError):  # nobody is there to be told: the exit code says it
            help_wanted.show()
        return USAGE
    except click.UsageError as error:
        session.report("USAGE", usage_line(error, "imagectl"))
        return USAGE
    except click.ClickException as error:
        session.report("USAGE", error.format_message())
        return error.exit_code
    return code if isinstance(code, int) else 0
