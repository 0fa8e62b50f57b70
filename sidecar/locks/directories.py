"""Locks on a datastore that only its server's file calls reach: there is no open file to lock, but a directory can be
moved to a name that must be free, and of those who try at once one succeeds.

The rules that keep it to one holder:

- A lock is a directory at its path, with one file in it. The file's name is the holder's identity, its content who
  that is, in words. It is made under a name of its own and then moved, whole, to the lock's path: nobody ever sees a
  lock without its holder, and none can be moved onto one that is there.
- It is let go by moving it, whole, back to the name of its own; what is left there is nobody's lock.
- A lock is taken from its holder only when that holder is known to have ended: it is a process of this machine, and the
  kernel says so; or this machine was started anew since; or this very object, which knows what it holds, and not what
  another one of its process does: one datastore may be configured twice. Never because of its age, and never another
  machine's: whether that still acts, nobody here can know. A lock whose holder cannot be read is held.
- It is taken over by renaming the file in it, from the ended holder's identity to the new one's: of two who try, one
  finds no such file. Whatever else happened to the lock meanwhile, that name was the ended holder's alone.
- A server that was away may still do what it was asked for before. So a lock is not taken over in the moment in which
  its holder is found to have ended; and one that could not be let go of, or under which the server did not answer, is
  held until the server answers again: in both cases some seconds later.
"""

import contextlib
import logging
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self

from sidecar.errors import DatastoreUnavailable, ImagesError, InvalidRequest, LockTimeout
from sidecar.locks.identity import Identity, own_identity, process_name
from sidecar.locks.interface import MAX_HOLDER_BYTES, HeldLock, LockHolder, LockPath

FIRST_WAIT, LONGEST_WAIT = 0.02, 0.5  # seconds between two tries: doubles from one to the other
# For a server that answers, to do what it has been asked for by who is not there any more.
SETTLE_SECONDS = 2.0
# For a lock to settle and be taken over, also by who does not want to wait: nobody else frees it.
PATIENCE_SECONDS = 2 * SETTLE_SECONDS
_FORGET_SECONDS = 3600.0
_TRIES_AT_A_MOVING_PATH = 32
_SUFFIX = ".ec_lock"
_NO_TOKEN = "0" * 16

_log = logging.getLogger(__name__)


class Directories(Protocol):
    """What is needed of the datastore. FileNotFoundError and FileExistsError are answers, all else an ImagesError."""

    def make_directory(self, path: str) -> None: ...

    def names(self, path: str) -> list[str]: ...

    def read_file(self, path: str, limit: int) -> bytes: ...

    def put_file(self, path: str, content: bytes) -> None:
        """A file that is not there yet, at once or not at all for whoever lists its directory afterwards."""

    def rename(self, source: str, destination: str) -> None: ...

    def remove_tree(self, path: str) -> object: ...


class DirectoryLocks:
    """The locks of one datastore. Threads may share it.

    `monotonic` and `wait` (seconds) are the clock of the timeout, `now` that of the holder's `since`.
    """

    def __init__(
        self,
        directories: Directories,
        name: str,
        *,
        identity: Identity | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._directories = directories
        self._name = name
        self._identity = identity or own_identity()
        self._own_tokens = secrets.token_hex(4)  # how they begin
        self._monotonic, self._wait, self._now = monotonic, wait, now
        self._guard = threading.Lock()  # guards what follows
        self._live: set[str] = set()  # the identities that this process holds locks by, or tries to
        # By path and identity, what may be ours still as the server did not answer; since when it does again.
        self._left: dict[tuple[LockPath, str], float | None] = {}
        self._ended: dict[str, float] = {}  # when identities were first seen to have ended

    def acquire(
        self, path: LockPath, operation: str, timeout: float, check: Callable[[], None] = lambda: None
    ) -> HeldLock:
        """See DatastoreLocks; ImagesError where that has OSError."""
        self.let_go_of_left()
        token = self._own_tokens + secrets.token_hex(4)
        identity = self._identity.with_token(token)
        holder = LockHolder(socket.gethostname(), os.getpid(), process_name(), operation, self._now())
        prepared = _prepared(path, token)
        with self._guard:
            self._live.add(identity)
        try:
            self._acquire(path, prepared, identity, holder, timeout, check)
        except BaseException as error:
            self._failed(path, identity, error)
            with contextlib.suppress(ImagesError, OSError):
                self._directories.remove_tree(prepared)
            raise
        return _HeldDirectoryLock(self, path, prepared, identity)

    def _acquire(
        self,
        path: LockPath,
        prepared: str,
        identity: str,
        holder: LockHolder,
        timeout: float,
        check: Callable[[], None],
    ) -> None:
        began = self._monotonic()
        delay = FIRST_WAIT
        self._prepare(prepared, identity, holder)
        while True:
            other = self._try_once(path, prepared, identity, holder)
            if other is None:
                return
            left = began + (max(timeout, PATIENCE_SECONDS) if other.ended else timeout) - self._monotonic()
            if left <= 0:
                raise LockTimeout(
                    f"lock {self._name}/{path} is held by {other}; gave up after {timeout:g} s: {what_to_do(other)}"
                )
            # Not all at the same moment: each try is a call to the server.
            self._wait(min(delay * random.uniform(0.5, 1.0), left))
            check()
            self.let_go_of_left()  # it may be what this waits for
            delay = min(2 * delay, LONGEST_WAIT)

    def _prepare(self, prepared: str, identity: str, holder: LockHolder) -> None:
        with contextlib.suppress(FileExistsError):
            self._directories.make_directory(prepared)
        self._directories.put_file(f"{prepared}/{identity}", holder.to_bytes())

    def _try_once(self, path: LockPath, prepared: str, identity: str, holder: LockHolder) -> LockHolder | None:
        """Who has the lock; None when it is ours now. FileNotFoundError when there is no directory for it."""
        for _ in range(_TRIES_AT_A_MOVING_PATH):
            try:
                self._directories.rename(prepared, path)
                return None
            except FileExistsError:
                pass
            except FileNotFoundError:
                # Somebody tidied up what was prepared; else there is no directory for the lock, and this says so, too.
                self._prepare(prepared, identity, holder)
                continue
            found = self._look(path)
            if found is None:
                continue
            name, other = found
            if name is None or not self._has_settled(name):
                return self._judged(name, other)
            if self._take_over(path, name, identity):
                with contextlib.suppress(ImagesError, OSError):  # for reading only: who holds it is in the name
                    self._directories.put_file(f"{path}/{identity}", holder.to_bytes())
                with contextlib.suppress(ImagesError, OSError):
                    self._directories.remove_tree(prepared)
                return None
        return LockHolder.unknown(self._now())

    def free_ended(self, path: LockPath) -> LockHolder | None:
        """For who locks in another way: takes away the lock of a process that has ended. Who has it, when it stays."""
        self.let_go_of_left()
        found = self._look(path)
        if found is None:
            return None
        name, other = found
        if name is None or not self._has_settled(name):
            return self._judged(name, other)
        token = self._own_tokens + secrets.token_hex(4)
        identity = self._identity.with_token(token)
        with self._guard:
            self._live.add(identity)
        try:
            taken = self._take_over(path, name, identity)
        except BaseException as error:
            self._failed(path, identity, error)
            raise
        if taken:
            self.release(path, _prepared(path, token), identity)
        else:
            with self._guard:
                self._live.discard(identity)
        return None

    def _failed(self, path: LockPath, identity: str, error: BaseException) -> None:
        """The lock is not got; but the call whose answer was lost may still give it to us."""
        with self._guard:
            if isinstance(error, DatastoreUnavailable):
                self._left[path, identity] = None
            else:
                self._live.discard(identity)

    def _judged(self, name: str | None, holder: LockHolder) -> LockHolder:
        return replace(holder, ended=True) if name is not None and self._has_ended(name) else holder

    def _take_over(self, path: LockPath, ended: str, identity: str) -> bool:
        try:
            self._directories.rename(f"{path}/{ended}", f"{path}/{identity}")
        except FileNotFoundError:
            return False  # somebody else did, or it was let go of
        _log.info("lock taken over path=%s/%s from=%s", self._name, path, ended)
        return True

    def holder(self, path: LockPath) -> LockHolder | None:
        """See DatastoreLocks."""
        found = self._look(path)
        if found is None:
            return None
        name, holder = found
        return None if name is not None and self._has_ended(name) else holder

    def _look(self, path: LockPath) -> tuple[str | None, LockHolder] | None:
        """The holder's identity and description; without the first where it cannot be told; None without a lock."""
        try:
            names = self._directories.names(path)
        except FileNotFoundError:
            return None
        except ImagesError as error:
            if isinstance(error, DatastoreUnavailable):
                raise
            # A file: of a sidecar that has a path to the datastore, where the lock is on the open file.
            return None, self._read(path)
        if len(names) != 1:
            return None, LockHolder.unknown(self._now())
        return names[0], self._read(f"{path}/{names[0]}")

    def _read(self, path: str) -> LockHolder:
        try:
            content = self._directories.read_file(path, MAX_HOLDER_BYTES + 1)
        except (FileNotFoundError, InvalidRequest):  # let go of; or another kind of lock by now
            content = b""
        return LockHolder.from_bytes(content) or LockHolder.unknown(self._now())

    def _has_settled(self, name: str) -> bool:
        """Whether the holder has ended some time ago."""
        if not self._has_ended(name):
            return False
        now = self._monotonic()
        with self._guard:
            self._ended = {each: at for each, at in self._ended.items() if now - at < _FORGET_SECONDS}
            return now - self._ended.setdefault(self._ender(name), now) >= SETTLE_SECONDS

    def _ender(self, name: str) -> str:
        """Who has ended: the process, with all its locks; of this one, only whoever had that lock."""
        holder = Identity.parse(name)
        own = holder is None or holder.is_process_of(self._identity)
        return name if own or holder is None else str(replace(holder, token=_NO_TOKEN))

    def _has_ended(self, name: str) -> bool:
        holder = Identity.parse(name)
        if holder is None:
            return False
        if holder.is_process_of(self._identity):
            with self._guard:
                return holder.token.startswith(self._own_tokens) and name not in self._live
        return holder.has_ended(self._identity)

    def release(self, path: LockPath, prepared: str, identity: str) -> None:
        """Lets go; what the server does not do now is done with a later call. Raises nothing."""
        try:
            self._directories.rename(path, prepared)
        except FileNotFoundError:
            pass  # removed by hand, with its directory
        except (ImagesError, OSError) as error:
            _log.warning("lock left behind path=%s/%s error=%s", self._name, path, error)
            with self._guard:
                self._left[path, identity] = None
            return
        with self._guard:
            self._live.discard(identity)
        with contextlib.suppress(ImagesError, OSError):  # nobody's any more, and the reaper's else
            self._directories.remove_tree(prepared)

    def leave(self, path: LockPath, identity: str) -> None:
        """Holds it until the server has done, or not, what it gave no answer to; then it is let go of."""
        with self._guard:
            self._left[path, identity] = None

    def let_go_of_left(self) -> None:
        """Lets go of what could not be let go of in time: on other hosts it may be waited for. Raises nothing."""
        with self._guard:
            left = list(self._left.items())
        for (path, identity), since in left:
            try:
                there = identity in self._directories.names(path)
            except FileNotFoundError:
                there = False
            except DatastoreUnavailable:
                return  # or each of them would wait for an answer
            except (ImagesError, OSError):
                continue
            now = self._monotonic()
            with self._guard:
                if (path, identity) not in self._left:
                    continue  # another thread has seen to it
                if since is None:
                    self._left[path, identity] = now
                if since is None or now - since < SETTLE_SECONDS:
                    continue
                del self._left[path, identity]
                if not there:
                    self._live.discard(identity)
                    continue
            self.release(path, _prepared(path, secrets.token_hex(8)), identity)


def what_to_do(holder: LockHolder) -> str:
    """About a lock that is a directory."""
    if holder.ended:
        return "try again some seconds later, when it is taken over"
    return (
        "try again when that is done, or end that process if it hangs: its lock is taken over some seconds later, by a "
        "sidecar of its host; if its host is gone for good, remove that directory from the datastore"
    )


def is_made_for(path: LockPath, name: str) -> bool:
    """Whether a name beside a lock is the lock's, or that of one which somebody makes to take it, or has let go of."""
    lock = path.rpartition("/")[2]
    return (
        name == lock
        or re.fullmatch(rf"{re.escape(lock.removesuffix(_SUFFIX))}(\.[0-9a-f]{{16}})+{_SUFFIX}", name) is not None
    )


def _prepared(path: LockPath, token: str) -> str:
    """The name of its own that a lock is made under: one of a lock, too, so that everybody takes it for that."""
    return f"{path.removesuffix(_SUFFIX)}.{token}{_SUFFIX}"


class _HeldDirectoryLock:
    def __init__(self, locks: DirectoryLocks, path: LockPath, prepared: str, identity: str) -> None:
        self._locks, self._path, self._prepared, self._identity = locks, path, prepared, identity
        self._held = True

    @property
    def path(self) -> LockPath:
        return self._path

    def release(self) -> None:
        if self._held:
            self._held = False
            self._locks.release(self._path, self._prepared, self._identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._held and isinstance(error, DatastoreUnavailable):
            # What was asked for under it may be done yet, and must not be to the next holder's work.
            self._held = False
            self._locks.leave(self._path, self._identity)
        self.release()
