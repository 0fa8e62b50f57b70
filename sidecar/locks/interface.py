"""What every kind of datastore lock promises, and what a lock says about its holder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self, TypeAlias

LockPath: TypeAlias = str
"""The lock file's path, relative to the datastore's root, `/` between its components."""

MAX_HOLDER_BYTES = 4096

# At 4 bytes a character at most, the three texts and the rest of the JSON stay under MAX_HOLDER_BYTES.
_HOST_CHARACTERS, _PROCESS_CHARACTERS, _OPERATION_CHARACTERS = 253, 64, 512


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Who holds a lock: told to whoever has to wait, and never used to decide whether the lock is held.

    Texts are clipped, and what cannot be printed becomes `?`: they come from a shared file and end in messages.
    """

    host: str
    pid: int
    process: str
    operation: str
    since: datetime  # aware, UTC
    ended: bool = False
    """Its process is known to have ended: the lock is taken over some seconds after that was found."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", _printable(self.host, _HOST_CHARACTERS))
        object.__setattr__(self, "process", _printable(self.process, _PROCESS_CHARACTERS))
        object.__setattr__(self, "operation", _printable(self.operation, _OPERATION_CHARACTERS))

    @classmethod
    def unknown(cls, since: datetime) -> Self:
        """Of a lock that is held, with nothing readable in it: another program's, or written on a full datastore."""
        return cls("unknown", 0, "unknown", "unknown", since)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self | None:
        """The holder that `to_bytes` wrote; None for any other bytes. Raises nothing."""
        if len(content) > MAX_HOLDER_BYTES:
            return None
        try:
            fields = json.loads(content.decode())
            since = datetime.fromisoformat(fields["since"])
            if since.tzinfo is None:
                return None
            host, pid, process, operation = (fields[name] for name in ("host", "pid", "process", "operation"))
            if (
                type(pid) is not int
                or not 0 < pid < 1 << 32
                or not all(isinstance(text, str) for text in (host, process, operation))
            ):
                return None
            return cls(host, pid, process, operation, since.astimezone(UTC))
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            return None

    def to_bytes(self) -> bytes:
        """One line of JSON, at most MAX_HOLDER_BYTES."""
        fields = {
            "host": self.host,
            "pid": self.pid,
            "process": self.process,
            "operation": self.operation,
            "since": self.since.astimezone(UTC).isoformat(),
        }
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode()

    def __str__(self) -> str:
        since = self.since.astimezone(UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
        if not self.pid:
            return f"a process that left no name, since {since} UTC"
        ended = ", which has ended" if self.ended else ""
        return f"{self.process} (pid {self.pid} on {self.host}) for {self.operation}, since {since} UTC{ended}"


class HeldLock(Protocol):
    """A lock that is held, from `acquire` until `release` or the end of its `with` block."""

    @property
    def path(self) -> LockPath: ...

    def release(self) -> None:
        """Let go of the lock.

        Afterwards others can take it, no descriptor is left open, and its file is gone unless the datastore refused
        that, which is logged: a file that nobody holds does no harm. Raises nothing for it; a second call does nothing.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release; an error of the block passes."""
        ...


class DatastoreLocks(Protocol):
    """The locks of one datastore. Threads may share it."""

    def acquire(
        self, path: LockPath, operation: str, timeout: float, check: Callable[[], None] = lambda: None
    ) -> HeldLock:
        """Take the lock `path`, waiting up to `timeout` seconds for whoever holds it; 0: not at all.

        Longer, some seconds, for one whose holder has ended and that cannot be taken over at once.

        `check` is called several times a second while it waits: what that raises ends the wait, and passes.

        Afterwards the caller is its only holder, among all threads, processes and hosts that lock the same way, and
        the lock names this process and `operation` (a few words, such as `publish image a`) to those who wait.
        After any error the lock is not held by this call and no descriptor is left open.

        Raises:
            LockTimeout: somebody else held it the whole time; the message says who.
            FileNotFoundError: the directory of the lock file does not exist.
            OSError: the datastore could not say who holds it: that is never taken for "free" nor for "held".
        """
        ...

    def holder(self, path: LockPath) -> LockHolder | None:
        """Who holds the lock `path` now; None when nobody does, whether or not a file was left behind.

        For showing, not for deciding: it may have changed on return. Asking may take a free lock for microseconds,
        which every `acquire` waits for, also with timeout 0. Raises OSError when the datastore could not say.
        """
        ...


def _printable(text: str, limit: int) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:limit])
