"""A progress bar on stderr, where somebody watches."""

import contextlib
from collections.abc import Callable, Iterator

from sidecar.ctl.session import is_terminal

Advance = Callable[[int, int], None]
"""Takes the bytes that are done and the bytes that have to be; from any thread."""


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Advance]:
    """A bar that is gone at the end; nothing at all where stderr is no terminal."""
    if not is_terminal():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        # total None until there is one: a bar that is full because nothing is known yet would lie.
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
