"""What the commands of all benchmarks have in common: their options, and where the result goes."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from tests.bench.report import Report

MIB, GIB = 1024**2, 1024**3
PRIORITY = -15


def parser(name: str, what: str, *, needed_bytes: int) -> argparse.ArgumentParser:
    room = f"{needed_bytes // GIB} GiB free"
    options = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=what)
    options.add_argument("--runs", type=int, default=5, help="of each contender, after one that does not count")
    options.add_argument("--directory", type=Path, default=Path("/var/tmp"), help=f"on the disk to measure; {room}")
    options.add_argument("--markdown", action="store_true", help="print the table as Markdown, with the machine")
    options.add_argument("--write", action="store_true", help="put it into docs/benchmarks.md")
    return options


def parse(options: argparse.ArgumentParser, arguments: list[str], *, needed_bytes: int) -> argparse.Namespace:
    """The options, once what they name will do."""
    parsed = options.parse_args(arguments)
    if parsed.runs < 1:
        options.error("--runs: at least 1")
    if shutil.disk_usage(parsed.directory).free < needed_bytes:
        options.error(f"{parsed.directory} has less than {needed_bytes // GIB} GiB free: name another with --directory")
    return parsed


def raise_priority() -> None:
    """Inherited by everything that is started, ours and the peers: other work on the machine disturbs them less."""
    os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)


def give(report: Report, parsed: argparse.Namespace) -> None:
    report.show()
    if parsed.markdown:
        sys.stdout.write(report.markdown())
    if parsed.write:
        report.write()


def progress(what: str) -> None:
    sys.stderr.write(f"{what}\n")
