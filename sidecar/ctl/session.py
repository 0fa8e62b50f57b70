"""What the commands share: the options of all, the client, answers to people and to programs, and errors."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from sidecar import errors

if TYPE_CHECKING:
    from sidecar.client import ImageRef, SidecarClient

INTERRUPTED = 130
# How long a sidecar may take to notice that a call was cancelled.
CANCEL_SECONDS = 0.3

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Interrupted(errors.OperationCancelled):
    """Ctrl-C, with what came of it."""

    reason, exit_code = "INTERRUPTED", INTERRUPTED


@dataclass(slots=True)
class Session:
    """One run of imagectl."""

    address: str | None = None
    json: bool = False

    def choose(self, address: str | None, output: str | None) -> None:
        """Takes the options that were given; the ones of the command come after, and win over, the group's."""
        if address is not None:
            self.address = address
        if output is not None:
            self.json = output == "json"

    def client(self) -> "SidecarClient":
        from sidecar.client import SidecarClient

        return SidecarClient(self.address)

    def answer(self, text: str, document: object) -> None:
        """The result on stdout: for people, or one JSON document."""
        click.echo(json.dumps(document, indent=2, ensure_ascii=False) if self.json else text)

    def event(self, text: str, document: object) -> None:
        """One of many results as they come, a line each."""
        click.echo(json.dumps(document, ensure_ascii=False) if self.json else text)

    def note(self, message: str) -> None:
        """What somebody who waits should know: a line on stderr."""
        click.echo(f"imagectl: {plain(message)}", err=True)

    def report(self, reason: str, message: str) -> None:
        """An error, on stderr: one line for people, and with JSON a second one for programs."""
        line = "; ".join(part.strip() for part in message.splitlines() if part.strip())
        self.note(line)
        if self.json:
            click.echo(json.dumps({"error": {"reason": reason, "message": message}}, ensure_ascii=False), err=True)


def command(name: str) -> Callable[[Callable[Parameters, Result]], click.Command]:
    """A command of imagectl: it takes the options of the group too, wherever they are written."""

    def choose(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        session: Session = ctx.obj
        session.choose(*((value, None) if parameter.name == "sidecar" else (None, value)))

    def decorate(function: Callable[Parameters, Result]) -> click.Command:
        made = click.command(name)(function)
        kept: dict[str, Any] = {"expose_value": False, "hidden": True, "callback": choose}
        made.params.append(click.Option(["--sidecar"], **kept))
        made.params.append(click.Option(["--output", "-o"], type=click.Choice(["table", "json"]), **kept))
        return made

    return decorate


def image_argument(name: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """An argument of the form DATASTORE/IMAGE; the command gets an ImageRef."""

    def convert(ctx: click.Context, parameter: click.Parameter, value: str) -> "ImageRef":
        from sidecar.client import parse_ref

        try:
            return parse_ref(value)
        except errors.InvalidRequest as error:
            raise click.BadParameter(error.message, ctx, parameter) from None

    return click.argument(name, callback=convert, metavar="DATASTORE/IMAGE" if name == "image" else None)


def ref_text(ref: "ImageRef") -> str:
    return f"{ref.datastore}/{ref.image_id}"


def what_came_of_it(sidecar: "SidecarClient", ref: "ImageRef") -> Interrupted:
    """After a cancelled call that was to make an image: whether it did.

    The call may have been past the point where it can be cancelled, and only the sidecar knows.
    """
    time.sleep(CANCEL_SECONDS)
    try:
        sidecar.image(ref)
    except errors.ImageNotFound:
        return Interrupted(f"cancelled: nothing was made at {ref_text(ref)}")
    except errors.ImagesError as error:
        return Interrupted(f"cancelled; whether {ref_text(ref)} was made before that is not known: {error.message}")
    return Interrupted(f"interrupted, but {ref_text(ref)} is there: the cancellation came too late, or it was before")


def plain(text: str) -> str:
    """Text that moves no cursor: file names and messages are other people's."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_terminal(stream: Any = None) -> bool:
    """Whether somebody watches: for progress bars and hints, which have no place in a file."""
    stream = sys.stderr if stream is None else stream
    return bool(stream.isatty())
