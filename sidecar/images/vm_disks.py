"""The disks of a VM, and the images that they are made on.

Every file in a VM's directory is looked at, what its configuration names, and what those disks name as their parents,
from one to the next: in the VM's directory, in another one's, outside every datastore, until an image is reached.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sidecar.datastores.posix_files import read_up_to
from sidecar.errors import DatastoreDenied, DatastoreUnavailable, ImagesError, InvalidDisk, UseUnknown
from sidecar.images.disk_parents import Alternatives, Named, names_in
from sidecar.images.image import ImageKey
from sidecar.images.store import ImageStore
from sidecar.images.usage_paths import Located, Places
from sidecar.images.vmx import CONFIGURATION_SUFFIXES, MAX_CONFIGURATION_BYTES, display_name, files_named

_MOST_FILES = 10_000  # of one VM
_LONGEST_CHAIN = 256
_TRIES = 3
_DRIVES = (2, 11)  # majors of floppy and CD-ROM: no disk is there, and to ask one without a medium is slow, or an error
_ADVICE = "it is not known which images it uses, so none can be purged: repair that, or remove the VM, and try again"


class _ChangedError(Exception):
    """A file that was listed is gone: what came in its place may not be in the list."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the VM: its path as the VM has it, the one without links, and what it is made on, or why not known."""

    path: str
    real: str
    named: Named | InvalidDisk


class VmDisks:
    """The disks of one VM, for one look at them."""

    def __init__(self, places: Places, store: ImageStore, vm_directory: str) -> None:
        self._places, self._store, self._vm_directory = places, store, vm_directory
        self._top = f"{store.datastore.root_path}/{vm_directory}"
        name = os.path.basename(vm_directory)
        self._name = name.removeprefix("vm_") or name
        self._disks: dict[ImageKey, dict[str, None]] = {}  # those that need an image, by their paths, in order
        self._followed: set[str] = set()

    def images(self) -> tuple[str, dict[ImageKey, list[str]]]:
        """The VM's name, and the images that its disks need, there or not, each with the paths of those disks.

        No images when the VM is gone. UseUnknown, DatastoreDenied or DatastoreUnavailable, with the VM and the file,
        when anything of it cannot be read.
        """
        for _ in range(_TRIES):
            self._disks, self._followed = {}, set()
            try:
                self._look()
            except _ChangedError:
                if self._is_gone():
                    return self._name, {}
                continue
            return printable(self._name), {key: list(map(printable, disks)) for key, disks in self._disks.items()}
        raise self._unknown(self._top, "files in it vanish while it is read, or another file system is mounted there")

    def _look(self) -> None:
        files = [self._file(path, real) for path, real in self._list()]
        named: list[tuple[Alternatives, _File]] = []
        for file in files:
            if file.path.casefold().endswith(CONFIGURATION_SUFFIXES):
                named += [(names, file) for names in self._configured(file)]
        raw = {
            located.path
            for file in files
            if isinstance(file.named, Named)
            for names in file.named.raw
            for located in self._candidates(names, file)
        }
        for file in files:
            if file.real not in raw:
                self._follow_file(file, file.path, ())
        for names, file in named:
            self._follow(names, file, os.path.join(os.path.dirname(file.path), names[0]), (), is_parent=False)

    def _list(self) -> list[tuple[str, str]]:
        """Every file of the VM that may be a disk, also through links: its path, and the one without links."""
        found: list[tuple[str, str]] = []
        seen: set[tuple[int, int]] = set()
        waiting = [(self._top, "")]  # each with the path without links, where that is known
        while waiting:
            path, real = waiting.pop()
            located = Located(real, ()) if real else self._locate(path)
            self._note(located, path)
            if not located.path:
                continue
            with self._reading(path):
                status = _status(located.path)
                if status is None:
                    if not os.path.islink(path):
                        raise _ChangedError
                    # A directory of disks, or the VM's own, on what is not mounted now. Locks of ESX may be such links.
                    if not located.keys and not os.path.basename(path).startswith("."):
                        raise self._unknown(path, "it is a link to what is not there")
                elif _may_be_disk(status):
                    found.append((path, located.path))
                elif stat.S_ISDIR(status.st_mode) and (status.st_dev, status.st_ino) not in seen and not located.keys:
                    seen.add((status.st_dev, status.st_ino))
                    with os.scandir(located.path) as entries:
                        waiting += [(f"{path}/{entry.name}", self._known(entry)) for entry in entries]
            if len(found) + len(waiting) > _MOST_FILES:
                raise self._unknown(path, f"the VM has more than {_MOST_FILES} files")
        return sorted(found)

    def _known(self, entry: os.DirEntry[str]) -> str:
        """The path without links of what is in a directory that is no image's; empty when it has to be located."""
        return "" if entry.is_symlink() or self._places.is_mount(entry.path) else entry.path

    def _file(self, path: str, real: str) -> _File:
        with self._reading(path), _opened(real) as fd:
            size = os.lseek(fd, 0, os.SEEK_END)  # its status has none of a block device
            try:
                return _File(path, real, names_in(real, size, lambda offset, length: os.pread(fd, length, offset)))
            except InvalidDisk as fault:
                return _File(path, real, fault)

    def _configured(self, file: _File) -> list[Alternatives]:
        with self._reading(file.path), _opened(file.real) as fd:
            text = read_up_to(fd, MAX_CONFIGURATION_BYTES + 1)
        if len(text) > MAX_CONFIGURATION_BYTES:
            raise self._unknown(file.path, f"a configuration has at most {MAX_CONFIGURATION_BYTES} bytes")
        self._name = display_name(text) or self._name
        return files_named(text)

    def _follow_file(self, file: _File, disk: str, chain: tuple[str, ...]) -> None:
        """Everything that a file is made on, for the VM's `disk`; `chain` are the files that led to it."""
        if file.real in chain:
            raise self._unknown(file.path, f"the chain of its parents comes back to it, from {chain[-1]}")
        if file.real in self._followed:
            return
        self._followed.add(file.real)
        chain = (*chain, file.real)
        if len(chain) > _LONGEST_CHAIN:
            raise self._unknown(file.path, f"the chain of parents to it is longer than {_LONGEST_CHAIN}")
        if isinstance(file.named, InvalidDisk):
            raise self._unknown(file.path, file.named.message)
        for names in file.named.extents:
            for located in self._candidates(names, file):
                self._note(located, disk)
        for names in file.named.parents:
            self._follow(names, file, disk, chain, is_parent=True)

    def _follow(self, names: Alternatives, file: _File, disk: str, chain: tuple[str, ...], *, is_parent: bool) -> None:
        """What `file` names, in every way to read that. A parent that is neither an image nor there is an error."""
        known = not is_parent and not names[0].casefold().endswith(".vmdk")
        for located in self._candidates(names, file):
            self._note(located, disk)
            known = known or bool(located.keys)
            with self._reading(located.path or names[0]):
                status = _status(located.path) if located.path else None
            if status is None:
                continue
            known = True
            if _may_be_disk(status):
                self._follow_file(self._file(located.path, located.path), disk, chain)
        if not known:
            raise self._unknown(file.path, f"it names {names[0]!r}, which is not there")

    def _candidates(self, names: Alternatives, file: _File) -> list[Located]:
        """Where a name in a file may lead: relative to where the VM has the file, and to where it is."""
        directories = dict.fromkeys((os.path.dirname(file.path), os.path.dirname(file.real)))
        paths = (path for name in names for base in directories for path in self._places.readings(name, base))
        return list(dict.fromkeys(map(self._locate, dict.fromkeys(paths))))

    def _locate(self, path: str) -> Located:
        try:
            with self._reading(path):
                return self._places.locate(path)
        except ValueError:
            raise self._unknown(self._top, f"{path!r} in it can be no path") from None

    def _note(self, located: Located, disk: str) -> None:
        for key in located.keys:
            self._disks.setdefault(key, {})[disk] = None

    def _is_gone(self) -> bool:
        try:
            self._store.datastore.entry(self._vm_directory)
        except FileNotFoundError:
            return True
        return False

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise _ChangedError from None
        except OSError as error:
            what = f"cannot be read: {error.strerror}"
            if error.errno in (errno.EACCES, errno.EPERM):
                raise DatastoreDenied(self._message(path, what)) from error
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR):
                raise self._unknown(path, what) from error
            raise DatastoreUnavailable(self._message(path, what)) from error

    def _unknown(self, path: str, what: str) -> ImagesError:
        return UseUnknown(self._message(path, what))

    def _message(self, path: str, what: str) -> str:
        return printable(f"VM {self._name}: {path}: {what}; {_ADVICE}")


def _status(path: str) -> os.stat_result | None:
    """None for what is not there."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _may_be_disk(status: os.stat_result) -> bool:
    """A regular file, or a block device, as of LVM. To open a FIFO or another device may hang, or do something."""
    if stat.S_ISBLK(status.st_mode):
        return os.major(status.st_rdev) not in _DRIVES
    return stat.S_ISREG(status.st_mode)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    # O_NONBLOCK: what became a FIFO since it was looked at must not hang.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def printable(text: str) -> str:
    """Names come from whoever runs VMs: for a message, and for one line."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(character if character.isprintable() else "?" for character in text)
