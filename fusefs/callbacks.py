"""The file system in the form in which the bindings of libfuse call it."""

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

from fusefs.attributes import BLOCK_SIZE, Attributes
from fusefs.files import Opened
from fusefs.filesystem import FileSystem


class Callbacks:
    """The file system in the form in which both bindings call it: with paths, and file infos instead of handles.

    What is not here is answered with ENOSYS by libfuse: asking for extended attributes among it, which the kernel then
    stops to do. Setting them is accepted where a copier does it, as permissions are, and changes nothing.
    """

    use_ns = True

    def __init__(
        self,
        filesystem: FileSystem,
        pid: Callable[[], int],
        on_init: Callable[[Any, Any], None],
        on_end: Callable[[], object],
    ) -> None:
        """`pid` tells which thread the running request comes from; `on_init` gets libfuse 3's connection and config.

        `on_end` is called before libfuse frees its session.
        """
        self.filesystem = filesystem
        self.files = filesystem.files
        self._pid = pid
        self._on_init = on_init
        self._on_end = on_end

    def init(self, path: str) -> None:
        self._on_init(None, None)

    def init_with_config(self, connection: Any, config: Any) -> None:
        self._on_init(connection, config)

    def destroy(self, path: str) -> None:
        self._on_end()

    def getattr(self, path: str | None, fi: Any = None) -> dict[str, Any]:
        return as_dictionary(self.filesystem.getattr(path, _handle(fi)))

    def opendir(self, path: str) -> int:
        return self.filesystem.opendir(path, self._pid())

    def readdir(self, path: str | None, handle: int) -> Iterator[tuple[str, dict[str, Any], int]]:
        for _, name, attributes in self.filesystem.readdir(handle, 0):
            yield name, as_dictionary(attributes), 0

    def releasedir(self, path: str | None, handle: int) -> int:
        self.filesystem.releasedir(handle)
        return 0

    def fsyncdir(self, path: str | None, datasync: int, handle: int) -> int:
        self.filesystem.fsyncdir(handle)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        capacity = self.filesystem.statfs(path)
        return {
            "f_bsize": capacity.block_size,
            "f_frsize": capacity.block_size,
            "f_blocks": capacity.blocks,
            "f_bfree": capacity.free,
            "f_bavail": capacity.available,
            "f_files": capacity.files,
            "f_namemax": 255,
        }

    def mkdir(self, path: str, mode: int) -> int:
        self.filesystem.mkdir(path, self._pid())
        return 0

    def unlink(self, path: str) -> int:
        self.filesystem.unlink(path, self._pid())
        return 0

    def rmdir(self, path: str) -> int:
        self.filesystem.rmdir(path, self._pid())
        return 0

    def rename(self, old: str, new: str, flags: int = 0) -> int:
        self.filesystem.rename(old, new, flags, self._pid())
        return 0

    def link(self, target: str, source: str) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def symlink(self, target: str, source: str) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def mknod(self, path: str, mode: int, device: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def open(self, path: str, fi: Any) -> int:
        return _opened(fi, self.files.open(path, fi.flags, self._pid()))

    def create(self, path: str, mode: int, fi: Any) -> int:
        return _opened(fi, self.files.create(path, fi.flags, self._pid()))

    def read(self, path: str | None, size: int, offset: int, fi: Any) -> bytes:
        return self.files.read(fi.fh, size, offset)

    def write(self, path: str | None, data: bytes | memoryview, offset: int, fi: Any) -> int:
        return self.files.write(fi.fh, memoryview(data), offset, self._pid())

    def copy_file_range(self, fi_in: Any, offset_in: int, fi_out: Any, offset_out: int, size: int) -> int:
        return self.files.copy_file_range(fi_in.fh, offset_in, fi_out.fh, offset_out, size)

    def lseek(self, fi: Any, offset: int, whence: int) -> int:
        return self.files.lseek(fi.fh, offset, whence)

    def truncate(self, path: str | None, size: int, fi: Any = None) -> int:
        self.files.truncate(path, size, self._pid(), _handle(fi))
        return 0

    def fallocate(self, path: str | None, mode: int, offset: int, size: int, fi: Any) -> int:
        self.files.fallocate(fi.fh, mode, offset, size)
        return 0

    def flush(self, path: str | None, fi: Any) -> int:
        self.files.flush(fi.fh, self._pid())
        return 0

    def release(self, path: str | None, fi: Any) -> int:
        self.files.release(fi.fh)
        return 0

    def fsync(self, path: str | None, datasync: int, fi: Any) -> int:
        self.files.fsync(fi.fh)
        return 0

    def chmod(self, path: str | None, mode: int, fi: Any = None) -> int:
        self.filesystem.chmod(path, _handle(fi))
        return 0

    def chown(self, path: str | None, uid: int, gid: int, fi: Any = None) -> int:
        self.filesystem.chmod(path, _handle(fi))
        return 0

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        self.filesystem.setxattr(path)
        return 0

    def removexattr(self, path: str, name: str) -> int:
        self.filesystem.setxattr(path)
        return 0

    def utimens(self, path: str | None, times: tuple[int, int] | None, fi: Any = None) -> int:
        self.filesystem.utimens(path, times, _handle(fi))
        return 0


class WithAttributes(Callbacks):
    """With extended attributes: the kernel asks for several at each entry of an `ls -l`, and for one at each write."""

    def listxattr(self, path: str) -> list[str]:
        return self.filesystem.listxattr(path)

    def getxattr(self, path: str, name: str) -> bytes:
        return self.filesystem.getxattr(path, name)


class CallableCallbacks(Callbacks):
    """As fusepy calls: one method, which is told the operation."""

    def __call__(self, operation: str, *arguments: Any) -> Any:
        return getattr(self, operation)(*arguments)


class CallableWithAttributes(CallableCallbacks, WithAttributes):
    pass


def as_dictionary(attributes: Attributes) -> dict[str, Any]:
    return {
        "st_mode": attributes.mode,
        "st_uid": attributes.uid,
        "st_gid": attributes.gid,
        "st_ino": attributes.inode,
        "st_nlink": attributes.links,
        "st_size": attributes.size,
        "st_blocks": attributes.sectors,
        "st_blksize": BLOCK_SIZE,
        "st_atime": attributes.accessed_ns,
        "st_mtime": attributes.modified_ns,
        "st_ctime": attributes.modified_ns,
    }


def _handle(fi: Any) -> int | None:
    return fi.fh if fi is not None else None


def _opened(fi: Any, opened: Opened) -> int:
    fi.fh = opened.handle
    fi.keep_cache = opened.keep_cache
    fi.direct_io = opened.direct_io
    return 0
