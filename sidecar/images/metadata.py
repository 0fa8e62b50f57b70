"""The companion files that have a meaning: `<id>.ecv`, `<id>.manifest`; and changes to companions of an image."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from sidecar.datastores.interface import Datastore
from sidecar.errors import FileNotInImage, InvalidMetadata, InvalidRequest
from sidecar.images.image import FileKind, Image, ImageFile, not_found
from sidecar.images.names import check_file_name, is_bookkeeping, manifest_name, metadata_name
from sidecar.images.store import ImageStore
from sidecar.strict_json import parse_json

MAX_METADATA_BYTES = 1 << 20
_MANIFEST_VALUES = {"imageType": ("CLOUD", "MANAGEMENT"), "imageReplication": ("EAGER", "ON_DEMAND")}

_log = logging.getLogger(__name__)


def parse_metadata(name: str, content: bytes) -> dict[str, Any]:
    """The JSON object in a metadata or manifest file; any bytes give one or InvalidMetadata, which names the file."""
    if len(content) > MAX_METADATA_BYTES:
        raise InvalidMetadata(f"{name} has more than {MAX_METADATA_BYTES} bytes")
    try:
        value = parse_json(content)
    except ValueError as error:
        raise InvalidMetadata(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidMetadata(f"{name} does not hold a JSON object")
    if name.endswith(".manifest"):
        for field, allowed in _MANIFEST_VALUES.items():
            if field in value and value[field] not in allowed:
                raise InvalidMetadata(f"{name}: {field} is {value[field]!r}, not one of {', '.join(allowed)}")
    return value


def has_meaning(name: str, image_id: str) -> bool:
    return name in (metadata_name(image_id), manifest_name(image_id))


def check_metadata(datastore: Datastore, image: Image, file: ImageFile) -> None:
    """InvalidMetadata when the file is one of the two and does not hold what it must."""
    if has_meaning(file.name, image.key.image_id):
        parse_metadata(f"{image.key}: {file.name}", datastore.read_file(image.path(file.name), MAX_METADATA_BYTES + 1))


def read_metadata(datastore: Datastore, image: Image, name: str) -> str:
    """The text of one of the two; empty when the image has none. InvalidMetadata when it is corrupt."""
    if not any(file.name == name for file in image.files):
        return ""
    content = datastore.read_file(image.path(name), MAX_METADATA_BYTES + 1)
    parse_metadata(f"{image.key}: {name}", content)
    return content.decode()


def update_companions(
    store: ImageStore,
    image_id: str,
    files: Mapping[str, bytes],
    remove: Iterable[str],
    *,
    lock_timeout: float | None = None,
) -> Image:
    """Writes and removes companion files of a valid image; all is checked before the first change."""
    removed = dict.fromkeys(remove)
    for name in (*files, *removed):
        check_file_name(name)
        if is_bookkeeping(name):
            raise InvalidRequest(f"{name!r} is not a companion file: names that start with a dot are not kept")
    if both := files.keys() & removed.keys():
        raise InvalidRequest(f"{min(both)!r} is to be written and to be removed: it can be one of the two")
    for name, content in files.items():
        if len(content) > MAX_METADATA_BYTES:
            raise InvalidRequest(f"{name} has {len(content)} bytes; a companion file has at most {MAX_METADATA_BYTES}")
        if has_meaning(name, image_id):
            parse_metadata(name, content)
    try:
        with store.lock(image_id, "update metadata of", timeout=lock_timeout):
            image = store.read_valid(image_id)
            kinds = {file.name: file.kind for file in image.files}
            for name in (*files, *removed):
                if kinds.get(name, FileKind.COMPANION) is not FileKind.COMPANION:
                    raise InvalidRequest(f"{image.key}: {name} is part of the disk, and a disk never changes")
            for name in removed:
                if name not in kinds:
                    raise FileNotInImage(f"{image.key} has no file {name!r}")
            for name, content in files.items():
                store.datastore.write_file(image.path(name), content)
            for name in removed:
                store.datastore.remove_file(image.path(name))
            store.datastore.sync_directory(image.directory)
            after = _read_again(store, image)
    except FileNotFoundError:
        raise not_found(store.key(image_id)) from None
    store.changed(image_id)
    return after


def _read_again(store: ImageStore, image: Image) -> Image:
    """The image after its change; as it was before, when that cannot be read: the change is made."""
    try:
        return store.read(image.key.image_id)
    except Exception as error:
        _log.warning("changed image unreadable image=%s error=%s", image.key, error)
        return image
