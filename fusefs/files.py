"""The operations on open files, and how they are opened."""

import errno
import os
from typing import Any, NamedTuple

from fusefs import nodes
from fusefs.copying import Copying
from fusefs.deleting import Deletions
from fusefs.documents import Documents
from fusefs.errors import fail, operation
from fusefs.generations import Generations
from fusefs.handles import CompanionHandle, DocumentHandle, Handles, ImageHandle, StagedHandle
from fusefs.processes import caller, is_being_killed, thread_group
from fusefs.provenance import Generation, SourceFile
from fusefs.reading import Opener
from fusefs.refusals import Refusals
from fusefs.sources import Sources
from fusefs.staged import StagedDirectory, StagedFile
from fusefs.staging import LateCompanion, StagingArea
from fusefs.tree import IndexedFile, Tree, file_inode
from fusefs.views import Views


class Opened(NamedTuple):
    """An open file's number, and what the kernel may do with the pages that it has of the path."""

    handle: int
    keep_cache: bool = False
    direct_io: bool = False


class Files:
    def __init__(
        self,
        opener: Opener,
        tree: Tree,
        area: StagingArea,
        deletions: Deletions,
        views: Views,
        documents: Documents,
        sources: Sources,
        resolver: nodes.Resolver,
        handles: Handles,
        generations: Generations,
    ) -> None:
        self._opener = opener
        self._tree = tree
        self._area = area
        self._deletions = deletions
        self._views = views
        self._documents = documents
        self._resolver = resolver
        self._handles = handles
        self._sources = sources
        self._copying = Copying(tree, handles, sources)
        self._generations = generations
        self.refusals = Refusals()

    def path_of(self, *arguments: Any) -> str:
        """For the log: the path that is among a call's arguments, or that of the handle."""
        for argument in arguments:
            if isinstance(argument, str):
                return argument
            if isinstance(argument, int) and (handle := self._handles.find(argument)) is not None:
                return handle.path
        return ""

    def _opened_staged(self, path: str, directory: StagedDirectory, file: StagedFile, *, writable: bool) -> Opened:
        # Past the page cache of the mount: its pages would cost a copy more for each write, and be thrown away.
        return Opened(self._handles.add(StagedHandle(path, directory, file, writable)), direct_io=True)

    @operation
    def open(self, path: str, flags: int, pid: int) -> Opened:
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        node = self._resolver.settled(path) if writing else self._resolver.get(path)
        match node:
            case nodes.StagedFileNode():
                if writing:
                    node.directory.require_writable(node.file, caller(pid))
                return self._open_staged(path, node, writing=writing, truncating=bool(flags & os.O_TRUNC))
            case nodes.ImageFileNode(parent, file) | nodes.DeletedFileNode(parent, file):
                if writing or flags & os.O_TRUNC:
                    self.refusals.note(thread_group(pid), path)
                    fail(errno.EROFS)
                return self._open_image_file(path, node, parent, file, pid)
            case nodes.DocumentNode():
                if writing or flags & os.O_TRUNC:
                    fail(errno.EROFS)
                # Past the page cache: it is read to its end, wherever that is.
                return Opened(self._handles.add(DocumentHandle(path, self._documents.text(node))), direct_io=True)
            case nodes.LateNode(_, recent, companion):
                if flags & os.O_TRUNC:
                    companion.truncate(0)
                companion.handles += 1
                return Opened(self._handles.add(CompanionHandle(path, recent, companion, writing)))
            case nodes.GhostFileNode():
                fail(errno.ENOENT)
            case _:
                fail(errno.EISDIR)

    def _open_staged(self, path: str, node: nodes.StagedFileNode, *, writing: bool, truncating: bool) -> Opened:
        node.directory.opened(node.file, writable=writing)
        try:
            if writing and truncating:
                self._copying.truncate(node.directory, node.file, 0)
            return self._opened_staged(path, node.directory, node.file, writable=writing)
        except BaseException:
            node.directory.released(node.file, writable=writing)
            raise

    def _open_image_file(
        self,
        path: str,
        node: nodes.ImageFileNode | nodes.DeletedFileNode,
        parent: nodes.ImageNode | nodes.DeletedImageNode,
        file: IndexedFile,
        pid: int,
    ) -> Opened:
        key, name, state = parent.key, file.name, parent.image.state

        def there() -> Generation | None:
            """Also of an image that was deleted, or restored, since: it is read to its end."""
            image = self._tree.image(*key)
            found = image.file(name) if image is not None else None
            return found.generation if found is not None else None

        def current() -> Generation | None:
            image = self._tree.image(*key)
            return there() if image is not None and image.state == state else None

        reader = self._opener.open(parent.datastore, parent.image, file, there)
        source = SourceFile(*key, name, file.generation)
        process = thread_group(pid)
        try:
            opened = self._generations.opened(key, path, file.generation, self._views.attributes(node), process)
        except OSError:
            reader.close()
            raise
        self._sources.seen(source)
        handle = ImageHandle(path, source, reader, process, opened, current)
        return Opened(self._handles.add(handle), opened.keep_pages)

    @operation
    def create(self, path: str, flags: int, pid: int) -> Opened:
        names = nodes.split(path)
        parent = self._resolver.settled("/".join(names[:-1]))
        match parent:
            case nodes.StagedNode(directory):
                self._generations.require_free(path)
                file = directory.create(names[-1], caller(pid))
                return self._opened_staged(path, directory, file, writable=True)
            case nodes.ImageNode(_, image, recent) if recent is not None and not names[-1].endswith(".vmdk"):
                name = nodes.new_name(path)
                final_name = recent.final_name(name)
                self._area.keep(recent)
                self._deletions.cancel(parent.key, final_name)
                companion = LateCompanion(name, file_inode(image.number, final_name))
                recent.late[name] = companion
                return Opened(self._handles.add(CompanionHandle(path, recent, companion, writable=True)))
            case nodes.ImageNode():
                fail(errno.EROFS)
            case nodes.GhostNode():
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
                return bytes(opened.companion.data[offset : offset + size])
            case DocumentHandle():
                return opened.text[offset : offset + size]
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
    def write(self, handle: int, data: memoryview, offset: int, pid: int) -> int:
        opened = self._handles.get(handle)
        match opened:
            case StagedHandle(writable=True):
                self._copying.write(opened, data, offset, pid)
            case CompanionHandle(writable=True):
                opened.companion.write(data, offset)
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
    def truncate(self, path: str | None, size: int, pid: int, handle: int | None = None) -> None:
        opened = self._handles.find(handle)
        node: nodes.Node
        match opened:
            case StagedHandle(directory=directory, file=file):
                node = nodes.StagedFileNode(directory, file)
            case CompanionHandle(companion=companion):
                companion.truncate(size)
                return
            case _:
                node = self._resolver.settled(path)
                if isinstance(node, nodes.StagedFileNode):
                    node.directory.require_writable(node.file, caller(pid))
        match node:
            case nodes.StagedFileNode(directory, file):
                self._copying.truncate(directory, file, size)
            case nodes.LateNode(_, _, companion):
                companion.truncate(size)
            case nodes.ImageFileNode() | nodes.DeletedFileNode() | nodes.DocumentNode():
                fail(errno.EROFS)
            case _:
                fail(errno.EISDIR)

    @operation
    def fallocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        opened = self._handles.get(handle)
        if not isinstance(opened, StagedHandle) or not opened.writable or mode != 0:
            fail(errno.EOPNOTSUPP)
        with opened.directory.change(), opened.file.complete_or_given_up():
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
            case CompanionHandle(writable=True, companion=companion):
                if companion.changed and not companion.is_temporary and not is_being_killed(pid):
                    self._area.add_companion(opened.recent, companion)

    @operation
    def release(self, handle: int) -> None:
        opened = self._handles.remove(handle)
        match opened:
            case ImageHandle():
                try:
                    opened.reader.close()
                finally:  # else its path would stand for no other file any more
                    self._sources.seen(opened.source)
                    self._generations.closed(opened.opened, lambda: opened.current() == opened.source.generation)
            case StagedHandle():
                if opened.borrowed is not None:
                    opened.borrowed.reader.close()
                opened.directory.released(opened.file, writable=opened.writable)
                self._area.wake()
            case CompanionHandle(companion=companion):
                companion.handles -= 1
                if companion.handles == 0 and not companion.is_temporary:
                    opened.recent.late.pop(companion.name, None)

    @operation
    def fsync(self, handle: int) -> None:
        opened = self._handles.get(handle)
        if isinstance(opened, StagedHandle):
            opened.directory.sync(opened.file)
