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
from typing import NamedTuple

from fusefs.binding import Session

_log = logging.getLogger(__name__)

_AT_FDCWD = -100
_AT_HANDLE_FID = 0x200  # a handle to know the inode by, where one to open it with is not given
_FUSE_HANDLE = 0x81  # of type FILEID_INO64_GEN: libfuse's number of the node, and a generation
_MOST_HANDLE_BYTES = 128


class _FileHandle(ctypes.Structure):
    """struct file_handle"""

    _fields_ = (("size", ctypes.c_uint), ("type", ctypes.c_int), ("content", ctypes.c_ubyte * _MOST_HANDLE_BYTES))


class _Change(NamedTuple):
    """The kernel is to ask again about paths; then `told` is to be called."""

    directory: str  # whose name is to be forgotten if it leads to nothing
    paths: Iterable[str]
    told: Callable[[], None]


class KernelMemory:
    """Owns threads: `start`, then `stop`, which joins them. Does nothing while there is no session.

    Who makes the kernel forget waits, in the kernel and deaf to every signal, for the requests that are under way in
    that directory. So it has to be over before the session stops to answer: else neither ever ends.
    """

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = mountpoint
        self._session: Session | None = None
        self._idle = threading.Condition()  # guards what follows
        self._running = 0  # calls that make the kernel forget
        self._stopped = False
        # Apart: what has a name forgotten waits for its directory, for as long as a request in it takes.
        self._changed: queue.SimpleQueue[_Change | None] = queue.SimpleQueue()
        self._gone: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, is_there: Callable[[str], bool]) -> None:
        """`is_there` tells of a path in the mount whether it leads to something now."""
        self._threads = [
            threading.Thread(target=self._tell, name="tell", daemon=True),
            threading.Thread(target=self._forget, args=(is_there,), name="forget", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when the kernel is not being made to forget anything, and will not be any more."""
        with self._idle:
            self._session = None
            self._stopped = True
            self._changed.put(None)
        self._gone.put(None)
        for thread in self._threads:
            thread.join()
        with self._idle:
            self._idle.wait_for(lambda: not self._running)

    def serve(self, session: Session) -> None:
        """The mount answers."""
        with self._idle:
            if not self._stopped:
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
        self._gone.put(path)

    def replaced(self, directory: str, paths: Iterable[str], told: Callable[[], None]) -> None:
        """Makes the kernel ask again about a directory and other paths, soon; calls `told` then.

        The directory's own name is forgotten if it leads to nothing. After `stop` the kernel is told of nothing any
        more, and `told` is called at once: whoever waits for it would wait in vain.
        """
        with self._idle:
            if not self._stopped:
                self._changed.put(_Change(directory, paths, told))
                return
        told()

    def _tell(self) -> None:
        while (change := self._changed.get()) is not None:
            try:
                self.changed({change.directory, *change.paths})
            except Exception:
                # The thread must outlive a defect: without it nothing that changed could be opened any more.
                _log.exception("kernel not told of a change path=%s", change.directory)
            finally:
                change.told()
            self._gone.put(change.directory)

    def _forget(self, is_there: Callable[[str], bool]) -> None:
        while (path := self._gone.get()) is not None:
            with self._forgetting() as session:
                try:
                    if session is None or is_there(path):
                        continue
                    parent, _, name = path.rpartition("/")
                    session.forget_name(node_number(self._mountpoint + parent), os.fsencode(name))
                except OSError as error:
                    # It is forgotten by itself when its time is over.
                    _log.info("name not forgotten at once path=%s cause=%s", path, error)
                except Exception:
                    # The thread must outlive a defect: without it names would gather, and be told to nobody.
                    _log.exception("name not forgotten at once path=%s", path)

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
