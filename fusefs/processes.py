"""What the mount asks about the processes that use it."""

_EXITING = 0x00000004  # PF_EXITING of the kernel's task flags
_SIGNALED = 0x00000400  # PF_SIGNALED


def thread_group(pid: int) -> int:
    """The process that a thread belongs to; 0 when it is gone or not to be seen from here."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"Tgid:"):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


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
