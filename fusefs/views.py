"""What stat and readdir show of the things that paths lead to."""

import errno
import time
from functools import partial
from typing import NamedTuple

from fusefs import nodes
from fusefs.attributes import Attributes, Owner
from fusefs.deleting import Deletions
from fusefs.errors import fail
from fusefs.handles import Entry
from fusefs.tree import (
    ROOT_INODE,
    IndexedDatastore,
    IndexedFile,
    IndexedImage,
    Tree,
    deleted_inode,
    document_inode,
    file_inode,
)

_BLOCK = 4096
# Documents are made when they are opened: until then nobody knows how long they are. As in sysfs.
_DOCUMENT_BYTES = 4096


class Capacity(NamedTuple):
    """A file system's room, in blocks of `block_size` bytes."""

    block_size: int
    blocks: int
    free: int
    available: int  # of the free ones, what new images may take
    files: int


class Views:
    """Turns what is known into attributes and entries, without asking anybody."""

    def __init__(self, tree: Tree, deletions: Deletions, owner: Owner) -> None:
        self._tree = tree
        self._deletions = deletions
        self._owner = owner
        self._started_ns = time.time_ns()

    def attributes(self, node: nodes.Node) -> Attributes:
        match node:
            case nodes.RootNode():
                return self._owner.directory(
                    ROOT_INODE, subdirectories=len(self._tree.datastores), modified_ns=self._started_ns
                )
            case nodes.DatastoreNode(datastore):
                return self._of_datastore(datastore)
            case nodes.DeletedNode(datastore):
                return self._owner.directory(deleted_inode(datastore.number), modified_ns=self._started_ns)
            case nodes.ImageNode(_, image, _) | nodes.DeletedImageNode(_, image):
                return self._of_image(image)
            case nodes.DocumentNode(about):
                return self._owner.file(document_inode(_number(about)), _DOCUMENT_BYTES, 0, time.time_ns())
            case nodes.GhostNode(_, ghost):
                return self._of_image(ghost.image)
            case nodes.ImageFileNode(nodes.ImageNode(_, image, _), file):
                return self._of_file(image, file)
            case nodes.DeletedFileNode(nodes.DeletedImageNode(_, image), file):
                return self._of_file(image, file)
            case nodes.LateNode(_, _, companion):
                size = len(companion.data)
                return self._owner.file(companion.inode, size, size, time.time_ns(), writable=True)
            case nodes.GhostFileNode(parent, file):
                return self._of_file(parent.ghost.image, file)
            case nodes.StagedNode(directory):
                return self._owner.directory(directory.inode, modified_ns=directory.modified_ns)
            case nodes.StagedFileNode(directory, file):
                return file.attributes(self._owner)

    def entries(self, node: nodes.Node) -> list[Entry]:
        """What readdir lists; files of an image in the order that completes a copy with its last file."""
        own: list[Entry] = [(".", partial(self.attributes, node)), ("..", partial(self.attributes, nodes.RootNode()))]
        match node:
            case nodes.RootNode():
                return own + [(each.name, partial(self._of_datastore, each)) for each in self._tree.datastores]
            case nodes.DatastoreNode(datastore):
                return own + [(each.image_id, partial(self._of_image, each)) for each in datastore.valid_images()]
            case nodes.DeletedNode(datastore):
                return own + [(each.image_id, partial(self._of_image, each)) for each in datastore.tombstoned_images()]
            case nodes.DeletedImageNode(_, image):
                return own + self._files(image, set())
            case nodes.ImageNode(_, image, _):
                return own + self._files(image, self._deletions.hidden(node.key, image))
            case nodes.GhostNode(_, ghost):
                return own + self._files(ghost.image, ghost.removed)
            case nodes.StagedNode(directory):
                staged = directory.files
                return own + [(file.name, partial(file.attributes, self._owner)) for file in staged]
            case _:
                fail(errno.ENOTDIR)

    def capacity(self, datastore: IndexedDatastore | None) -> Capacity:
        """Of a datastore; of all of them together where none is named."""
        infos = [each.info for each in ([datastore] if datastore is not None else self._tree.datastores)]
        return Capacity(
            block_size=_BLOCK,
            blocks=sum(info.capacity_bytes for info in infos) // _BLOCK,
            free=sum(info.free_bytes for info in infos) // _BLOCK,
            available=sum(max(info.free_bytes - info.reserve_bytes, 0) for info in infos) // _BLOCK,
            files=sum(info.image_count for info in infos),
        )

    def _files(self, image: IndexedImage, without: set[str]) -> list[Entry]:
        return [(file.name, partial(self._of_file, image, file)) for file in image.files if file.name not in without]

    def _of_datastore(self, datastore: IndexedDatastore) -> Attributes:
        return self._owner.directory(
            datastore.inode, subdirectories=len(datastore.images), modified_ns=self._started_ns
        )

    def _of_image(self, image: IndexedImage) -> Attributes:
        modified = image.created_ns or image.touched_ns or self._started_ns
        return self._owner.directory(image.inode, modified_ns=modified, accessed_ns=image.touched_ns)

    def _of_file(self, image: IndexedImage, file: IndexedFile) -> Attributes:
        return self._owner.file(
            file_inode(image.number, file.name, file.kind), file.size, file.allocated, file.modified_ns
        )


def _number(node: nodes.DatastoreNode | nodes.ImageNode | nodes.DeletedImageNode | nodes.StagedNode) -> int:
    match node:
        case nodes.DatastoreNode(datastore):
            return datastore.number
        case nodes.StagedNode(directory):
            return directory.number
        case nodes.ImageNode() | nodes.DeletedImageNode():
            return node.image.number
