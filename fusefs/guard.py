"""Lets nobody wait for a daemon that was killed.

The kernel ends the requests of a mount when the daemon's device is closed, which is when the last of its threads has
gone. One that has the kernel forget a name does not go: it waits, deaf to SIGKILL, for the directory that a tool holds
until its request is answered, which nobody does any more. Whatever else a thread waits for in the kernel, such as a
file server that is dead, keeps the tools waiting, too.

So a small process of its own hears of the daemon's death, and ends the connection by the kernel's switch. It unmounts,
too, what is to unmount itself (`auto_unmount`): fusermount3 asks once whether the daemon is gone, and leaves the mount
where it is when that question was under way as the connection ended.
"""

import contextlib
import ctypes
import errno
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

_log = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("guard_process.py")
_CONNECTIONS = "/sys/fs/fuse/connections"
# How long the guard may take to start, and to end.
_MOST_SECONDS = 5.0

# System calls that not every C library has; their numbers are the same on all architectures.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6


class Guard:
    """Owns the process, for the time of its `with`.

    To be entered by the thread that lives for as long as the daemon: its end is taken for the daemon's death.
    """

    def __enter__(self) -> Self:
        self._connection, its_end = socket.socketpair()
        self._connection.settimeout(_MOST_SECONDS)
        with its_end:
            # Alone with Python itself: the packages, and the site's, would take it longer to load than all of this.
            command = [sys.executable, "-I", "-S", str(_PROGRAM), str(os.getpid())]
            # In a session of its own, where a terminal's signals do not reach it, and in no directory of anybody's.
            self._process = subprocess.Popen(
                command,
                stdin=its_end.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._connection.send(b"!")  # a good end
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_MOST_SECONDS)
            return
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_MOST_SECONDS)

    def watch(self, device: int, unmounting: str = "") -> None:
        """Afterwards, who waits for the mount of this device number is told when the daemon dies.

        `unmounting`: the path that is to be unmounted then, too.

        To be called before the mount answers its first request.
        """
        with contextlib.ExitStack() as opened:
            try:
                switches = [_open_switch(device)]
                opened.callback(os.close, switches[0])
            except OSError as error:
                switches = []
                _log.warning("should the daemon be killed, tools may wait for it until umount --force cause=%s", error)
            try:
                # Sent open, as another mount may have the number when it is used.
                socket.send_fds(self._connection, [f"{device} ".encode() + os.fsencode(unmounting)], switches)
                if not self._connection.recv(1):
                    raise OSError(errno.ESRCH, "the guard has ended")
            except OSError as error:
                _log.warning("nobody notices should the daemon be killed cause=%s", error)


def _open_switch(device: int) -> int:
    """A descriptor: what is written to it ends the connection of the mount of that device number, and does no more."""
    name = f"{os.minor(device)}/abort"
    try:
        return os.open(f"{_CONNECTIONS}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        pass  # nothing is mounted there, as in most containers
    directory = _mounted_nowhere("fusectl")
    try:
        return os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)


def _mounted_nowhere(kind: str) -> int:
    """A descriptor of a file system's root that no path leads to. Only root may make one."""
    context = _call(_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
    try:
        _call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    if (result := int(library.syscall(number, *arguments))) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
