"""Renaming without replacing what is at the destination."""

import ctypes
import errno
import os

_RENAME_NOREPLACE = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]


def rename_no_replace(source_parent: int, source: str, parent: int, name: str) -> None:
    """Moves `source` in one open directory to `name` in another; FileExistsError when something is there.

    NFS cannot do it in one step. There, the look before the rename is a race with writers that take no lock; ours
    all hold the image's lock, and rename(2) itself refuses to replace a directory that is not empty.
    """
    if _libc.renameat2(source_parent, os.fsencode(source), parent, os.fsencode(name), _RENAME_NOREPLACE) == 0:
        return
    problem = ctypes.get_errno()
    if problem not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(problem, os.strerror(problem), name)
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(source, name, src_dir_fd=source_parent, dst_dir_fd=parent)
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
