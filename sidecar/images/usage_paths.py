"""From a path, as a disk's file has it, to the image that it leads to.

A path may go through symbolic links and bind mounts, `/vmfs/volumes`, the notation `[datastore] path`, and a mount of
the images. Links are resolved here, not by the kernel: a mount of images is never entered, since its daemon may need
the sidecar that asks.
"""

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.datastores.fuse_mounts import image_mounts
from sidecar.datastores.interface import Datastore
from sidecar.images.image import ImageKey
from sidecar.images.names import is_image_id
from sidecar.images.store import ImageStore

VOLUMES = "/vmfs/volumes"

_MOST_LINKS = 40  # as the kernel
_BRACKETED = re.compile(r"\[([^\]/]+)\][ ]*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Located:
    """Where a path leads; `keys` are the images that it names, there or not: mostly one, none when it is no image's.

    `path` has no links; empty when it leads into a mount of images, where nothing is read.
    """

    path: str
    keys: tuple[ImageKey, ...]


def roots_of(datastore: Datastore) -> tuple[str, ...]:
    """The paths under which VMs may know a datastore's root, beside what links and bind mounts make of them."""
    return (datastore.root_path, f"{VOLUMES}/{datastore.name}")


class Places:
    """The datastores of this host, found by path. Knows them as they are when it is made; not for several threads."""

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        """OSError when it cannot be seen where they are."""
        self._stores = {store.datastore.name: store for store in stores}
        self._mounts = {mount.mountpoint: mount for mount in image_mounts()}
        self._roots: dict[str, ImageStore] = {}
        self._identities: dict[tuple[int, int], ImageStore] = {}
        self._above: dict[str, ImageStore | None] = {}  # by directory, as `_identified` found it
        for store in stores:
            for root in roots_of(store.datastore):
                self._roots[root] = store
                self._roots[self._resolve(root)] = store
            status = os.stat(store.datastore.root_path)
            self._identities[status.st_dev, status.st_ino] = store

    def locate(self, path: str) -> Located:
        """Where an absolute path leads. OSError when that cannot be found out; that nothing is there is no error."""
        resolved = self._resolve(path)
        keys = {*self._keys(resolved), *self._keys(os.path.normpath(path))}
        return Located("" if self._mount_of(resolved) else self._at_root(resolved), tuple(sorted(keys, key=str)))

    def readings(self, name: str, directory: str) -> list[str]:
        """The absolute paths that a name in a file of that directory may mean.

        More than one for a volume below /vmfs/volumes that is not known here, such as a UUID: it may be any datastore.
        """
        if bracketed := _BRACKETED.fullmatch(name):
            name = f"{VOLUMES}/{bracketed[1]}/{bracketed[2]}"
        path = os.path.join(directory, name)
        if not path.startswith(f"{VOLUMES}/"):
            return [path]
        volume, _, rest = path.removeprefix(f"{VOLUMES}/").partition("/")
        if volume in self._stores or os.path.lexists(f"{VOLUMES}/{volume}"):
            return [path]
        return [path, *(f"{store.datastore.root_path}/{rest}" for store in self._stores.values())]

    def _keys(self, path: str) -> list[ImageKey]:
        if mounted := self._mount_of(path):
            found = self._mounts[mounted].image_in(path)
            return [ImageKey(*found[:2])] if found and found[0] in self._stores and is_image_id(found[1]) else []
        if place := self._place(path):
            store, relative = place
            image_id = _image_id(store, relative)
            return [] if image_id is None else [store.key(image_id)]
        return []

    def _place(self, path: str) -> tuple[ImageStore, str] | None:
        """The datastore that a path is in, and the path from its root."""
        for root, store in self._roots.items():
            if path.startswith(f"{root.rstrip('/')}/"):
                return store, path[len(root.rstrip("/")) + 1 :]
        # A bind mount has the root, or a directory below it, somewhere else: the directories above tell.
        directory, rest = path, ""
        while directory != "/":
            directory, _, name = directory.rpartition("/")
            directory, rest = directory or "/", f"{name}/{rest}" if rest else name
            if (found := self._identified(directory)) is not None:
                return found, rest
        return None

    def _identified(self, directory: str) -> ImageStore | None:
        if directory not in self._above:
            try:
                status = os.stat(directory, follow_symlinks=False)
                self._above[directory] = self._identities.get((status.st_dev, status.st_ino))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise
                self._above[directory] = None
        return self._above[directory]

    def _at_root(self, path: str) -> str:
        """The path on this host: /vmfs/volumes/<name> where there is no such directory is the datastore's root."""
        if place := self._place(path):
            return f"{place[0].datastore.root_path}/{place[1]}"
        return path

    def _mount_of(self, path: str) -> str | None:
        return next((mounted for mounted in self._mounts if path == mounted or path.startswith(f"{mounted}/")), None)

    def _resolve(self, path: str) -> str:
        """The path without links, as far as it is there, and up to a mount of images."""
        done, left, links = "/", path.split("/")[::-1], 0
        while left:
            part = left.pop()
            if part in ("", "."):
                continue
            if part == "..":
                done = os.path.dirname(done)
                continue
            done = f"{done.rstrip('/')}/{part}"
            if done in self._mounts:
                return os.path.normpath("/".join((done, *reversed(left))))
            try:
                target = os.readlink(done)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                    raise
                continue
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            done = "/" if target.startswith("/") else os.path.dirname(done)
            left.extend(target.split("/")[::-1])
        return done


def _image_id(store: ImageStore, relative: str) -> str | None:
    """The id of the image whose directory a path from the root is in, or is."""
    parts = os.path.normpath(relative).split("/")
    for depth in range(min(len(parts), 3)):
        collection = "/".join(parts[:depth])
        image_id = store.layout.image_id(collection, parts[depth])
        if image_id and store.layout.image_directory(image_id) == "/".join(parts[: depth + 1]):
            return image_id
    return None
