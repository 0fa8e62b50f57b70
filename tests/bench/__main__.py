"""Runs one benchmark: python -m tests.bench NAME [OPTION…]. Each is a module here with a `main`."""

import importlib
import signal
import sys
from types import FrameType

BENCHMARKS = {
    "copy": "copies of whole images, against cp on the same file system",
    "load": "touches beside running copies, and 64 clients at once",
    "mount": "the mount, against bindfs and against the datastore's own directory",
    "vsphere": "what a vSphere server is asked for, and a plain client of its API",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        listed = "\n".join(f"  {name:8}{what}" for name, what in BENCHMARKS.items())
        wanted = sys.argv[1:2] in (["-h"], ["--help"])
        (sys.stdout if wanted else sys.stderr).write(f"usage: scripts/bench NAME [--help]\n{listed}\n")
        return 0 if wanted else 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    name = sys.argv.pop(1)
    sys.argv[0] = f"scripts/bench {name}"
    status: int = importlib.import_module(f"tests.bench.{name}").main(sys.argv[1:])
    return status


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the run as an error would; a second signal must not cut short the unmounting that follows."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


sys.exit(main())
