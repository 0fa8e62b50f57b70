"""A progress bar on stderr, where somebody watches."""

import contextlib
from collections.abc import Callable, Iterator

from sidecar.ctl.session import is_terminal, plain

Advance = Callable[[int, int], None]
"""Takes the bytes that are done and the bytes that have to be; from any thread."""


@contextlib.contextmanager
def count_bar(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar of items, as `progress_bar`: takes what it is at, how many are done, and how many there are."""
    if not is_terminal():
        yield lambda at, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(label, total=None)

        def show(at: str, done: int, total: int) -> None:
            bar.update(task, description=f"{label} {_short(plain(at))}", completed=done, total=total or None)

        yield show


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

    label = _short(label)
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


def _short(label: str) -> str:
    return label if len(label) <= LABEL_WIDTH else f"{label[: LABEL_WIDTH - 1]}…"
