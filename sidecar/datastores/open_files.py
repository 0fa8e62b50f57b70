"""In use: open disks. Who has a file of an image open, and how to be sure that nobody has while it is taken away.

QEMU holds shared open-file-description (OFD) locks on byte 100 (readers, overlays on the image too) and 101 (writers)
of a disk's descriptor and of its extents. Our own readers lock byte 100 the same way, so one question to the kernel,
"could I have a write lock on the whole file?", answers for all. OFD locks and flock do not see each other.

A reader locks first and then checks that the image is still there; a purge locks first and then renames. Whichever
comes second is refused.
"""

import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

READER_BYTE = 100

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid (0 for OFD locks)
_TO_THE_END = 0
_EXCERPT_CHARACTERS = 200
_DESCRIBED_USERS = 5
_LOOK_AGAIN_SECONDS = 0.02
# After this it is worth it to look who keeps a file open: through every process of the machine.
_LOOK_WHO_SECONDS = 0.1
_FUSE_DEVICE = "/dev/fuse"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileUser:
    """A process that holds a lock on a file; `pid` is None when it is on another host or hidden from this process.

    With `through`, it has the file open in a mount, and that is the mount's daemon, which holds the lock.
    """

    pid: int | None
    process: str
    through: "FileUser | None" = None

    def __str__(self) -> str:
        described = self.process if self.pid is None else f"{self.process} (pid {self.pid})"
        return described if self.through is None else f"{described} through {self.through}"


UNSEEN_USER = FileUser(None, "a process on another host or that this one cannot see")


class FilesInUse(Exception):  # noqa: N818 (named like the errors of the domain)
    """Somebody has one of the files open: `users` says who, and is never empty."""

    def __init__(self, users: tuple[FileUser, ...]) -> None:
        super().__init__(f"in use by {describe(users)}")
        self.users = users


def share_lock(fd: int) -> None:
    """Lock the open file as its reader, until the last copy of the descriptor is closed. Never waits.

    Check that the image is still there after this call, not before it: from here on it cannot be purged.
    The descriptor must be open for reading. Raises BlockingIOError when the file is being taken away, after which
    it is not locked, and OSError for anything else.
    """
    try:
        _set_lock(fd, fcntl.F_RDLCK, READER_BYTE, 1)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "somebody holds the file exclusively: its image is being purged") from None


def open_users(fds: Sequence[int]) -> tuple[FileUser, ...]:
    """Who else holds a lock on any of the open files: ordered by pid, and empty when nobody does.

    A lock held through `fds` themselves does not count; one held through another descriptor of this process does.
    Processes are searched only when the kernel says that there is a lock. Raises OSError when it cannot say.
    """
    if not any(_is_locked(fd) for fd in fds):
        return ()
    users = _lock_holders(fds)
    # Nobody found: gone in the meantime, or out of sight.
    return users or ((UNSEEN_USER,) if any(_is_locked(fd) for fd in fds) else ())


@contextmanager
def exclude_users(fds: Sequence[int], *, patience: float = 0.0) -> Iterator[None]:
    """Hold all the files for oneself: nobody has them locked, and nobody can lock them, until the block ends.

    Waits at most `patience` seconds for a file that may just be being closed: a FUSE file system, such as the mount,
    hears of a close after it, and this process of a caller that is gone. Whoever else has it open, has it open.

    For the rename that takes an image away: lock, then rename. A process that opened a file before, but had not locked
    it yet, can lock it after the block: unlinking the files is then still safe, truncating them is not.

    The descriptors must be open for writing and not be ones that `share_lock` was called with: every lock held
    through them is gone afterwards, also after an error. Raises FilesInUse, and OSError for anything else.
    """
    began = time.monotonic()
    looked = False
    # Asked first, and all or none: what is held while another file is waited for would keep new readers of it out.
    while any(_is_locked(fd) for fd in fds) or not _lock_all(fds):
        waited = time.monotonic() - began
        if waited >= patience:
            raise FilesInUse(open_users(fds) or (UNSEEN_USER,))
        if waited >= _LOOK_WHO_SECONDS and not looked:
            looked = True
            users = open_users(fds)
            if not all(_may_be_closing(user) for user in users):
                raise FilesInUse(users)
        time.sleep(_LOOK_AGAIN_SECONDS)
    try:
        yield
    finally:
        for fd in reversed(fds):
            _unlock(fd)


def describe(users: Sequence[FileUser]) -> str:
    """For a message: `qemu-nbd (pid 123), image-mount (pid 9)`; long lists are cut."""
    described = ", ".join(str(user) for user in users[:_DESCRIBED_USERS])
    more = len(users) - _DESCRIBED_USERS
    return f"{described} and {more} more" if more > 0 else described


def _set_lock(fd: int, kind: int, start: int, length: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        # POSIX lets a held lock be reported as either; no other error means "held".
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(errno.EAGAIN, "locked by another") from None
        raise


def _lock_all(fds: Sequence[int]) -> bool:
    """Locks every one of the files for writing, or none of them when somebody has one locked."""
    with ExitStack() as locked:
        for fd in fds:
            try:
                _set_lock(fd, fcntl.F_WRLCK, 0, _TO_THE_END)
            except BlockingIOError:
                return False
            locked.callback(_unlock, fd)
        locked.pop_all()
    return True


def _unlock(fd: int) -> None:
    """Never fails: what the lock was for is done, and closing the descriptor lets go of it in any case."""
    try:
        _set_lock(fd, fcntl.F_UNLCK, 0, _TO_THE_END)
    except OSError as error:
        _log.warning("file not unlocked error=%s", error)


def _is_locked(fd: int) -> bool:
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, _TO_THE_END, 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))[0]
    return kind != fcntl.F_UNLCK


def _lock_holders(fds: Sequence[int]) -> tuple[FileUser, ...]:
    files = {(status.st_dev, status.st_ino) for status in map(os.fstat, fds)}
    own_pid = os.readlink("/proc/self")  # os.getpid() may count in another PID namespace than /proc does
    own = {f"/proc/{own_pid}/fd/{fd}" for fd in fds}
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
    return tuple(user_of(pid) for pid in pids if _holds_lock(pid, files, own))


def _holds_lock(pid: int, files: set[tuple[int, int]], own: set[str]) -> bool:
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # ended, or another user's
        return False
    for descriptor in descriptors:
        path = f"/proc/{pid}/fd/{descriptor}"
        try:
            # fdinfo first: it names the locks held through this descriptor, and, unlike a stat, never waits for
            # the file system that the file is on.
            locks = _read(f"/proc/{pid}/fdinfo/{descriptor}")
            if path in own or not (b" OFDLCK " in locks or b" POSIX " in locks):
                continue
            status = os.stat(path)
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in files:
            return True
    return False


def _may_be_closing(user: FileUser) -> bool:
    """Whether its file may be one that nobody has open any more, for all that can be told."""
    if user.pid is None or user.pid == int(os.readlink("/proc/self")):
        return True
    try:
        descriptors = os.listdir(f"/proc/{user.pid}/fd")
    except OSError:  # it has ended
        return True
    return any(_leads_to_fuse(f"/proc/{user.pid}/fd/{descriptor}") for descriptor in descriptors)


def _leads_to_fuse(path: str) -> bool:
    try:
        return os.readlink(path) == _FUSE_DEVICE
    except OSError:
        return False


def user_of(pid: int) -> FileUser:
    """The process as a user."""
    try:
        name = _read(f"/proc/{pid}/comm").decode(errors="replace").strip()
        arguments = _read(f"/proc/{pid}/cmdline").decode(errors="replace").split("\0")
    except OSError:
        return FileUser(pid, "a process that has ended")
    # The kernel keeps 15 characters of a name; the command line often has the rest.
    program = os.path.basename(arguments[0])
    process = program if program.startswith(name) else name
    return FileUser(pid, _printable(process))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:_EXCERPT_CHARACTERS])


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
