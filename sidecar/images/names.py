"""Image ids, and the names of the files in an image's directory."""

import re

from sidecar.errors import InvalidImageId, InvalidRequest

TIMESTAMP = "image_timestamp.txt"  # empty; its mtime is the last use
TIMESTAMP_RENAMED = "image_timestamp.txt.renamed"  # the timestamp file while a sweep decides
TOMBSTONE = "image_tombstone.txt"  # present: deleted, restorable
UNUSED_MARKER = "unused_image_marker.txt"  # seconds since the epoch: the scan that found the image unused
LOCK_SUFFIX = ".ec_lock"
STAGING_PREFIX = "tmp_image_"
VM_PREFIX = "vm_"  # of a VM's directory

_BOOKKEEPING = {TIMESTAMP, TIMESTAMP_RENAMED, TOMBSTONE, UNUSED_MARKER}
_IMAGE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)


def check_image_id(image_id: str) -> None:
    """Raises InvalidImageId for what cannot be the name of an image."""
    if not is_image_id(image_id):
        raise InvalidImageId(
            f"{image_id[:200]!r} is no image id: use 1 to 128 letters, digits, '.', '_' and '-', "
            f"not starting with a dot and not ending in {LOCK_SUFFIX}"
        )


def is_image_id(name: str) -> bool:
    # An image named like another one's lock file would stand where that lock has to be.
    return _IMAGE_ID.fullmatch(name) is not None and not name.endswith(LOCK_SUFFIX)


def is_bookkeeping(name: str) -> bool:
    """Whether a name in an image's directory is ours, and neither part of the disk nor a companion."""
    return name.startswith(".") or is_reserved(name)


def check_file_name(name: str) -> None:
    """Raises InvalidRequest for what cannot be the name of a file in an image or a staging directory."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        encoded = b""
    if not 0 < len(encoded) <= 255 or "/" in name or "\0" in name or name in (".", "..") or is_reserved(name):
        raise InvalidRequest(f"{name[:300]!r} cannot be the name of an image's file")


def is_reserved(name: str) -> bool:
    """Whether a staged file may not be called so: the sidecar's own files are written by the sidecar alone."""
    return name in _BOOKKEEPING or is_lock_or_staging(name)


def is_lock_or_staging(name: str) -> bool:
    """Whether a name in an image's directory is that of a lock, or of a staging directory (layout vsan)."""
    # No dot in the latter: the image `tmp_image_x` is valid, and its files are `tmp_image_x.vmdk` and the like.
    return name.endswith(LOCK_SUFFIX) or (name.startswith(STAGING_PREFIX) and "." not in name)


def is_temporary(name: str) -> bool:
    """Whether a name in an image's directory is that of a file that is made for a moment.

    As of what a companion file's write puts in its place by a rename: who dies before that leaves it.
    """
    return re.fullmatch(r"\.[0-9a-f]{32}", name) is not None


def descriptor_name(image_id: str) -> str:
    return f"{image_id}.vmdk"


def metadata_name(image_id: str) -> str:
    return f"{image_id}.ecv"


def manifest_name(image_id: str) -> str:
    return f"{image_id}.manifest"


def renamed_companion(name: str, old_stem: str, image_id: str) -> str:
    """What a companion file is called in the image `image_id`: `<stem>.x` follows its image, other names stay."""
    return image_id + name[len(old_stem) :] if name.startswith(f"{old_stem}.") else name
