"""libfuse: the only module that loads one. mfusepy on libfuse 3, or fusepy on libfuse 2.

Both bindings read FUSE_LIBRARY_PATH when they are imported, so they are imported here, and only once it is set. One
process serves one mount with one of them.
"""

import contextlib
import ctypes
import ctypes.util
import errno
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fusefs.callbacks import CallableCallbacks, CallableWithAttributes, Callbacks, WithAttributes
from fusefs.filesystem import FileSystem
from fusefs.libfuse3 import with_libfuse3

_log = logging.getLogger(__name__)

BINDINGS = ("mfusepy", "fusepy")

_CAP_SPLICE_READ = 1 << 9
_CAP_READDIRPLUS_AUTO = 1 << 14
# How long the end waits for a call of libfuse that still runs.
_END_SECONDS = 5.0

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
        library.fuse_get_session.restype = ctypes.c_void_p
        self._channel = ctypes.c_void_p(library.fuse_get_session(self._fuse))
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

    def forget_name(self, parent: int, name: bytes) -> None:
        """Makes the kernel look up a name again, in the directory of this number; not to be called in a callback.

        OSError when it could not; that the kernel does not know the name is none.
        """
        if self._invalidate is None:
            return  # libfuse 2: the kernel is told to keep names for a moment only
        with self._call() as allowed:
            if not allowed:
                return
            forget = self._library.fuse_lowlevel_notify_inval_entry
            result = forget(self._channel, ctypes.c_uint64(parent), name, ctypes.c_size_t(len(name)))
        if result not in {0, -errno.ENOENT}:
            raise OSError(-result, os.strerror(-result), os.fsdecode(name))

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
    make, extra = with_libfuse3(module, on_end) if binding == "mfusepy" else _libfuse2(module)
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
        if "max_read" in options:
            # The kernel has it as an option of the mount, and libfuse wants to be told the same once more.
            connection.max_read = int(options["max_read"])
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
