"""The operations on names, each a few lines that ask the index, the staging area or the deletions.

libfuse calls them, and those of `files`, from several threads at once. They raise OSError, and know no libfuse.
"""

import errno
import time
from collections.abc import Iterator
from typing import Any

from fusefs import nodes
from fusefs.attributes import Attributes
from fusefs.deleting import Deletions
from fusefs.documents import Documents
from fusefs.errors import fail, operation
from fusefs.files import Files
from fusefs.handles import CompanionHandle, DirectoryHandle, Handles, ImageHandle, StagedHandle
from fusefs.pulse import Pulse
from fusefs.sources import Sources
from fusefs.staged import State
from fusefs.staging import StagingArea
from fusefs.tree import Tree
from fusefs.views import Capacity, Views
from sidecar.client import ImageRef, SidecarClient

_UTIME_NOW = (1 << 30) - 1
# A time that is set to about now is a touch; what else is set cannot be kept.
_NOW_NS = 5_000_000_000


class FileSystem:
    def __init__(
        self,
        client: SidecarClient,
        pulse: Pulse,
        tree: Tree,
        area: StagingArea,
        deletions: Deletions,
        views: Views,
        documents: Documents,
        sources: Sources,
    ) -> None:
        self._client = client
        self._pulse = pulse
        self._tree = tree
        self._area = area
        self._deletions = deletions
        self._views = views
        self._documents = documents
        self._resolver = nodes.Resolver(client, tree, area, deletions)
        self._handles = Handles()
        self.files = Files(client, tree, area, deletions, views, documents, sources, self._resolver, self._handles)

    def path_of(self, *arguments: Any) -> str:
        """For the log: the path that is among a call's arguments, or that of the handle."""
        return self.files.path_of(*arguments)

    @operation
    def getattr(self, path: str | None, handle: int | None = None) -> Attributes:
        match self._handles.find(handle):
            case StagedHandle(directory=directory, file=file):
                return self._views.attributes(nodes.StagedFileNode(directory, file))
            case ImageHandle(attributes=attributes):
                return attributes
            case _:
                return self._views.attributes(self._resolver.get(path))

    @operation
    def opendir(self, path: str) -> int:
        node = self._resolver.get(path)
        if isinstance(node, nodes.ImageNode | nodes.DeletedImageNode):
            node = self._resolver.with_details(node) or fail(errno.ENOENT)
        match node:
            case nodes.GhostNode(_, ghost):
                self._deletions.keep(ghost)
            case nodes.DatastoreNode(datastore) if not datastore.info.accessible and not datastore.images:
                # Nothing is known of it, which is not the same as nothing being there.
                fail(errno.EIO, f"datastore {datastore.name} is not accessible: {datastore.info.fault}")
            case _:
                pass
        return self._handles.add(DirectoryHandle(path, self._views.entries(node)))

    @operation
    def readdir(self, handle: int, offset: int) -> Iterator[tuple[int, str, Attributes]]:
        """The entries from `offset` on, each with the offset of the next one."""
        directory = self._handles.get(handle)
        if not isinstance(directory, DirectoryHandle):
            fail(errno.ENOTDIR)
        return _described(directory, offset)

    @operation
    def releasedir(self, handle: int) -> None:
        self._handles.remove(handle)

    @operation
    def fsyncdir(self, handle: int) -> None:
        """`sync DIRECTORY`: publishes at once, and says what is wrong."""
        node = self._resolver.find(self._handles.get(handle).path)
        if isinstance(node, nodes.StagedNode):
            self._area.publish(node.directory)

    @operation
    def statfs(self, path: str) -> Capacity:
        return self._views.capacity(self._tree.datastore("/".join(nodes.split(path)[:1])))

    @operation
    def listxattr(self, path: str) -> list[str]:
        return list(self._documents.attributes(self._resolver.get(path)))

    @operation
    def getxattr(self, path: str, name: str) -> bytes:
        value = self._documents.attributes(self._resolver.get(path)).get(name)
        return value if value is not None else fail(errno.ENODATA)

    @operation
    def mkdir(self, path: str, pid: int) -> None:
        names = nodes.split(path)
        datastore = self._tree.datastore(names[0])
        if datastore is None or len(names) == 1:
            fail(errno.EPERM, "datastores are made in the sidecar's configuration")
        if len(names) > 2:
            inside_image = isinstance(self._resolver.get("/".join(names[:2])), nodes.ImageNode)
            fail(errno.EROFS if inside_image else errno.EPERM, "an image has no directories inside")
        if not isinstance(self._resolver.find(path), nodes.GhostNode | None):  # of a ghost the sidecar knows more
            fail(errno.EEXIST)
        self._area.make(datastore, nodes.new_name(path), pid)
        self._deletions.lay((names[0], names[1]))

    @operation
    def unlink(self, path: str) -> None:
        match self._resolver.settled(path):
            case nodes.StagedFileNode(directory, staged):
                directory.remove(staged.name)
                self._area.wake()
            case nodes.ImageFileNode(parent, file) if file.is_disk:
                self._deletions.tombstone(parent.key, parent.image, removing=file.name)
                self._area.forget_recent(parent.key)
            case nodes.ImageFileNode(parent, file):
                self._deletions.remove_later(parent.key, parent.image, file)
                self._area.wake()
            case nodes.LateNode(_, recent, companion):
                recent.late.pop(companion.name, None)
                companion.changed = False
            case nodes.DeletedFileNode(deleted, file) if file.is_disk:
                self._deletions.purge(deleted.key, deleted.image, removing=file.name)
            case nodes.DeletedFileNode():
                pass  # goes with its disk
            case nodes.DocumentNode():
                fail(errno.EPERM, "what is known about an image is not a file of it")
            case nodes.GhostFileNode(ghost_parent, file):
                ghost_parent.ghost.removed.add(file.name)
                self._deletions.keep(ghost_parent.ghost)
            case _:
                fail(errno.EISDIR)

    @operation
    def rmdir(self, path: str) -> None:
        node = self._resolver.settled(path)
        match node:
            case nodes.StagedNode(directory):
                if directory.files:
                    fail(errno.ENOTEMPTY)
                self._area.abort(directory, "removed")
            case nodes.ImageNode():
                self._deletions.tombstone(node.key, node.image, leave_ghost=False)
                self._area.forget_recent(node.key)
            case nodes.DeletedImageNode():
                self._deletions.purge(node.key, node.image)
            case nodes.GhostNode():
                self._deletions.lay(node.ghost.key)
            case nodes.DeletedNode():
                fail(errno.EPERM, "every datastore has one")
            case _:
                fail(errno.EPERM if len(nodes.split(path)) < 2 else errno.ENOTDIR)

    @operation
    def rename(self, old: str, new: str, flags: int) -> None:
        node = self._resolver.settled(old)
        same_directory = nodes.split(old)[:-1] == nodes.split(new)[:-1]
        match node:
            case nodes.StagedFileNode(directory, file) if same_directory:
                directory.rename(file.name, nodes.split(new)[-1], flags)
                self._area.renamed(directory)
                self._area.wake()
            case nodes.ImageFileNode() | nodes.LateNode() if same_directory:
                fail(errno.EROFS)
            case nodes.GhostNode() | nodes.GhostFileNode():
                fail(errno.ENOENT)
            case nodes.DeletedImageNode(datastore, image):
                if nodes.split(new) != [datastore.name, image.image_id]:
                    # Not EXDEV: mv would go on with a copy, and then purge what it has copied from.
                    fail(errno.EPERM, f"a deleted image can be moved to /{datastore.name}/{image.image_id} only")
                self._deletions.restore(node.key)
            case nodes.DeletedNode() | nodes.DeletedFileNode() | nodes.DocumentNode():
                fail(errno.EPERM)
            case _:
                # Whoever renames by hand goes on with a copy, and a removal: both of which mean something here.
                fail(errno.EXDEV)

    @operation
    def chmod(self, path: str | None, handle: int | None = None) -> None:
        """chmod and chown: permissions are the mount's own; accepted where a copier sets them."""
        match self._of_copier(path, handle):
            case nodes.ImageNode(recent=None) | nodes.ImageFileNode(parent=nodes.ImageNode(recent=None)):
                fail(errno.EROFS)
            case _:
                pass

    @operation
    def utimens(self, path: str | None, times: tuple[int, int] | None, handle: int | None = None) -> None:
        """`times` in ns, accessed and modified; None for now."""
        node = self._of_copier(path, handle)
        match node:
            case nodes.StagedFileNode(directory, file) if directory.state is State.OPEN:
                if times is not None and _UTIME_NOW not in times:
                    with directory.change(of_content=False):
                        file.content.set_times(*times)
            case nodes.ImageNode(recent=None):
                if times is not None and _UTIME_NOW not in times and abs(times[1] - time.time_ns()) > _NOW_NS:
                    fail(errno.EROFS, "an image's time is that of its last use")
                self._pulse.require()
                self._client.touch(ImageRef(datastore=node.key[0], image_id=node.key[1]))
            case nodes.ImageFileNode(parent=nodes.ImageNode(recent=None)):
                fail(errno.EROFS)
            case _:
                pass

    def _of_copier(self, path: str | None, handle: int | None) -> nodes.Node:
        match self._handles.find(handle):
            case StagedHandle(directory=directory, file=file):
                return nodes.StagedFileNode(directory, file)
            case CompanionHandle(path=opened_path):
                node = self._resolver.settled(opened_path)
            case _:
                node = self._resolver.settled(path)
        match node:
            case nodes.ImageNode(recent=recent) | nodes.ImageFileNode(parent=nodes.ImageNode(recent=recent)) if (
                recent is not None
            ):
                self._area.keep(recent)
            case nodes.LateNode(_, recent, _):
                self._area.keep(recent)
            case nodes.RootNode() | nodes.DatastoreNode() | nodes.GhostNode() | nodes.GhostFileNode():
                fail(errno.EPERM)
            case _:
                pass
        return node


def _described(directory: DirectoryHandle, offset: int) -> Iterator[tuple[int, str, Attributes]]:
    entries = directory.entries
    for index in range(offset, len(entries)):
        name, attributes = entries[index]
        try:
            described = attributes()
        except OSError:  # a staged file that has been closed for good since
            continue
        yield index + 1, name, described
