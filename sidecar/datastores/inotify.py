"""Changes in the directories of a local file system, as the kernel tells them."""

import errno
import logging
import os
import select

from inotify_simple import INotify, flags

from sidecar.datastores.interface import Changes

_MASK = (
    flags.CREATE
    | flags.DELETE
    | flags.MOVED_FROM
    | flags.MOVED_TO
    | flags.CLOSE_WRITE
    | flags.ATTRIB
    | flags.ONLYDIR
    | flags.DONT_FOLLOW
    | flags.EXCL_UNLINK
)

_log = logging.getLogger(__name__)


class InotifyWatcher:
    """A ChangeWatcher for directories below an open root, which outlives it."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._inotify = INotify()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._paths: dict[int, str] = {}
        self._full = False
        self._unwatched = False  # it was logged that a directory cannot be watched

    def watch(self, path: str) -> bool:
        if self._full:
            return False
        try:
            # By way of the root's descriptor: what is watched is what is read, whatever is mounted over the path.
            watch = self._inotify.add_watch(f"/proc/self/fd/{self._root_fd}/{path}", _MASK)
        except (FileNotFoundError, NotADirectoryError):
            return True  # gone again: its collection says so
        except OSError as error:
            if error.errno != errno.ENOSPC:
                self._note_unwatched(path, error)
                return True  # that one is looked at again, as all are, now and then
            self._full = True
            _log.warning("inotify watches used up path=%s see=fs.inotify.max_user_watches", path)
            return False
        self._paths[watch] = path
        return True

    def _note_unwatched(self, path: str, error: OSError) -> None:
        if not self._unwatched:
            self._unwatched = True
            _log.warning("directories not watched, this one and maybe others path=%s error=%s", path, error.strerror)

    def wait(self, timeout: float) -> Changes:
        ready, _, _ = select.select([self._inotify.fileno(), self._wake_fd], [], [], timeout)
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        names: dict[str, set[str]] = {}
        lost = False
        if self._inotify.fileno() in ready:
            for event in self._inotify.read(timeout=0):
                if event.mask & flags.Q_OVERFLOW:
                    lost = True
                elif event.mask & flags.IGNORED:
                    self._paths.pop(event.wd, None)
                elif event.wd in self._paths:
                    names.setdefault(self._paths[event.wd], set()).add(event.name)
        return Changes(names, lost)

    def wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        self._inotify.close()
        os.close(self._wake_fd)
