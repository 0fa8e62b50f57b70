"""What the mount asks about the processes that use it."""

import os
from typing import NamedTuple

_EXITING = 0x00000004  # PF_EXITING of the kernel's task flags
_SIGNALED = 0x00000400  # PF_SIGNALED


class Caller(NamedTuple):
    """A process that asks for something, and its session, as of a terminal or a service; 0 for what is not known."""

    process: int
    session: int


NOBODY = Caller(0, 0)


def thread_group(pid: int) -> int:
    """The process that a thread belongs to; 0 when it is gone or not to be seen from here."""
    return int(_status(pid).get("Tgid", 0))


def caller(pid: int) -> Caller:
    """Who a thread works for."""
    process = thread_group(pid)
    try:
        return Caller(process, os.getsid(process) if process else 0)  # of 0 it would be that of this process
    except OSError:
        return Caller(process, 0)


def described(process: int) -> str:
    """For the log: the process by its name, as far as that can be seen, and its number."""
    if not process:
        return "a process that cannot be seen from here"
    return f"{_status(process).get('Name', 'a process that has ended')} (pid {process})"


def runs_a_program(process: int) -> bool:
    """Whether the process is there, has not ended, and is none of the kernel's own, which work for anybody."""
    return "VmSize" in _status(process)


def descends_from(process: int, ancestor: int) -> bool:
    """Whether the process is another one's child, or a child's."""
    while process > 1:
        process = int(_status(process).get("PPid", 0))
        if process == ancestor:
            return True
    return False


def _status(pid: int) -> dict[str, str]:
    """What the kernel says of a thread, by name; nothing of one that is gone or not to be seen from here."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_being_killed(pid: int) -> bool:
    """Whether the thread is on its way out because of a signal, so that a file it closes is closed for it.

    The flags stay zero for a process of another user under hidepid: then it counts as alive.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            flags = int(file.read().rpartition(b")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return False
    return bool(flags & _EXITING and flags & _SIGNALED)
