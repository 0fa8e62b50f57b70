"""The operations of the mount, each a few lines that ask the index, the staging area or the deletions.

libfuse calls them from several threads at once. They raise OSError; nothing here knows a libfuse.
"""

import errno
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from fusefs.attributes import Attributes
from fusefs.copying import Copying
from fusefs.deleting import Deletions
from fusefs.errors import fail, operation
from fusefs.handles import CompanionHandle, DirectoryHandle, Handles, ImageHandle, StagedHandle
from fusefs.nodes import (
    GhostFileNode,
    GhostNode,
    ImageFileNode,
    ImageNode,
    Node,
    Resolver,
    StagedFileNode,
    StagedNode,
    split,
)
from fusefs.processes import is_being_killed, thread_group
from fusefs.provenance import Generation, SourceFile
from fusefs.reading import PageCachePolicy, open_image_file
from fusefs.staged import State
from fusefs.staging import MAX_COMPANION_BYTES, StagingArea
from fusefs.tree import Tree, file_inode
from fusefs.views import Capacity, Views
from sidecar.client import ImageRef, SidecarClient

_UTIME_NOW = (1 << 30) - 1
# A time that is set to about now is a touch; what else is set cannot be kept.
_NOW_NS = 5_000_000_000


class Opened(NamedTuple):
    """An open file's number, and what the kernel may do with the pages that it has of the path."""

    handle: int
    keep_cache: bool = False
    direct_io: bool = False


class FileSystem:
    def __init__(
        self,
        client: SidecarClient,
        tree: Tree,
        area: StagingArea,
        deletions: Deletions,
        views: Views,
    ) -> None:
        self._client = client
        self._tree = tree
        self._area = area
        self._deletions = deletions
        self._views = views
        self._resolver = Resolver(client, tree, area, deletions)
        self._handles = Handles()
        self._copying = Copying(tree, self._handles)
        self._pages = PageCachePolicy()

    def path_of(self, *arguments: Any) -> str:
        """For the log: the path that is among a call's arguments, or that of the handle."""
        for argument in arguments:
            if isinstance(argument, str):
                return argument
            if isinstance(argument, int) and (handle := self._handles.find(argument)) is not None:
                return handle.path
        return ""

    # What is there.

    @operation
    def getattr(self, path: str | None, handle: int | None = None) -> Attributes:
        opened = self._handles.find(handle)
        match opened:
            case StagedHandle():
                return self._views.attributes(StagedFileNode(opened.directory, opened.file))
            case CompanionHandle():
                return self._views.companion(opened.inode, len(opened.data))
        return self._views.attributes(self._node(path))

    @operation
    def opendir(self, path: str) -> int:
        node = self._node(path)
        if isinstance(node, ImageNode):
            node = self._resolver.with_details(node) or fail(errno.ENOENT)
        return self._handles.add(DirectoryHandle(path, self._views.entries(node)))

    @operation
    def readdir(self, handle: int, offset: int) -> Iterator[tuple[int, str, Attributes]]:
        """The entries from `offset` on, each with the offset of the next one."""
        directory = self._handles.get(handle)
        if not isinstance(directory, DirectoryHandle):
            fail(errno.ENOTDIR)
        return self._describe(directory, offset)

    def _describe(self, directory: DirectoryHandle, offset: int) -> Iterator[tuple[int, str, Attributes]]:
        entries = directory.entries
        for index in range(offset, len(entries)):
            name, attributes = entries[index]
            try:
                described = attributes()
            except OSError:  # a staged file that was closed for good since
                continue
            yield index + 1, name, described

    @operation
    def releasedir(self, handle: int) -> None:
        self._handles.remove(handle)

    @operation
    def statfs(self, path: str) -> Capacity:
        return self._views.capacity(self._resolver.find(path))

    # Names.

    @operation
    def mkdir(self, path: str, pid: int) -> None:
        names = split(path)
        datastore = self._tree.datastore(names[0])
        if datastore is None or len(names) == 1:
            fail(errno.EPERM, "datastores are made in the sidecar's configuration")
        if len(names) > 2:
            inside_image = isinstance(self._node("/".join(names[:2])), ImageNode)
            fail(errno.EROFS if inside_image else errno.EPERM, "an image has no directories inside")
        if self._resolver.find(path) is not None:
            fail(errno.EEXIST)
        self._area.make(datastore, names[1], pid)
        self._deletions.lay((names[0], names[1]))

    @operation
    def unlink(self, path: str) -> None:
        node = self._settled(path)
        match node:
            case StagedFileNode(directory, staged):
                directory.remove(staged.name)
                self._area.wake()
            case ImageFileNode(parent, file) if file.is_disk:
                self._deletions.tombstone(parent.key, parent.image, removing=split(path)[2])
                self._area.forget_recent(parent.key)
            case ImageFileNode(parent, file):
                self._deletions.remove_later(parent.key, file.name)
                self._area.wake()
            case GhostFileNode(ghost_parent, file):
                ghost_parent.ghost.removed.add(file.name)
            case _:
                fail(errno.EISDIR)

    @operation
    def rmdir(self, path: str) -> None:
        node = self._settled(path)
        match node:
            case StagedNode(directory):
                if directory.files:
                    fail(errno.ENOTEMPTY)
                self._area.abort(directory, "removed")
            case ImageNode():
                self._deletions.tombstone(node.key, node.image, leave_ghost=False)
                self._area.forget_recent(node.key)
            case GhostNode():
                self._deletions.lay(node.key)
            case _:
                fail(errno.EPERM if len(split(path)) < 2 else errno.ENOTDIR)

    @operation
    def rename(self, old: str, new: str, flags: int) -> None:
        node = self._settled(old)
        same_directory = split(old)[:-1] == split(new)[:-1]
        match node:
            case StagedFileNode(directory, file) if same_directory:
                directory.rename(file.name, split(new)[-1], flags)
                self._area.renamed(directory)
                self._area.wake()
            case ImageFileNode() if same_directory:
                fail(errno.EROFS)
            case GhostNode() | GhostFileNode():
                fail(errno.ENOENT)
            case _:
                # Whoever renames by hand goes on with a copy, and a removal: both of which mean something here.
                fail(errno.EXDEV)

    # Files.

    @operation
    def open(self, path: str, flags: int, pid: int) -> Opened:
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        node = self._settled(path) if writing else self._node(path)
        match node:
            case StagedFileNode(directory, staged):
                directory.opened(staged, writable=writing)
                handle = StagedHandle(path, directory, staged, writing)
                if flags & os.O_TRUNC and writing:
                    try:
                        self._copying.truncate(handle.directory, handle.file, 0)
                    except BaseException:
                        directory.released(staged, writable=writing)
                        raise
                return Opened(self._handles.add(handle))
            case ImageFileNode(parent, file):
                if writing or flags & os.O_TRUNC:
                    fail(errno.EROFS)
                return self._open_image_file(path, parent, file.name, pid)
            case GhostFileNode():
                fail(errno.ENOENT)
            case _:
                fail(errno.EISDIR)

    def _open_image_file(self, path: str, parent: ImageNode, name: str, pid: int) -> Opened:
        file = parent.image.file(name) or fail(errno.ENOENT)
        key = parent.key

        def current() -> Generation | None:
            image = self._tree.image(*key)
            found = image.file(name) if image is not None and image.is_valid else None
            return found.generation if found is not None else None

        reader = open_image_file(self._client, parent.datastore, parent.image, file, current)
        source = SourceFile(*key, name, file.generation)
        advice = self._pages.opened(path, file.generation)
        number = self._handles.add(ImageHandle(path, source, reader, thread_group(pid)))
        return Opened(number, advice.keep, advice.bypass)

    @operation
    def create(self, path: str, flags: int, pid: int) -> Opened:
        names = split(path)
        parent = self._settled("/".join(names[:-1]))
        match parent:
            case StagedNode(directory):
                file = directory.create(names[-1])
                return Opened(self._handles.add(StagedHandle(path, directory, file, writable=True)))
            case ImageNode(_, image, recent) if recent is not None and not names[-1].endswith(".vmdk"):
                inode = file_inode(image.number, recent.final_name(names[-1]))
                return Opened(self._handles.add(CompanionHandle(path, recent, names[-1], inode)))
            case ImageNode():
                fail(errno.EROFS)
            case GhostNode():
                fail(errno.ENOENT)
            case _:
                fail(errno.EPERM, "files are in images only")

    @operation
    def read(self, handle: int, size: int, offset: int) -> bytes:
        opened = self._handles.get(handle)
        match opened:
            case ImageHandle():
                return opened.reader.read(size, offset)
            case StagedHandle():
                return opened.file.content.read(size, offset)
            case CompanionHandle():
                return bytes(opened.data[offset : offset + size])
            case _:
                fail(errno.EISDIR)

    @operation
    def read_into(self, handle: int, buffer: memoryview, offset: int) -> int:
        opened = self._handles.get(handle)
        if isinstance(opened, ImageHandle):
            return opened.reader.read_into(buffer, offset)
        data = self.read(handle, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    @operation
    def write(self, handle: int, data: bytes, offset: int, pid: int) -> int:
        opened = self._handles.get(handle)
        match opened:
            case StagedHandle(writable=True):
                self._copying.write(opened, data, offset, pid)
            case CompanionHandle():
                end = offset + len(data)
                if end > MAX_COMPANION_BYTES:
                    fail(errno.EFBIG)
                if len(opened.data) < end:
                    opened.data.extend(bytes(end - len(opened.data)))
                opened.data[offset:end] = data
                opened.changed = True
            case _:
                fail(errno.EBADF)
        return len(data)

    @operation
    def copy_file_range(self, source: int, source_offset: int, target: int, offset: int, length: int) -> int:
        opened, made = self._handles.get(source), self._handles.get(target)
        if not isinstance(opened, ImageHandle) or not isinstance(made, StagedHandle) or not made.writable:
            fail(errno.EXDEV)
        return self._copying.clone(opened, source_offset, made, offset, length)

    @operation
    def lseek(self, handle: int, offset: int, whence: int) -> int:
        opened = self._handles.get(handle)
        match opened:
            case ImageHandle():
                return opened.reader.seek(offset, whence)
            case StagedHandle():
                return opened.file.content.seek(offset, whence)
            case _:
                fail(errno.EINVAL)

    @operation
    def truncate(self, path: str | None, size: int, handle: int | None = None) -> None:
        opened = self._handles.find(handle)
        if isinstance(opened, CompanionHandle):
            del opened.data[size:]
            opened.data.extend(bytes(size - len(opened.data)))
            return
        node: Node
        if isinstance(opened, StagedHandle):
            node = StagedFileNode(opened.directory, opened.file)
        else:
            node = self._settled(path)
        match node:
            case StagedFileNode(directory, file):
                self._copying.truncate(directory, file, size)
            case ImageFileNode():
                fail(errno.EROFS)
            case _:
                fail(errno.EISDIR)

    @operation
    def fallocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        opened = self._handles.get(handle)
        if not isinstance(opened, StagedHandle) or not opened.writable or mode != 0:
            fail(errno.EOPNOTSUPP)
        with opened.directory.change():
            opened.file.content.allocate(offset, length)

    @operation
    def flush(self, handle: int, pid: int) -> None:
        """A descriptor of the file is closed, perhaps not the last: what has to be reported is reported here."""
        opened = self._handles.get(handle)
        match opened:
            case StagedHandle(writable=True) if is_being_killed(pid):
                opened.directory.give_up(opened.file, thread_group(pid))
            case StagedHandle(writable=True):
                self._area.closing(opened.directory)
            case CompanionHandle(changed=True) if not is_being_killed(pid):
                self._area.add_companion(opened.recent, opened.name, bytes(opened.data))
                opened.changed = False

    @operation
    def release(self, handle: int) -> None:
        opened = self._handles.remove(handle)
        match opened:
            case ImageHandle():
                opened.reader.close()
                self._pages.closed(opened.path, opened.source.generation)
            case StagedHandle():
                opened.directory.released(opened.file, writable=opened.writable)
                self._area.wake()

    @operation
    def fsync(self, handle: int) -> None:
        opened = self._handles.get(handle)
        if isinstance(opened, StagedHandle):
            opened.file.content.sync()

    @operation
    def fsyncdir(self, handle: int) -> None:
        """`sync DIRECTORY`: publishes at once, and says what is wrong."""
        node = self._resolver.find(self._handles.get(handle).path)
        if isinstance(node, StagedNode):
            self._area.publish(node.directory)

    # What copiers end with.

    @operation
    def chmod(self, path: str | None, handle: int | None = None) -> None:
        """chmod and chown: permissions are the mount's own; accepted where a copier sets them."""
        match self._adjusted(path, handle):
            case ImageNode(recent=None) | ImageFileNode(parent=ImageNode(recent=None)):
                fail(errno.EROFS)
            case StagedNode() | StagedFileNode() | ImageNode() | ImageFileNode():
                pass
            case _:
                fail(errno.EPERM)

    @operation
    def utimens(self, path: str | None, times: tuple[int, int] | None, handle: int | None = None) -> None:
        """`times` in ns, accessed and modified; None for now."""
        node = self._adjusted(path, handle)
        match node:
            case StagedFileNode(directory, file) if directory.state is State.OPEN:
                if times is not None and _UTIME_NOW not in times:
                    with directory.change(of_content=False):
                        file.content.set_times(*times)
            case ImageNode(recent=None):
                if times is not None and _UTIME_NOW not in times and abs(times[1] - time.time_ns()) > _NOW_NS:
                    fail(errno.EROFS, "an image's time is that of its last use")
                self._client.touch(ImageRef(datastore=node.key[0], image_id=node.key[1]))
            case ImageFileNode(parent=ImageNode(recent=None)):
                fail(errno.EROFS)
            case StagedNode() | StagedFileNode() | ImageNode() | ImageFileNode():
                pass
            case _:
                fail(errno.EPERM)

    def _adjusted(self, path: str | None, handle: int | None) -> Node:
        opened = self._handles.find(handle)
        if isinstance(opened, StagedHandle):
            return StagedFileNode(opened.directory, opened.file)
        if isinstance(opened, CompanionHandle):
            return self._settled(os.path.dirname(opened.path))
        return self._settled(path)

    def _node(self, path: str | None) -> Node:
        node = self._resolver.find(path) if path is not None else None
        return node if node is not None else fail(errno.ENOENT)

    def _settled(self, path: str | None) -> Node:
        """What the path leads to when no publish is running there."""
        node = self._node(path)
        if isinstance(node, StagedNode | StagedFileNode):
            node.directory.wait_published()
            node = self._node(path)
        return node
