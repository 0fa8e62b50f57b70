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
from fusefs.doubts import Key
from fusefs.errors import fail, operation
from fusefs.files import Files
from fusefs.generations import Generations
from fusefs.handles import CompanionHandle, DirectoryHandle, Handles, ImageHandle, StagedHandle
from fusefs.patience import LOCK_SECONDS
from fusefs.processes import caller, thread_group
from fusefs.pulse import Pulse
from fusefs.reading import Opener
from fusefs.sources import Sources
from fusefs.staged import State
from fusefs.staging import StagingArea
from fusefs.tree import IndexedDatastore, IndexedImage, Tree
from fusefs.views import Capacity, Views
from sidecar.client import ImageRef, SidecarClient

# In place of a time: the present, and none at all (of the two that utimens has, only the other one is set).
_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2
# A time that is set to about now is a touch; what else is set cannot be kept.
_NOW_NS = 5_000_000_000


class FileSystem:
    def __init__(
        self,
        client: SidecarClient,
        pulse: Pulse,
        opener: Opener,
        tree: Tree,
        area: StagingArea,
        deletions: Deletions,
        views: Views,
        documents: Documents,
        sources: Sources,
        generations: Generations,
    ) -> None:
        self._client = client
        self._pulse = pulse
        self._tree = tree
        self._area = area
        self._deletions = deletions
        self._views = views
        self._documents = documents
        self._resolver = nodes.Resolver(client, pulse, tree, area, deletions)
        self._handles = Handles()
        self._generations = generations
        self.files = Files(
            opener, tree, area, deletions, views, documents, sources, self._resolver, self._handles, generations
        )

    def path_of(self, *arguments: Any) -> str:
        """For the log: the path that is among a call's arguments, or that of the handle."""
        return self.files.path_of(*arguments)

    def is_there(self, path: str) -> bool:
        """Whether a path leads to something."""
        return self._resolver.find(path) is not None

    @operation
    def getattr(self, path: str | None, handle: int | None = None) -> Attributes:
        match self._handles.find(handle):
            case StagedHandle(directory=directory, file=file):
                return self._views.attributes(nodes.StagedFileNode(directory, file))
            case ImageHandle(opened=opened):  # a file that is open outlives its name
                return opened.attributes
            case _:
                return self._attributes(path)

    def _attributes(self, path: str | None) -> Attributes:
        request = self._generations.begin()
        node = self._resolver.get(path)
        attributes = self._views.attributes(node)
        match node:
            case nodes.ImageFileNode(parent, file) | nodes.DeletedFileNode(parent, file):
                return self._generations.shown(parent.key, path or "", file.generation, attributes, request)
            case _:
                return attributes

    @operation
    def opendir(self, path: str, pid: int) -> int:
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
        # Whose it is, is asked of these alone: it takes as long as all the rest.
        process = thread_group(pid) if isinstance(node, nodes.DeletedImageNode) else 0
        staged = node.directory if isinstance(node, nodes.StagedNode) else None
        image = node.image if isinstance(node, nodes.ImageNode | nodes.DeletedImageNode) else None
        return self._handles.add(DirectoryHandle(path, self._views.entries(node), staged, image, process))

    def is_current(self, handle: int) -> bool:
        """Whether the kernel may take what the entries of an open directory are described as."""
        match self._handles.get(handle):
            case DirectoryHandle(path=path, image=IndexedImage() as image):
                now = self._tree.image(nodes.split(path)[0], image.image_id)
                is_same = now is not None and now.same_content(image)
                return is_same and not self._generations.is_open_below(path)
            case _:
                return True

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
        opened = self._handles.get(handle)
        if isinstance(opened, DirectoryHandle) and opened.staged is not None:
            self._area.publish(opened.staged)

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
    def unlink(self, path: str, pid: int) -> None:
        match self._resolver.settled(path):
            case nodes.StagedFileNode(directory, staged):
                directory.remove(staged.name, caller(pid))
                self._area.wake()
            case nodes.ImageFileNode(parent) if self._opened_as_deleted(parent.key, pid):
                fail(errno.ENOENT, "the image was restored meanwhile")
            case nodes.ImageFileNode() if self.files.refusals.has(thread_group(pid), path):
                fail(errno.EROFS, "who wants to write another file in its place does not mean to delete the image")
            case nodes.ImageFileNode(parent, file) if file.is_disk:
                self._deletions.tombstone(parent.key, parent.image, removing=file.name)
                self._area.forget_recent(parent.key)
            case nodes.ImageFileNode(parent, file):
                self._deletions.remove_later(parent.key, parent.image, file)
                self._area.wake()
            case nodes.LateNode(_, recent, companion):
                recent.late.pop(companion.name, None)
                companion.changed = False
            case nodes.DeletedFileNode(deleted, file) if not self._opened_as_deleted(deleted.key, pid):
                # One file by itself: what takes a directory apart, such as rm -r, is inside it.
                fail(errno.EPERM, f"a deleted image is freed whole: rm -r {deleted.image.image_id}, not {file.name}")
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
        self._generations.removed(path)

    @operation
    def rmdir(self, path: str, pid: int) -> None:
        node = self._resolver.settled(path)
        match node:
            case nodes.StagedNode(directory):
                directory.require_left(caller(pid), removing=True)
                if directory.files:
                    fail(errno.ENOTEMPTY)
                self._area.abort(directory, "removed")
            case nodes.ImageNode():
                self._deletions.tombstone(node.key, node.image, leave_ghost=False)
                self._area.forget_recent(node.key)
            case nodes.DeletedImageNode():
                # Unlinking a file of its disk purges. An rm -r that finds it tombstoned here unlinked another one.
                fail(errno.ENOTEMPTY)
            case nodes.GhostNode():
                self._deletions.lay(node.ghost.key)
            case nodes.DeletedNode(datastore):
                # `rm -r one/.deleted` empties it. It is there again at once, as every datastore has one.
                if datastore.tombstoned_images():
                    fail(errno.ENOTEMPTY)
            case _:
                fail(errno.EPERM if len(nodes.split(path)) < 2 else errno.ENOTDIR)
        self._generations.removed(path)

    @operation
    def rename(self, old: str, new: str, flags: int, pid: int) -> None:
        node = self._resolver.settled(old)
        same_directory = nodes.split(old)[:-1] == nodes.split(new)[:-1]
        match node:
            case nodes.StagedFileNode(directory, file) if same_directory:
                directory.rename(file.name, nodes.split(new)[-1], flags, caller(pid))
                self._area.renamed(directory)
                self._area.wake()
            case nodes.LateNode() if same_directory and node.companion.is_temporary:
                self._rename_late(node, nodes.new_name(new), flags)
            case nodes.ImageFileNode() | nodes.LateNode() if same_directory:
                fail(errno.EROFS)
            case nodes.GhostNode() | nodes.GhostFileNode():
                fail(errno.ENOENT)
            case nodes.DeletedImageNode(datastore, image):
                if not self._is_place_of(datastore, image, nodes.split(new)):
                    # Not EXDEV: mv would go on with a copy, and then purge what it has copied from.
                    fail(errno.EPERM, f"a deleted image can be moved to /{datastore.name}/{image.image_id} only")
                self._deletions.restore(node.key)
            case nodes.DeletedNode() | nodes.DeletedFileNode() | nodes.DocumentNode():
                fail(errno.EPERM)
            case _:
                # Whoever renames by hand goes on with a copy, and a removal: both of which mean something here.
                fail(errno.EXDEV)
        self._generations.renamed(old, new)

    def _opened_as_deleted(self, key: Key, pid: int) -> bool:
        """Whether the process goes through the image's directory as a deleted one, which it was when it was opened.

        So does what takes the directory apart. A restore renames it: an rm -r that is inside goes on there, and would
        delete what was restored.
        """
        datastore, image_id = key
        return self._handles.has_directory_open(thread_group(pid), f"/{datastore}/{nodes.DELETED}/{image_id}")

    def _is_place_of(self, datastore: IndexedDatastore, image: IndexedImage, names: list[str]) -> bool:
        """Whether a deleted image that is moved there is restored."""
        place = [datastore.name, image.image_id]
        if names != [*place, image.image_id]:
            return names == place
        # mv takes the ghost of the image for a directory, into which it moves things.
        ghost = self._resolver.find("/".join(place))
        return isinstance(ghost, nodes.GhostNode) and ghost.ghost.image.number == image.number

    def _rename_late(self, node: nodes.LateNode, name: str, flags: int) -> None:
        """A companion file that arrives late has its name now: the image gets it."""
        recent, companion = node.recent, node.companion
        temporary = companion.name
        if flags:
            fail(errno.EINVAL)
        if name.endswith(".vmdk"):
            fail(errno.EROFS)
        self._area.keep(recent)
        companion.name = name
        if not companion.is_temporary:
            self._deletions.cancel(node.parent.key, recent.final_name(name))
            try:
                self._area.add_companion(recent, companion)
            except BaseException:
                companion.name, companion.changed = temporary, True
                raise
        if companion.handles or companion.is_temporary:
            recent.late[name] = companion
        recent.late.pop(temporary, None)

    @operation
    def chmod(self, path: str | None, handle: int | None = None) -> None:
        """chmod and chown: permissions are the mount's own; accepted where a copier sets them."""
        self._accept(path, handle)

    @operation
    def setxattr(self, path: str) -> None:
        """No image has extended attributes or ACLs; accepted where a copier sets them, or it would fail."""
        self._accept(path, None)

    def _accept(self, path: str | None, handle: int | None) -> None:
        match self._of_copier(path, handle):
            case nodes.ImageNode(recent=None) | nodes.ImageFileNode(parent=nodes.ImageNode(recent=None)):
                fail(errno.EROFS)
            case _:
                pass

    @operation
    def utimens(self, path: str | None, times: tuple[int, int] | None, handle: int | None = None) -> None:
        """`times` in ns, accessed and modified; None for now."""
        node = self._of_copier(path, handle)
        now = time.time_ns()
        accessed, modified = (_time_set(each, now) for each in times or (now, now))
        match node:
            case nodes.StagedFileNode(directory, file) if directory.state is State.OPEN:
                if modified is not None:  # the other one is shown nowhere
                    with directory.change(of_content=False):
                        file.content.set_times(accessed if accessed is not None else now, modified)
            case nodes.ImageNode(recent=None):
                told = modified if modified is not None else accessed
                if told is not None and abs(told - now) > _NOW_NS:
                    fail(errno.EROFS, "an image's time is that of its last use")
                self._pulse.require()
                ref = ImageRef(datastore=node.key[0], image_id=node.key[1])
                self._client.touch(ref, lock_timeout=LOCK_SECONDS)
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
            case nodes.DeletedNode() | nodes.DeletedImageNode() | nodes.DeletedFileNode() | nodes.DocumentNode():
                fail(errno.EPERM, "nothing can be set there")
            case _:
                pass
        return node


def _time_set(given: int, now: int) -> int | None:
    """None when that time is not set."""
    if given == _UTIME_OMIT:
        return None
    return now if given == _UTIME_NOW else given


def _described(directory: DirectoryHandle, offset: int) -> Iterator[tuple[int, str, Attributes]]:
    entries = directory.entries
    for index in range(offset, len(entries)):
        name, attributes = entries[index]
        try:
            described = attributes()
        except OSError:  # a staged file that has been closed for good since
            continue
        yield index + 1, name, described
