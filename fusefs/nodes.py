"""What a path in the mount leads to."""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fusefs.deleting import Deletions, Ghost, purged_key
from fusefs.doubts import Key
from fusefs.errors import fail
from fusefs.pulse import Pulse
from fusefs.staged import StagedDirectory, StagedFile
from fusefs.staging import LateCompanion, Recent, StagingArea
from fusefs.tree import IndexedDatastore, IndexedFile, IndexedImage, Tree
from sidecar.client import ImageRef, SidecarClient
from sidecar.errors import ImageNotFound


@dataclass(frozen=True, slots=True)
class RootNode:
    pass


@dataclass(frozen=True, slots=True)
class DatastoreNode:
    datastore: IndexedDatastore


@dataclass(frozen=True, slots=True)
class ImageNode:
    """An image; `recent` while it remembers its making."""

    datastore: IndexedDatastore
    image: IndexedImage
    recent: Recent | None

    @property
    def key(self) -> Key:
        return (self.datastore.name, self.image.image_id)


@dataclass(frozen=True, slots=True)
class DeletedNode:
    """A datastore's tombstoned images. Not listed itself: who deletes all that is listed does not mean these."""

    datastore: IndexedDatastore


@dataclass(frozen=True, slots=True)
class DeletedImageNode:
    datastore: IndexedDatastore
    image: IndexedImage

    @property
    def key(self) -> Key:
        return (self.datastore.name, self.image.image_id)


@dataclass(frozen=True, slots=True)
class DeletedFileNode:
    parent: DeletedImageNode
    file: IndexedFile


@dataclass(frozen=True, slots=True)
class ImageFileNode:
    """A file of an image, by its own name or by the one that its copier used."""

    parent: ImageNode
    file: IndexedFile


@dataclass(frozen=True, slots=True)
class GhostNode:
    datastore: IndexedDatastore
    ghost: Ghost


@dataclass(frozen=True, slots=True)
class GhostFileNode:
    parent: GhostNode
    file: IndexedFile


@dataclass(frozen=True, slots=True)
class StagedNode:
    directory: StagedDirectory


@dataclass(frozen=True, slots=True)
class StagedFileNode:
    directory: StagedDirectory
    file: StagedFile


@dataclass(frozen=True, slots=True)
class LateNode:
    """A companion file that is being written into an image that is published already."""

    parent: ImageNode
    recent: Recent
    companion: LateCompanion


@dataclass(frozen=True, slots=True)
class DocumentNode:
    """What is known about a directory of the mount, as JSON. Not listed: no copy of the directory picks it up."""

    about: DatastoreNode | ImageNode | DeletedImageNode | StagedNode


Node = (
    RootNode
    | DatastoreNode
    | DeletedNode
    | DeletedImageNode
    | DeletedFileNode
    | DocumentNode
    | ImageNode
    | ImageFileNode
    | LateNode
    | GhostNode
    | GhostFileNode
    | StagedNode
    | StagedFileNode
)


DELETED = ".deleted"
IMAGE_DOCUMENT = ".image.json"
DATASTORE_DOCUMENT = ".datastore.json"


def split(path: str) -> list[str]:
    """The names that a path of libfuse is made of."""
    return [name for name in path.split("/") if name]


def new_name(path: str) -> str:
    """The last name of a path, for something that is to be made; EINVAL when no image or file can be called that."""
    name = split(path)[-1]
    try:
        name.encode()
    except UnicodeEncodeError:
        fail(errno.EINVAL, f"{name!r} is not UTF-8")
    return name


def image_path(datastore: str, image: IndexedImage) -> str:
    """Where the image is shown, in the state that it is in."""
    return f"/{datastore}/{DELETED}/{image.image_id}" if image.is_tombstoned else f"/{datastore}/{image.image_id}"


def file_paths(datastore: str, *images: IndexedImage | None) -> Iterator[str]:
    """Where the files of images are shown, each in the state that it is in."""
    for image in filter(None, images):
        directory = image_path(datastore, image)
        yield from (f"{directory}/{file.name}" for file in image.files)


class Resolver:
    """Finds what a path leads to: an image in the making first, then the index, then the ghost of an image."""

    def __init__(
        self, client: SidecarClient, pulse: Pulse, tree: Tree, area: StagingArea, deletions: Deletions
    ) -> None:
        self._client = client
        self._pulse = pulse
        self._tree = tree
        self._area = area
        self._deletions = deletions

    def find(self, path: str) -> Node | None:
        names = split(path)
        if not names:
            return RootNode()
        datastore = self._tree.datastore(names[0])
        if datastore is None:
            return None
        parent: Node | None = DatastoreNode(datastore)
        for name in names[1:]:
            parent = self._child(parent, name) if parent is not None else None
        return parent

    def get(self, path: str | None) -> Node:
        """What the path leads to; ENOENT for nothing, which a removed file's path is too."""
        node = self.find(path) if path is not None else None
        return node if node is not None else fail(errno.ENOENT)

    def settled(self, path: str | None) -> Node:
        """What the path leads to when no publish is running there."""
        node = self.get(path)
        if isinstance(node, StagedNode | StagedFileNode):
            node.directory.wait_published()
            node = self.get(path)
        return node

    def with_details(self, node: ImageNode | DeletedImageNode) -> ImageNode | DeletedImageNode | None:
        """The image with its files, which some datastores tell only when asked; None when it is another one then."""
        if node.image.details_known:
            return node
        ref = ImageRef(datastore=node.datastore.name, image_id=node.image.image_id)
        # Not waited for at every image of an `ls -R`.
        self._pulse.require()
        try:
            image = self._tree.learn(node.image, self._client.image(ref))
        except ImageNotFound:
            return None
        return replace(node, image=image) if image.state == node.image.state else None

    def _child(self, parent: Node, name: str) -> Node | None:
        match parent:
            case DatastoreNode() if name == DATASTORE_DOCUMENT:
                return DocumentNode(parent)
            case DatastoreNode(datastore) if name == DELETED:
                return DeletedNode(datastore)
            case DatastoreNode(datastore):
                return self._directory(datastore, name)
            case DeletedNode(datastore):
                return self._deleted(datastore, name)
            case ImageNode() | DeletedImageNode() | StagedNode() if name == IMAGE_DOCUMENT:
                return DocumentNode(parent)
            case ImageNode() | DeletedImageNode():
                detailed = self.with_details(parent)
                return self._file(detailed, name) if detailed is not None else None
            case GhostNode() | StagedNode():
                return self._file(parent, name)
            case _:
                return None

    def _deleted(self, datastore: IndexedDatastore, image_id: str) -> DeletedImageNode | GhostNode | None:
        image = datastore.images.get(image_id)
        if image is not None and image.is_tombstoned:
            return DeletedImageNode(datastore, image)
        ghost = self._deletions.ghost(purged_key((datastore.name, image_id)))
        return GhostNode(datastore, ghost) if ghost is not None else None

    def _directory(self, datastore: IndexedDatastore, image_id: str) -> ImageNode | GhostNode | StagedNode | None:
        key = (datastore.name, image_id)
        directory = self._area.directory(key)
        image = datastore.images.get(image_id)
        # The image that came out of a staged directory has its number: from then on it is the image.
        if directory is not None and (image is None or image.number != directory.number):
            return StagedNode(directory)
        if image is not None and image.is_valid:
            return ImageNode(datastore, image, self._area.recent(key))
        ghost = self._deletions.ghost(key)
        return GhostNode(datastore, ghost) if ghost is not None else None

    def _file(self, parent: ImageNode | DeletedImageNode | GhostNode | StagedNode, name: str) -> Node | None:
        match parent:
            case DeletedImageNode(_, image):
                file = image.file(name)
                return DeletedFileNode(parent, file) if file is not None else None
            case StagedNode(directory):
                staged = directory.file(name)
                return StagedFileNode(directory, staged) if staged is not None else None
            case GhostNode(_, ghost):
                gone = None if name in ghost.removed else ghost.image.file(name)
                return GhostFileNode(parent, gone) if gone is not None else None
            case ImageNode(_, image, recent):
                if recent is not None and (companion := recent.late.get(name)) is not None:
                    return LateNode(parent, recent, companion)
                file = image.file(name)
                if file is None and recent is not None and name in recent.renamed:
                    file = image.file(recent.renamed[name])
                if file is None or file.name in self._deletions.hidden(parent.key, image):
                    return None
                return ImageFileNode(parent, file)
