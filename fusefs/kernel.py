"""What the kernel remembers of the mount, and is made to forget.

It keeps a name for `entry_timeout` seconds after the lookup that found it. A name that goes without the kernel's doing,
because another host deleted the image or because what was staged is dropped, would be taken for a directory until then.
"""

import contextlib
import ctypes
import errno
import logging
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from fusefs.binding import Session

_log = logging.getLogger(__name__)

_AT_FDCWD = -100
_AT_HANDLE_FID = 0x200  # a handle to know the inode by, where one to open it with is not given
_FUSE_HANDLE = 0x81  # of type FILEID_INO64_GEN: libfuse's number of the node, and a generation
_MOST_HANDLE_BYTES = 128


class _FileHandle(ctypes.Structure):
    """struct file_handle"""

    _fields_ = (("size", ctypes.c_uint), ("type", ctypes.c_int), ("content", ctypes.c_ubyte * _MOST_HANDLE_BYTES))


@dataclass(frozen=True, slots=True)
class _Order:
    """To have the kernel ask again about paths, and forget the name that a path ends with; then to call `then`."""

    changed: Iterable[str]
    gone: str
    then: Callable[[], None] = lambda: None


class KernelMemory:
    """Owns a thread: `start`, then `stop`, which joins it. Does nothing while there is no session.

    Who makes the kernel forget waits, in the kernel and deaf to every signal, for the requests that are under way in
    that directory. So it has to be over before the session stops to answer: else neither ever ends.
    """

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = mountpoint
        self._session: Session | None = None
        self._idle = threading.Condition()  # guards the number
        self._running = 0  # calls that make the kernel forget
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, is_there: Callable[[str], bool]) -> None:
        """`is_there` tells of a path in the mount whether it leads to something now."""
        self._thread = threading.Thread(target=self._run, args=(is_there,), name="forget", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the kernel is not being made to forget anything, and will not be any more."""
        with self._idle:
            self._session = None
        self._orders.put(None)
        if self._thread is not None:
            self._thread.join()
        with self._idle:
            self._idle.wait_for(lambda: not self._running)

    def serve(self, session: Session) -> None:
        """The mount answers."""
        self._session = session

    def changed(self, paths: Iterable[str]) -> None:
        """Makes the kernel ask again what is at the paths."""
        with self._forgetting() as session:
            if session is not None:
                session.invalidate(paths)

    def gone(self, path: str) -> None:
        """Makes the kernel forget the name, soon: whoever calls may be answering a request in the same directory.

        The kernel holds that directory until the answer, and could not forget a name in it before.
        """
        self._orders.put(_Order((), path))

    def replaced(self, directory: str, names: Iterable[str], told: Callable[[], None]) -> None:
        """Makes the kernel ask again about a directory and names in it, soon, and calls `told` afterwards."""
        self._orders.put(_Order((directory, *(f"{directory}/{name}" for name in names)), directory, told))

    def _run(self, is_there: Callable[[str], bool]) -> None:
        while (order := self._orders.get()) is not None:
            try:
                self._carry_out(order, is_there)
            except OSError as error:
                # It is forgotten by itself when its time is over.
                _log.info("name not forgotten at once path=%s cause=%s", order.gone, error)
            except Exception:
                # The thread must outlive a defect: without it names would gather, and be told to nobody.
                _log.exception("name not forgotten at once path=%s", order.gone)

    def _carry_out(self, order: _Order, is_there: Callable[[str], bool]) -> None:
        with self._forgetting() as session:
            try:
                if session is not None:
                    session.invalidate(order.changed)
            finally:
                order.then()
            if session is not None and not is_there(order.gone):
                parent, _, name = order.gone.rpartition("/")
                session.forget_name(node_number(self._mountpoint + parent), os.fsencode(name))

    @contextlib.contextmanager
    def _forgetting(self) -> Iterator[Session | None]:
        """The session, which is not ended by us before the block is; None when there is none."""
        with self._idle:
            session = self._session
            self._running += 1
        try:
            yield session
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()


def node_number(path: str) -> int:
    """The number by which libfuse and the kernel know the directory at an absolute path; OSError when it has none."""
    library = ctypes.CDLL(None, use_errno=True)
    handle, mount = _FileHandle(), ctypes.c_int()
    handle.size = _MOST_HANDLE_BYTES
    for flags in (0, _AT_HANDLE_FID):
        arguments = (ctypes.byref(handle), ctypes.byref(mount), flags)
        if library.name_to_handle_at(_AT_FDCWD, os.fsencode(path), *arguments) == 0:
            break
        if (number := ctypes.get_errno()) != errno.EOPNOTSUPP or flags:
            raise OSError(number, os.strerror(number), path)
    if handle.type != _FUSE_HANDLE:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), path)  # something else is mounted there
    high, low = struct.unpack_from("=II", bytes(handle.content))
    return int(high << 32 | low)
