"""What the commands say of an argument that cannot be meant: one line, and where to read on."""

import click


def usage_line(error: click.UsageError, program: str) -> str:
    """The fault, and the command whose help explains it; `program` where click does not know the command."""
    command = error.ctx.command_path if error.ctx is not None else program
    return f"{error.format_message().rstrip('.')}; see {command} --help"
