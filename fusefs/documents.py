"""What is known about an image or a datastore: as JSON, in `.image.json` and `.datastore.json`, and as attributes.

An image's document is asked of the sidecar when it is opened, with metadata and users. While the sidecar is away it is
what the index knows, and says since when that may be old.
"""

import contextlib
import json
import logging
from collections.abc import Callable

from fusefs import nodes
from fusefs.pulse import Pulse
from fusefs.staged import StagedDirectory
from fusefs.staging import StagingArea
from fusefs.tree import IndexedImage
from sidecar.client import FileKind, ImageRef, ImageState, SidecarClient
from sidecar.documents import Document, datastore_document, full_document, kind_name, ns_text, state_name
from sidecar.errors import ImagesError

_log = logging.getLogger(__name__)

ATTRIBUTE_PREFIX = "user.image."


class Documents:
    """`stale_since` tells since when the index is not fed, in seconds since the epoch; None while it is."""

    def __init__(
        self, client: SidecarClient, pulse: Pulse, area: StagingArea, stale_since: Callable[[], float | None]
    ) -> None:
        self._client = client
        self._pulse = pulse
        self._area = area
        self._stale_since = stale_since

    def text(self, node: nodes.DocumentNode) -> bytes:
        """The document, as its file has it."""
        match node.about:
            case nodes.DatastoreNode(datastore):
                if self._stale_since() is None:  # the stream of a sidecar that hangs is up
                    with contextlib.suppress(ImagesError):
                        self._pulse.require()
                staged = [each for each in self._area.directories if each.ref.datastore == datastore.name]
                document = {
                    **datastore_document(datastore.info),
                    "staged": {each.ref.image_id: _unpublished(each) for each in staged},
                    "stale_since": self._staleness(),
                }
            case nodes.StagedNode(directory):
                document = _of_staged(directory)
            case nodes.ImageNode() | nodes.DeletedImageNode() as image:
                document = self._of_image(image)
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(errors="surrogateescape")

    def attributes(self, node: nodes.Node) -> dict[str, bytes]:
        """The extended attributes, by name: of what the index knows, so that asking for them costs no call."""
        match node:
            case nodes.StagedNode(directory):
                document = _of_staged(directory)
            case nodes.ImageNode(datastore, image, _) | nodes.DeletedImageNode(datastore, image):
                document = _of_indexed(datastore.name, image)
            case _:
                document = {}
        return {
            f"{ATTRIBUTE_PREFIX}{name}": str(value).encode(errors="surrogateescape")
            for name, value in document.items()
            if isinstance(value, str | int) and value != ""
        }

    def _of_image(self, node: nodes.ImageNode | nodes.DeletedImageNode) -> Document:
        datastore, image_id = node.key
        try:
            self._pulse.require()
            ref = ImageRef(datastore=datastore, image_id=image_id)
            return full_document(self._client.image(ref, with_vms=True))
        except ImagesError as error:
            _log.info("document from the index image=%s/%s cause=%s", datastore, image_id, error.message)
            known = _of_indexed(datastore, node.image)
            return {**known, "stale_since": self._staleness(), "stale_because": error.message}

    def _staleness(self) -> str | None:
        since = self._stale_since() or self._pulse.silent_since
        return None if since is None else ns_text(int(since * 1e9))


def _of_indexed(datastore: str, image: IndexedImage) -> Document:
    files = image.files
    return {
        "image": f"{datastore}/{image.image_id}",
        "state": state_name(ImageState.ValueType(image.state)),
        "size_bytes": sum(file.size for file in files),
        "allocated_bytes": sum(file.allocated for file in files),
        "create_time": ns_text(image.created_ns),
        "touch_time": ns_text(image.touched_ns),
        "directory": image.directory,
        "files": [
            {
                "name": file.name,
                "kind": kind_name(FileKind.ValueType(file.kind)),
                "size_bytes": file.size,
                "allocated_bytes": file.allocated,
                "modify_time": ns_text(file.modified_ns),
            }
            for file in files
        ],
    }


def _of_staged(directory: StagedDirectory) -> Document:
    """An image in the making; `reason` says why it is not published."""
    described = []
    for file in directory.files:
        try:
            status = file.content.status()
        except OSError:  # closed: it was published, or dropped, just now
            continue
        described.append(
            {
                "name": file.name,
                "size_bytes": status.size,
                "allocated_bytes": status.allocated,
                "given_up": file.given_up or None,
            }
        )
    return {
        "image": str(directory),
        "state": "STAGED",
        "reason": _unpublished(directory),
        "directory": directory.staging.directory,
        "files": described,
    }


def _unpublished(directory: StagedDirectory) -> str:
    """Why it is not published."""
    writing = f"files open for writing: {directory.writers}" if directory.writers else ""
    return writing or directory.reason or "waiting until it is left alone"
