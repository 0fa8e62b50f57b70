"""libfuse: the only module that loads one. mfusepy on libfuse 3, or fusepy on libfuse 2.

Both bindings read FUSE_LIBRARY_PATH when they are imported, so they are imported here, and only once it is set. One
process serves one mount with one of them.
"""

import contextlib
import ctypes
import ctypes.util
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from fusefs.attributes import BLOCK_SIZE, Attributes
from fusefs.callbacks import CallableCallbacks, CallableWithAttributes, Callbacks, WithAttributes
from fusefs.filesystem import FileSystem

_log = logging.getLogger(__name__)

BINDINGS = ("mfusepy", "fusepy")

_CAP_SPLICE_READ = 1 << 9
_CAP_READDIRPLUS_AUTO = 1 << 14
_READDIR_PLUS = 1 << 0
_FILL_DIR_PLUS = 1 << 1
_BUFFER_READABLE, _BUFFER_WRITABLE = 0x100, 0x200
# How long the end waits for a call of libfuse that still runs.
_END_SECONDS = 5.0
# Publishing and copying hold a thread each for a while, and must not keep others from being answered.
_THREADS = 64

Options = Mapping[str, str | bool]


class BindingError(Exception):
    """The binding or its library is not there, or does not do what it must."""


class Session:
    """A mount that answers. Its methods may be called from any thread, and when it is over: then they do nothing."""

    def __init__(self, library: Any) -> None:
        """To be made in a callback of libfuse."""
        self._library = library
        self._fuse = ctypes.c_void_p(library.fuse_get_context().contents.fuse)
        self._invalidate: Any = getattr(library, "fuse_invalidate_path", None)
        self._condition = threading.Condition()  # guards what follows
        self._over = False
        self._calls = 0

    def exit(self) -> None:
        """Makes `serve` return after the next request."""
        with self._call() as allowed:
            if allowed:
                self._library.fuse_exit(self._fuse)

    def invalidate(self, paths: Iterable[str]) -> None:
        """Makes the kernel ask again about paths; nothing happens to those of which it never heard."""
        for path in paths if self._invalidate is not None else ():
            with self._call() as allowed:
                if allowed:
                    self._invalidate(self._fuse, os.fsencode(path))

    def end(self) -> None:
        """Lets no further call of libfuse begin. Its session must not be freed before `wait_unused`."""
        with self._condition:
            self._over = True

    def wait_unused(self, seconds: float) -> bool:
        """Whether no call of libfuse is running any more, after so many seconds at most."""
        with self._condition:
            return self._condition.wait_for(lambda: self._calls == 0, seconds)

    @contextlib.contextmanager
    def _call(self) -> Iterator[bool]:
        with self._condition:
            allowed = not self._over
            self._calls += allowed
        try:
            yield allowed
        finally:
            with self._condition:
                self._calls -= allowed
                self._condition.notify_all()


def serve(
    binding: str,
    filesystem: FileSystem,
    mountpoint: str,
    options: Options,
    on_ready: Callable[[Session], None],
    *,
    attributes: bool = False,
) -> None:
    """Mounts, and serves until the mount is gone; calls `on_ready` once, from a thread of libfuse.

    `attributes`: with extended attributes, which cost. `options` are libfuse's, with `entry_timeout` and `attr_timeout`
    among them. Raises BindingError when the mount cannot be made.
    """
    module = _imported(binding)
    library = module._libfuse
    ready: list[Session] = []
    faults: list[str] = []

    def on_init(connection: Any, config: Any) -> None:
        session = Session(library)
        if fault := _set_up(connection, config, options):
            # An exception would be lost in libfuse.
            faults.append(fault)
            session.exit()
            return
        ready.append(session)
        on_ready(session)

    def on_end() -> bool:
        """Whether what libfuse has may be freed: nobody calls it any more."""
        for session in ready:
            session.end()
        return all(session.wait_unused(_END_SECONDS) for session in ready)

    def pid() -> int:
        return int(library.fuse_get_context().contents.pid)

    if binding == "mfusepy":
        kind = WithAttributes if attributes else Callbacks
    else:
        kind = CallableWithAttributes if attributes else CallableCallbacks
    make, extra = _libfuse3(module, on_end) if binding == "mfusepy" else _libfuse2(module)
    callbacks = kind(filesystem, pid, on_init, on_end)
    try:
        make(callbacks, mountpoint, raw_fi=True, foreground=True, **{**options, **extra})
    except RuntimeError as error:
        if ready:
            _log.warning("libfuse ended with an error mountpoint=%s code=%s", mountpoint, error)
    if faults:
        raise BindingError(faults[0])
    if not ready:
        raise BindingError(f"libfuse could not mount at {mountpoint}: its own message says why")


def _set_up(connection: Any, config: Any, options: Options) -> str:
    """Asks libfuse 3 for what listings and writes need to be fast; returns what is wrong."""
    if connection is not None:
        # Spliced data is put into new memory for each write; read, it is in the buffer of the thread that serves it.
        connection.want &= ~(_CAP_READDIRPLUS_AUTO | _CAP_SPLICE_READ)
    if config is not None:
        for name in ("entry_timeout", "attr_timeout"):
            # They were given as options, which libfuse parses itself. Reading them back shows that they took effect,
            # and that the fields of this libfuse's configuration are where the binding believes them to be.
            if abs(getattr(config, name) - float(options[name])) > 1e-6:
                return f"libfuse has another {name} than the {options[name]} s that it was given"
        config.use_ino = 1
        config.hard_remove = 1
    return ""


def _imported(binding: str) -> Any:
    names = ("libfuse3.so.4", "libfuse3.so.3") if binding == "mfusepy" else ("libfuse.so.2",)
    found = _first_loadable([ctypes.util.find_library(names[0].split(".")[0].removeprefix("lib")), *names])
    if found is None:
        package = "fuse3" if binding == "mfusepy" else "libfuse2 and fuse"
        raise BindingError(f"{names[-1]} is not installed: install the package {package}")
    os.environ["FUSE_LIBRARY_PATH"] = found
    try:
        return importlib.import_module("mfusepy" if binding == "mfusepy" else "fuse")
    except ImportError as error:
        raise BindingError(f"the Python package {binding} is not installed: {error}") from error


def _first_loadable(names: Iterable[str | None]) -> str | None:
    for name in names:
        if name:
            try:
                ctypes.CDLL(name)
            except OSError:
                continue
            return name
    return None


def _libfuse2(module: Any) -> tuple[Any, dict[str, str | bool]]:
    # Nothing can make the kernel forget attributes with libfuse 2; and writes are 4 KiB long unless asked for.
    timeouts: dict[str, str | bool] = {"attr_timeout": "0", "entry_timeout": "1"}
    return module.FUSE, {"big_writes": True, "use_ino": True, "hard_remove": True, **timeouts}


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


def _libfuse3(module: Any, on_end: Callable[[], bool]) -> tuple[Any, dict[str, str | bool]]:
    """mfusepy's FUSE with the calls that it has no wrapper for, and the frequent ones without detours."""
    memory_view = ctypes.pythonapi.PyMemoryView_FromMemory
    memory_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    memory_view.restype = ctypes.py_object

    def fill(stat: Any, attributes: Attributes) -> None:
        stat.st_mode = attributes.mode
        stat.st_ino = attributes.inode
        stat.st_nlink = attributes.links
        stat.st_uid = attributes.uid
        stat.st_gid = attributes.gid
        stat.st_size = attributes.size
        stat.st_blocks = attributes.sectors
        stat.st_blksize = BLOCK_SIZE
        seconds, nanoseconds = divmod(attributes.modified_ns, 1_000_000_000)
        modified, changed, accessed = stat.st_mtimespec, stat.st_ctimespec, stat.st_atimespec
        modified.tv_sec = changed.tv_sec = seconds
        modified.tv_nsec = changed.tv_nsec = nanoseconds
        accessed.tv_sec, accessed.tv_nsec = divmod(attributes.accessed_ns, 1_000_000_000)

    class Fuse(module.FUSE):  # type: ignore[misc]
        operations: Callbacks

        def decoded(self, path: bytes | None) -> str | None:
            return None if path is None else path.decode(self.encoding, self.errors)

        def fgetattr(self, path: bytes | None, buffer: Any, fip: Any) -> int:
            handle = fip.contents.fh if fip else None
            fill(buffer.contents, self.operations.filesystem.getattr(self.decoded(path), handle))
            return 0

        def readdir_fuse_3(self, path: bytes | None, buffer: Any, add: Any, offset: int, fip: Any, flags: int) -> int:
            # libfuse drops the attributes of entries that have no offset of their own.
            stat = module.c_stat()
            how = _FILL_DIR_PLUS if flags & _READDIR_PLUS else 0
            for next_offset, name, attributes in self.operations.filesystem.readdir(fip.contents.fh, offset):
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
    return Fuse, {"max_threads": str(_THREADS), "max_idle_threads": "10"} if has_limit else {}
