"""What commands say to people: sizes, and rows of tables."""

import io
import sys
from collections.abc import Iterable, Sequence

from sidecar.ctl.session import plain

NONE = "-"
# Wider than any table: lines are never cut or folded, so an id is whole wherever the output goes.
WIDTH = 100_000
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_size(count: int) -> str:
    """Bytes for people: three digits or so, and a binary unit."""
    value, unit = float(count), 0
    while abs(value) >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.{1 if value < 100 else 0}f} {UNITS[unit]}"


def human_time(seconds: float) -> str:
    """A length of time for people, in its largest unit; what is not past yet, by another clock, is none."""
    whole = max(int(seconds), 0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def exact_size(count: int) -> str:
    """Bytes for people who look closely."""
    return human_size(count) if count < 1000 else f"{human_size(count)} ({count} bytes)"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Lines of aligned columns under their names; bold names and nothing else where stdout is a terminal."""
    # Late: most commands print no table, and rich takes as long to load as they take to run.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(Text(column), justify="right" if column in right else "left", no_wrap=True, overflow="ignore")
    for row in rows:
        made.add_row(*(Text(plain(cell) or NONE) for cell in row))
    terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    Console(
        file=buffer,
        width=WIDTH,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        no_color=None if terminal else True,
        legacy_windows=False,
    ).print(made, crop=False, no_wrap=True, overflow="ignore")
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
