"""A progress bar on stderr, where somebody watches."""

import contextlib
from collections.abc import Callable, Iterator

from sidecar.ctl.session import is_terminal

Advance = Callable[[int, int], None]
"""Takes the bytes that are done and the bytes that have to be; from any thread."""


# Leaves room for the bar where a line has 80 columns.
LABEL_WIDTH = 24


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Advance]:
    """A bar that is gone at the end; nothing at all where stderr is no terminal."""
    if not is_terminal():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    if len(label) > LABEL_WIDTH:
        label = f"{label[: LABEL_WIDTH - 1]}…"
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(label, total=None)
        # total None until there is one: a bar that is full because nothing is known yet would lie.
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
