"""imagectl: how the process starts and ends."""

import contextlib
import os
import signal
import sys


def run() -> None:
    """The command: as `commands.main`, and then ends the process at once.

    An interpreter that shuts down in good order waits up to 0.1 s for gRPC's threads; calls and files are closed now.
    """
    _open_standard_streams()
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


def _open_standard_streams() -> None:
    """What the caller closed of stdin, stdout and stderr becomes /dev/null: nobody wants to hear, and that is no fault.

    Else an answer would fail after the change was made, or end in the next file or socket, which gets that number.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, errors="backslashreplace"))  # noqa: SIM115 - for as long as the process lives


if __name__ == "__main__":
    run()
