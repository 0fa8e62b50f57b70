"""What mfusepy lacks on libfuse 3: calls without a wrapper, the frequent ones without detours, and an orderly end."""

import ctypes
import threading
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from struct import Struct
from typing import Any

from fusefs.attributes import BLOCK_SIZE, Attributes
from fusefs.callbacks import Callbacks

_READDIR_PLUS = 1 << 0
_FILL_DIR_PLUS = 1 << 1
_BUFFER_READABLE, _BUFFER_WRITABLE = 0x100, 0x200
# Publishing and copying hold a thread each for a while, and must not keep others from being answered.
_THREADS = 64
_SECOND = 1_000_000_000


class _Arguments(ctypes.Structure):
    """struct fuse_args"""

    _fields_ = (("count", ctypes.c_int), ("texts", ctypes.POINTER(ctypes.c_char_p)), ("allocated", ctypes.c_int))


class _CommandLine(ctypes.Structure):
    """struct fuse_cmdline_opts"""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("singlethread", "foreground", "debug", "nodefault_subtype")),
        ("mountpoint", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("show_version", "show_help", "clone_fd")),
        *((name, ctypes.c_uint) for name in ("max_idle_threads", "max_threads")),
    )


class _OldLoop(ctypes.Structure):
    """struct fuse_loop_config, before libfuse 3.12"""

    _fields_ = (("clone_fd", ctypes.c_int), ("max_idle_threads", ctypes.c_uint))


def _main3(
    library: Any, on_end: Callable[[], bool], count: int, texts: Any, operations: Any, size: int, data: None
) -> int:
    """fuse_main_real, but for its end: that frees what is known of paths, while other threads may invalidate some.

    libfuse tells nobody before it does (its `destroy` comes after that), so its loop is called from here.
    """
    arguments, line = _Arguments(count, texts, 0), _CommandLine()
    if library.fuse_parse_cmdline(ctypes.byref(arguments), ctypes.byref(line)) != 0:
        return 1
    library.fuse_new.restype = ctypes.c_void_p
    fuse = ctypes.c_void_p(library.fuse_new(ctypes.byref(arguments), operations, ctypes.c_size_t(size), data))
    if not fuse:
        return 3
    if library.fuse_mount(fuse, line.mountpoint) != 0:
        library.fuse_destroy(fuse)
        return 4
    library.fuse_daemonize(1)  # in the foreground, but in the root directory
    failed = library.fuse_loop_mt(fuse, _loop(library, line)) != 0
    unused = on_end()
    library.fuse_unmount(fuse)
    # Who waited for a page that nobody reads any more goes on now. Else it is not freed: the process ends soon.
    if unused or on_end():
        library.fuse_destroy(fuse)
    return 8 if failed else 0


def _loop(library: Any, line: _CommandLine) -> Any:
    """How many threads serve."""
    if not hasattr(library, "fuse_loop_cfg_create"):
        return ctypes.byref(_OldLoop(0, line.max_idle_threads))
    library.fuse_loop_cfg_create.restype = ctypes.c_void_p
    loop = ctypes.c_void_p(library.fuse_loop_cfg_create())
    library.fuse_loop_cfg_set_idle_threads(loop, line.max_idle_threads)
    library.fuse_loop_cfg_set_max_threads(loop, line.max_threads)
    return loop


_STAT_FIELDS = (
    *(
        (name, 0)
        for name in ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blksize", "st_blocks")
    ),
    *((name, part) for name in ("st_atimespec", "st_mtimespec", "st_ctimespec") for part in (0, 1)),
)


def _filling(stat: Any) -> Callable[[Any, Attributes], None]:
    """What writes a struct stat in one step: a field at a time takes longer than all else in a listing."""
    places = []
    for name, part in _STAT_FIELDS:
        field = getattr(stat, name)
        size = field.size // 2 if name.endswith("timespec") else field.size
        places.append((field.offset + part * size, size))
    order = sorted(range(len(places)), key=places.__getitem__)  # systems differ in it
    layout, end = "=", 0
    for offset, size in map(places.__getitem__, order):
        layout += f"{offset - end}x{'Q' if size == 8 else 'I'}"
        end = offset + size
    pack, arranged = Struct(layout).pack_into, itemgetter(*order)

    def fill(target: Any, attributes: Attributes) -> None:
        mode, inode, links, uid, gid, size, sectors, accessed_ns, modified_ns = attributes
        accessed, modified = divmod(accessed_ns, _SECOND), divmod(modified_ns, _SECOND)
        values = (inode, mode, links, uid, gid, size, BLOCK_SIZE, sectors, *accessed, *modified, *modified)
        pack(target, 0, *arranged(values))

    return fill


_known = threading.local()


def _stay_known() -> None:
    """Python keeps what it knows of a thread of libfuse's from one call to the next, instead of making it anew.

    That is a fifth of the cost of a small request. The threads live as long as the mount: idle ones are not ended.
    """
    if not hasattr(_known, "kept"):
        ctypes.pythonapi.PyGILState_Ensure()
        _known.kept = True


def with_libfuse3(module: Any, on_end: Callable[[], bool]) -> tuple[Any, dict[str, str | bool]]:
    """mfusepy's FUSE with the calls that it has no wrapper for, and the frequent ones without detours."""
    memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
    memory_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    memory_view.restype = ctypes.py_object

    fill = _filling(module.c_stat)

    class Fuse(module.FUSE):  # type: ignore[misc]
        operations: Callbacks

        def _wrapper(self, method: Any, *arguments: Any, **options: Any) -> int:
            _stay_known()
            return int(super()._wrapper(method, *arguments, **options))

        def decoded(self, path: bytes | None) -> str | None:
            return None if path is None else path.decode(self.encoding, self.errors)

        def fgetattr(self, path: bytes | None, buffer: Any, fip: Any) -> int:
            handle = fip.contents.fh if fip else None
            fill(buffer.contents, self.operations.filesystem.getattr(self.decoded(path), handle))
            return 0

        def readdir_fuse_3(self, path: bytes | None, buffer: Any, add: Any, offset: int, fip: Any, flags: int) -> int:
            # libfuse drops the attributes of entries that have no offset of their own.
            stat = module.c_stat()
            handle, filesystem = fip.contents.fh, self.operations.filesystem
            how = _FILL_DIR_PLUS if flags & _READDIR_PLUS and filesystem.is_current(handle) else 0
            for next_offset, name, attributes in filesystem.readdir(handle, offset):
                fill(stat, attributes)
                if add(buffer, name.encode(self.encoding, self.errors), stat, next_offset, how) != 0:
                    break
            return 0

        def read(self, path: bytes | None, buffer: Any, size: int, offset: int, fip: Any) -> int:
            view = memory_view(ctypes.addressof(buffer.contents), size, _BUFFER_WRITABLE)
            return self.operations.files.read_into(fip.contents.fh, view, offset)

        def write(self, path: bytes | None, buffer: Any, size: int, offset: int, fip: Any) -> int:
            view = memory_view(ctypes.addressof(buffer.contents), size, _BUFFER_READABLE)
            return self.operations.write(None, view, offset, fip.contents)

        def copy_file_range(
            self, path_in: bytes | None, fip_in: Any, offset_in: int,
            path_out: bytes | None, fip_out: Any, offset_out: int, size: int, flags: int,
        ) -> int:  # fmt: skip
            return self.operations.copy_file_range(fip_in.contents, offset_in, fip_out.contents, offset_out, size)

        def lseek(self, path: bytes | None, offset: int, whence: int, fip: Any) -> int:
            return self.operations.lseek(fip.contents, offset, whence)

        def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
            return self.operations.rename(self.decoded(old) or "", self.decoded(new) or "", flags)

        def truncate_fuse_3(self, path: bytes | None, size: int, fip: Any) -> int:
            return self.operations.truncate(self.decoded(path), size, fip.contents if fip else None)

        def chmod_fuse_3(self, path: bytes | None, mode: int, fip: Any) -> int:
            return self.operations.chmod(self.decoded(path), mode, fip.contents if fip else None)

        def chown_fuse_3(self, path: bytes | None, uid: int, gid: int, fip: Any) -> int:
            return self.operations.chown(self.decoded(path), uid, gid, fip.contents if fip else None)

        def utimens_fuse_3(self, path: bytes | None, times: Any, fip: Any) -> int:
            pair = None
            if times:
                accessed, modified = times.contents.actime, times.contents.modtime
                pair = (
                    accessed.tv_sec * 1_000_000_000 + accessed.tv_nsec,
                    modified.tv_sec * 1_000_000_000 + modified.tv_nsec,
                )
            return self.operations.utimens(self.decoded(path), pair, fip.contents if fip else None)

    module.fuse_main_real = partial(_main3, module._libfuse, on_end)
    has_limit = (module.fuse_version_major, module.fuse_version_minor) >= (3, 12)
    return Fuse, {"max_threads": str(_THREADS), "max_idle_threads": str(_THREADS)} if has_limit else {}
