"""Who a process is, so that another one on the same machine can tell for certain that it has ended.

Only two things are certain: a process of the same running kernel, seen from the same namespaces, is there or is not;
and all processes of a machine have ended when it was started anew since. Of any other process nothing is known.
"""

import hashlib
import os
import re
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

_FORMAT = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})-(\d{1,10})-(\d{1,20})-([0-9a-f]{16})")
_UNKNOWN = "0" * 16


@dataclass(frozen=True, slots=True)
class Identity:
    """A process and, in `token`, which of its locks. The others are digests of 16 hex digits."""

    machine: str  # _UNKNOWN where the machine cannot be told from others
    boot: str  # of the running kernel
    view: str  # of the namespaces that process numbers and times are read in
    pid: int
    started: int  # clock ticks since the boot
    token: str = _UNKNOWN

    @classmethod
    def parse(cls, text: str) -> "Identity | None":
        """What `__str__` wrote; None for anything else."""
        found = _FORMAT.fullmatch(text)
        return cls(found[1], found[2], found[3], int(found[4]), int(found[5]), found[6]) if found else None

    def __str__(self) -> str:
        return "-".join((self.machine, self.boot, self.view, str(self.pid), str(self.started), self.token))

    def with_token(self, token: str) -> str:
        """As text, for the lock with that token."""
        return str(replace(self, token=token))

    def is_process_of(self, other: "Identity") -> bool:
        """Whether they are of one process."""
        return replace(self, token=other.token) == other

    def has_ended(self, own: "Identity") -> bool:
        """Whether the process has ended for certain, asked by the one that `own` is of."""
        if self.boot != own.boot:
            return self.machine == own.machine != _UNKNOWN
        if self.view != own.view:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # another user's; or a number that was made up
            pass
        started = _started(self.pid)
        # None: hidden from this user, which is not gone.
        return started is not None and started != self.started


@cache
def _own(pid: int) -> Identity:
    boot = _text("/proc/sys/kernel/random/boot_id")
    spaces = [
        os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "time") if os.path.exists(f"/proc/self/ns/{kind}")
    ]
    started = _started(pid)
    if os.readlink("/proc/self") != str(pid):
        # It is that of other namespaces, where this number is another process: nobody can be told by it.
        spaces, started = [secrets.token_hex()], 0
    assert boot and started is not None
    return Identity(_machine(), _digest(boot), _digest(boot, *spaces), pid, started)


def own_identity() -> Identity:
    """Of this process."""
    return _own(os.getpid())


def process_name() -> str:
    """What this process is called, for those who wait for it."""
    with open("/proc/self/comm", encoding="utf-8", errors="replace") as comm:
        return comm.read().strip()


def _machine() -> str:
    """Of what is kept over a restart. All three: a machine that was cloned has mostly kept two."""
    known = (_text("/etc/machine-id"), _text("/sys/class/dmi/id/product_uuid"), socket.gethostname())
    return _digest(*known) if all(known) else _UNKNOWN


def _started(pid: int) -> int | None:
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat", "rb") as stat:
        # The name, in parentheses, may have any bytes in it.
        return int(stat.read().rpartition(b")")[2].split()[19])
    return None


def _text(path: str) -> str:
    with suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        return file.read().strip()
    return ""


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
