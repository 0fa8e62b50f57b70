"""What the commands share: the options of all, the client, answers to people and to programs, and errors."""

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TextIO, TypeVar

import click

from sidecar import errors
from sidecar.ctl.signals import Signals

if TYPE_CHECKING:
    from sidecar.client import ImageRef, SidecarClient

BROKEN_PIPE = 128 + signal.SIGPIPE
# How long a sidecar may take to notice that a call was cancelled, and to say what came of it.
CANCEL_SECONDS = 0.3
ANSWER_SECONDS = 5.0
STDERR = 2

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Interrupted(errors.OperationCancelled):
    """Ctrl-C, or another signal, with what came of it. The exit code is the one that shells use: 128 and the number."""

    reason = "INTERRUPTED"

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(slots=True)
class Session:
    """One run of imagectl."""

    address: str | None = None
    json: bool = False
    signals: Signals = field(init=False)

    def __post_init__(self) -> None:
        self.signals = Signals(self._end)

    def choose(self, address: str | None, output: str | None) -> None:
        """Takes the options that were given; the ones of the command come after, and win over, the group's."""
        if address is not None:
            self.address = address
        if output is not None:
            self.json = output == "json"

    def client(self) -> "SidecarClient":
        from sidecar.client import SidecarClient

        return SidecarClient(self.address)

    @contextlib.contextmanager
    def taking_back(self, sidecar: "SidecarClient", outcome: Callable[[], str]) -> Iterator[None]:
        """A block that takes back what it made when it fails: also, by its calls failing, when there is a signal.

        Raises Interrupted then, with what `outcome` says afterwards.
        """
        try:
            with self.signals.held(sidecar.cancel_calls):
                yield
        except BaseException:
            if not self.signals.number:
                raise
        if self.signals.number:
            raise Interrupted(self.signals.number, outcome())

    def answer(self, text: str, document: object) -> None:
        """The result on stdout: for people, or one JSON document."""
        click.echo(_json(document, sys.stdout, indent=2) if self.json else text)

    def event(self, text: str, document: object) -> None:
        """One of many results as they come, a line each."""
        click.echo(_json(document, sys.stdout) if self.json else text)

    def note(self, message: str) -> None:
        """What somebody who waits should know: a line on stderr."""
        click.echo(f"imagectl: {plain(message)}", err=True)

    def report(self, reason: str, message: str) -> None:
        """An error, on stderr: one line for people, and with JSON a second one for programs."""
        with contextlib.suppress(OSError):  # nobody is there to be told: the exit code says it
            click.echo(self._error(reason, message), err=True)

    def _error(self, reason: str, message: str) -> str:
        line = "; ".join(part.strip() for part in message.splitlines() if part.strip())
        told = f"imagectl: {plain(line)}"
        return f"{told}\n{_json({'error': {'reason': reason, 'message': message}}, sys.stderr)}" if self.json else told

    def _end(self, number: int, message: str) -> NoReturn:
        """Ends the process because of a signal, whatever the main thread is in: also in a write that nobody reads."""
        try:
            told = f"{self._error(Interrupted.reason, message)}\n".encode(errors="backslashreplace")
            if select.select([], [STDERR], [], 0)[1]:
                os.write(STDERR, told)
        finally:  # whatever becomes of the message
            os._exit(128 + number)


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


def what_came_of_it(address: str, ref: "ImageRef", *, publishing: bool = False) -> str:
    """After a cancelled call that was to make an image: whether it did.

    The call may have been past the point where it can be cancelled, and only the sidecar knows. `publishing`: it had
    been asked to publish what is complete, which it does not give up halfway.
    """
    from sidecar.client import SidecarClient

    time.sleep(CANCEL_SECONDS)
    try:
        with SidecarClient(address, timeout=ANSWER_SECONDS) as sidecar:
            sidecar.image(ref)
    except errors.ImageNotFound:
        if publishing:
            return f"interrupted while {ref_text(ref)} was being published: it may appear yet, see imagectl ls"
        return f"cancelled: nothing was made at {ref_text(ref)}"
    except errors.ImagesError as error:
        return f"cancelled; whether {ref_text(ref)} was made before that is not known: {error.message}"
    return f"interrupted, but {ref_text(ref)} is there: the cancellation came too late, or it was before"


def plain(text: str) -> str:
    """Text that moves no cursor: file names and messages are other people's."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_terminal(stream: Any = None) -> bool:
    """Whether somebody watches: for progress bars and hints, which have no place in a file."""
    stream = sys.stderr if stream is None else stream
    return bool(stream.isatty())


def _json(document: object, stream: TextIO, indent: int | None = None) -> str:
    """Names as they are written, or escaped where the stream's encoding does not have them: JSON in any case."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    try:
        text.encode(stream.encoding)
    except UnicodeEncodeError:
        return json.dumps(document, indent=indent)
    return text
