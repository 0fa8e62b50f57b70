"""Tables for the terminal and for docs/benchmarks.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@dataclass(frozen=True, slots=True)
class Section:
    """A further table of a result."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's result: a table, maybe more of them, what has to be known to read it, and the machine."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    machine: Sequence[tuple[str, str]]
    more: Sequence[Section] = ()

    def show(self) -> None:
        # As wide as it is, also into a file: a column that is cut off is none.
        console = Console(width=160)
        for section in (Section(self.title, self.columns, self.rows), *self.more):
            table = Table(*section.columns, title=section.title)
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
        for note in self.notes:
            console.print(f"- {note}", markup=False, highlight=False)

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", *_table(self.columns, self.rows)]
        for section in self.more:
            lines += ["", f"### {section.title}", "", *_table(section.columns, section.rows)]
        lines += ["", *(f"- {note}" for note in self.notes), "", "| machine | |", "| --- | --- |"]
        lines += [_row(item) for item in self.machine]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """Puts it into the document, in place of this benchmark's last one."""
        begin, end = f"<!-- scripts/bench {self.name}: begin -->", f"<!-- scripts/bench {self.name}: end -->"
        text = DOCUMENT.read_text() if DOCUMENT.exists() else _INTRODUCTION
        if begin not in text:
            text += f"\n{begin}\n{end}\n"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(f"{before}{begin}\n{self.markdown()}{end}{after}")


_INTRODUCTION = """\
# Benchmarks

Each is `scripts/bench NAME`; with `--write` it puts its result here. Peers run in the same run, in turn with what they
are compared with: absolute times are this machine's on that day, ratios are what to look at.
"""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
