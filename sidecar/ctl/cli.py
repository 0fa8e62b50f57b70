"""imagectl: how the process starts and ends."""

import contextlib
import os
import signal
import sys


def run() -> None:
    """The command: as `commands.main`, and then ends the process at once.

    An interpreter that shuts down in good order waits up to 0.1 s for gRPC's threads; calls and files are closed now.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until the signals are looked after, while modules are loaded and nothing is made, the kernel ends the process:
        # what Python raises instead may be lost, and is a traceback at best.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sidecar.ctl.commands import main

    code = main()
    with contextlib.suppress(OSError):  # a closed pipe: said already, by the exit code
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
