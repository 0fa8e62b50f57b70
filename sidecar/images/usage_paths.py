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

from sidecar.datastores.interface import Datastore
from sidecar.datastores.mounts import Mount, mount_of, mounts
from sidecar.errors import DatastoreUnavailable
from sidecar.images.image import ImageKey
from sidecar.images.names import is_image_id
from sidecar.images.store import ImageStore

VOLUMES = "/vmfs/volumes"

_MOST_LINKS = 40  # as the kernel
# The directories of VSAN: a path there may have one in place of the name of what it is for.
_VSAN_OBJECT = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/([^/]+)\.vmdk", re.ASCII | re.IGNORECASE)
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
    here = (datastore.root_path,) if datastore.root_path else ()
    return (*here, f"{VOLUMES}/{datastore.name}", f"{VOLUMES}/{datastore.volume}")


def find_places(stores: Sequence[ImageStore]) -> "Places":
    """DatastoreUnavailable when it cannot be seen where they are."""
    try:
        return Places(stores)
    except OSError as error:
        raise DatastoreUnavailable(
            f"{error.filename} cannot be looked at: {error.strerror}; VMs may use images there, so none can be purged: "
            "make that datastore available again, or take it out of the configuration"
        ) from error


class Places:
    """The datastores of this host, found by path. Knows them as they are when it is made; not for several threads."""

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        """OSError when it cannot be seen where they are."""
        self._stores = {store.datastore.name: store for store in stores}
        self._volumes = {*self._stores, *(store.datastore.volume for store in stores)}
        self._mounts = mounts()
        self._of_images = {mount.mountpoint: mount for mount in self._mounts if mount.is_of_images}
        self._mounted: dict[str, Mount | None] = {}  # by directory, as `mount_of` found it
        self._roots: list[tuple[str, ImageStore]] = []
        self._physical_roots: list[tuple[int, str, ImageStore]] = []
        for store in stores:
            self._roots += [(f"{root.rstrip('/')}/", store) for root in roots_of(store.datastore)]
            if not store.datastore.root_path:
                continue
            os.stat(store.datastore.root_path)
            root = self._resolve(store.datastore.root_path)
            self._roots.append((f"{root.rstrip('/')}/", store))
            if mount := mount_of(root, self._mounts):
                self._physical_roots.append((mount.device, f"{mount.within(root).rstrip('/')}/", store))

    def locate(self, path: str) -> Located:
        """Where an absolute path leads. OSError when that cannot be found out; that nothing is there is no error."""
        resolved = self._resolve(path)
        keys = {*self._keys(resolved), *self._keys(os.path.normpath(path))}
        return Located("" if self._image_mount_of(resolved) else self._at_root(resolved), tuple(sorted(keys, key=str)))

    def images_at(self, datastore: str, path: str) -> tuple[ImageKey, ...]:
        """The images that a path from the root of a datastore names, there or not. OSError as of `locate`."""
        store = self._stores[datastore]
        keys = set(self.locate(f"{_root(store)}/{path}").keys)
        if image_id := _image_id(store, path):
            keys.add(store.key(image_id))
        elif (match := _VSAN_OBJECT.fullmatch(path)) and is_image_id(match[1]):
            keys.add(store.key(match[1]))  # maybe a VM's own disk of that name: in doubt it is in use
        return tuple(sorted(keys, key=str))

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
        if volume in self._volumes or os.path.lexists(f"{VOLUMES}/{volume}"):
            return [path]
        return [path, *(f"{_root(store)}/{rest}" for store in self._stores.values())]

    def is_mount(self, path: str) -> bool:
        """Whether a mount of images is there: what is in it is located, never read."""
        return path in self._of_images

    def _keys(self, path: str) -> list[ImageKey]:
        if mount := self._image_mount_of(path):
            found = mount.image_in(path)
            return [ImageKey(*found[:2])] if found and found[0] in self._stores and is_image_id(found[1]) else []
        ids = ((store, _image_id(store, relative)) for store, relative in self._places(path))
        return [store.key(image_id) for store, image_id in ids if image_id is not None]

    def _places(self, path: str) -> list[tuple[ImageStore, str]]:
        """The datastores that a path is in, each with the path from its root: one may be in another, or be the same."""
        found = [(store, path[len(root) :]) for root, store in self._roots if path.startswith(root)]
        # A bind mount has the root, or a directory in it, somewhere else: the place in the file system tells.
        directory = os.path.dirname(path)
        if directory not in self._mounted:
            self._mounted[directory] = mount_of(directory, self._mounts)
        mount = self._mounted[directory]
        if mount is not None:
            inside = mount.within(path)
            found += [
                (store, inside[len(root) :])
                for device, root, store in self._physical_roots
                if device == mount.device and inside.startswith(root)
            ]
        return found

    def _at_root(self, path: str) -> str:
        """The path on this host: /vmfs/volumes/<name> where there is none is the datastore's root."""
        if path.startswith(f"{VOLUMES}/") and not os.path.lexists(path):
            for store, relative in self._places(path):
                return f"{_root(store)}/{relative}"
        return path

    def _image_mount_of(self, path: str) -> Mount | None:
        return next((mount for mount in self._of_images.values() if mount.holds(path)), None)

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
            if self.is_mount(done):
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


def _root(store: ImageStore) -> str:
    """Where its paths begin; for a datastore that is not on this host, where a host of its server has it."""
    return store.datastore.root_path or f"{VOLUMES}/{store.datastore.name}"


def _image_id(store: ImageStore, relative: str) -> str | None:
    """The id of the image whose directory a path from the root is in, or is."""
    parts = os.path.normpath(relative).split("/")
    for depth in range(min(len(parts), 3)):
        collection = "/".join(parts[:depth])
        image_id = store.layout.image_id(collection, parts[depth])
        if image_id and store.layout.image_directory(image_id) == "/".join(parts[: depth + 1]):
            return image_id
    return None
