"""What the file of a VM's disk is made on: the parent, and the extents, that it names.

Not to judge the disk, as the vmdk module does for images: whatever any program may follow is found. Only headers are
read, by our own code: `qemu-img info --backing-chain` would open what they name, connect to the servers in there, take
a process for each disk, and give the bytes that a guest wrote into a raw disk to all of QEMU's formats.
"""

import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from sidecar.errors import InvalidDisk
from sidecar.images.vmdk_descriptor import (
    MAX_DESCRIPTOR_BYTES,
    NO_PARENT,
    PARENT_HINT,
    SECTOR,
    codec_of,
    shown,
)
from sidecar.images.vmdk_sparse import SPARSE_MAGIC

START_BYTES = 4096
DISK_SUFFIXES = (".vmdk", ".qcow2", ".qcow", ".qed", ".img", ".raw")
"""What a file is called that is a disk, also when it is not there or empty."""

Alternatives = tuple[str, ...]
"""One name, in every way that a program may read it."""
ReadRange = Callable[[int, int], bytes]
"""Up to so many bytes (the second) at an offset (the first)."""

_QCOW_MAGIC, _QED_MAGIC = b"QFI\xfb", b"QED\0"
_HEADED_SUFFIXES = (".qcow2", ".qcow", ".qed")
_EMBEDDED = struct.Struct("<QQ")  # of a sparse VMDK, at 28: where its descriptor is, and its size, in sectors
_QEMU_EMBEDDED = (SECTOR, 20 * SECTOR)  # where QEMU reads it, whatever the header says
_QCOW = struct.Struct(">4sIQI")  # magic, version, offset and length of the backing file's name
_QCOW_EXTENSION = struct.Struct(">II")
_QCOW_DATA_FILE = 0x44415441
_QED = struct.Struct("<II")  # at 56: offset and length of the backing file's name
_MAX_NAME_BYTES = 4096  # QEMU takes 1023
_MAX_EXTENSIONS = 64

_DESCRIPTOR = re.compile(
    rb"(?:\xef\xbb\xbf)?(?:[ \t\r]*(?:#[^\n]*)?\n)*[ \t]*version[ \t]*=|\s*#[ \t]*Disk[ \t]*Descr", re.I
)
_PARENT_CID = re.compile(rb'^[ \t]*parentCID[ \t]*=[ \t]*"?([0-9a-f]{1,8})', re.IGNORECASE | re.MULTILINE)
_ENCODING = re.compile(rb'^[ \t]*encoding[ \t]*=[ \t]*"?([\w-]+)', re.IGNORECASE | re.MULTILINE)
_CHANGE_TRACK = re.compile(rb'^[ \t]*changeTrackPath[ \t]*=[ \t]*"?([^"\r\n]*)', re.IGNORECASE | re.MULTILINE)
_EXTENT = re.compile(
    rb'^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+[0-9]+[ \t]+(\w+)[ \t]+"([^"\r\n]*)"', re.IGNORECASE | re.MULTILINE
)
_ESCAPE = re.compile(rb"\|([0-9A-Fa-f]{2})")
_EXTENT_NAME = re.compile(r"-(flat|delta|sesparse|ctk|rdmp?|digest|[fs][0-9]+)\.vmdk", re.IGNORECASE)
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*):")


@dataclass(frozen=True, slots=True)
class Named:
    """The names in a disk's file. Those of `raw` have a guest's bytes in them, or other data: no header to be read."""

    parents: tuple[Alternatives, ...] = ()
    extents: tuple[Alternatives, ...] = ()
    raw: tuple[Alternatives, ...] = ()


def names_in(name: str, size: int, read: ReadRange) -> Named:
    """What the file `name`, of `size` bytes, is made on; nothing for what is no disk, or one that stands alone.

    Raises InvalidDisk when it cannot be told. OSErrors of `read` pass. At most 1 MiB is read.
    """
    start = read(0, START_BYTES)
    if start.startswith(_QCOW_MAGIC):
        return _qcow(start, read)
    if start.startswith(_QED_MAGIC):
        return _qed(start, read)
    if start.startswith(SPARSE_MAGIC):
        return _sparse(start, read)
    folded = name.casefold()
    if _DESCRIPTOR.match(start):
        if size > MAX_DESCRIPTOR_BYTES:
            raise InvalidDisk(f"a VMDK descriptor of {size} bytes, and one has at most {MAX_DESCRIPTOR_BYTES}")
        return described(start if size <= len(start) else read(0, size))
    if folded.endswith(_HEADED_SUFFIXES):
        raise InvalidDisk("it has no header of its format")
    if folded.endswith(".vmdk") and size <= MAX_DESCRIPTOR_BYTES and not _EXTENT_NAME.search(folded):
        raise InvalidDisk("it is no VMDK descriptor, and no extent of one")
    return Named()


def described(text: bytes) -> Named:
    """What a VMDK descriptor names. QEMU finds the parent's name anywhere, also in a comment."""
    encoding = _ENCODING.search(text)
    codec = codec_of({"encoding": encoding[1]} if encoding else {})
    hints = tuple(_read_as(hint.rstrip(), codec) for hint in PARENT_HINT.findall(text) if hint.strip())
    cid = _PARENT_CID.search(text)
    if cid and int(cid[1], 16) != NO_PARENT and not hints:
        raise InvalidDisk(f"it has a parent (parentCID {cid[1].decode()}), and does not say which")
    extents = [(kind.upper(), _read_as(name, codec)) for kind, name in _EXTENT.findall(text) if name]
    raw = [names for kind, names in extents if kind != b"SPARSE"]
    raw += [_read_as(name, codec) for name in _CHANGE_TRACK.findall(text) if name]
    return Named(hints, tuple(names for _, names in extents), tuple(raw))


def unescaped(name: bytes) -> bytes:
    """`|22` and the like, as VMware's own files write what a quoted name may not have."""
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), name)


def _read_as(name: bytes, codec: str) -> Alternatives:
    found = []
    for raw in (name, unescaped(name)):
        found.append(os.fsdecode(raw))  # the bytes as they are: QEMU
        try:
            found.append(raw.decode(codec))
        except UnicodeDecodeError:
            continue
    return tuple(dict.fromkeys(found))


def _sparse(start: bytes, read: ReadRange) -> Named:
    if len(start) < SECTOR:
        raise InvalidDisk(f"it ends after {len(start)} bytes, inside its header")
    offset, sectors = _EMBEDDED.unpack_from(start, 28)
    if not offset:
        return Named()  # an extent: the descriptor is another file
    if sectors * SECTOR > MAX_DESCRIPTOR_BYTES:
        raise InvalidDisk(
            f"it keeps {sectors} sectors for its descriptor, which has at most {MAX_DESCRIPTOR_BYTES} bytes"
        )
    areas = {(offset * SECTOR, sectors * SECTOR), _QEMU_EMBEDDED}
    texts = [described(read(*area).partition(b"\0")[0]) for area in areas if area[0] < 1 << 62]
    # The one extent is this file, whatever name the descriptor has for it.
    return Named(tuple(dict.fromkeys(names for text in texts for names in text.parents)))


def _qcow(start: bytes, read: ReadRange) -> Named:
    if len(start) < _QCOW.size:
        raise InvalidDisk("it ends inside its header")
    _, version, offset, length = _QCOW.unpack_from(start)
    if not 1 <= version <= 3:
        raise InvalidDisk(f"it is of version {version} of qcow, 1 to 3 are known")
    parents = _qemu_names(_name_at(offset, length, read)) if offset else []
    data: list[Alternatives] = []
    if version == 3 and len(start) >= 104 and int.from_bytes(start[72:80], "big") & 4:  # its data is in another file
        files = _data_files(int.from_bytes(start[100:104], "big"), read)
        if not files:
            raise InvalidDisk("its data is in another file, and it does not say which")
        data = [names for name in files for names in _qemu_names(name)]
    return Named(tuple(parents), tuple(data), tuple(data))


def _data_files(position: int, read: ReadRange) -> list[bytes]:
    found = []
    for _ in range(_MAX_EXTENSIONS):
        head = read(position, _QCOW_EXTENSION.size)
        kind, length = _QCOW_EXTENSION.unpack(head) if len(head) == _QCOW_EXTENSION.size else (0, 0)
        if kind == _QCOW_DATA_FILE:
            found.append(_name_at(position + _QCOW_EXTENSION.size, length, read))
        if not kind:
            break
        position += _QCOW_EXTENSION.size + -(-length // 8) * 8
    return found


def _qed(start: bytes, read: ReadRange) -> Named:
    if len(start) < 64:
        raise InvalidDisk("it ends inside its header")
    if not int.from_bytes(start[16:24], "little") & 1:
        return Named()
    offset, length = _QED.unpack_from(start, 56)
    return Named(tuple(_qemu_names(_name_at(offset, length, read))))


def _name_at(offset: int, length: int, read: ReadRange) -> bytes:
    if not 0 < length <= _MAX_NAME_BYTES or offset >= 1 << 62:
        raise InvalidDisk(f"the name of a file in it has {length} bytes, at byte {offset}")
    name = read(offset, length)
    if len(name) < length or b"\0" in name:
        raise InvalidDisk(f"it is damaged: the name of a file in it, at byte {offset}, is not whole")
    return name


def _qemu_names(name: bytes) -> list[Alternatives]:
    """The files of this host that QEMU takes a name for; none for one like nbd://host/disk, whose server has them."""
    text = os.fsdecode(name)
    if text.startswith("json:"):
        try:
            return _files_in(json.loads(text.removeprefix("json:")))
        except (ValueError, RecursionError) as error:
            raise InvalidDisk(f"it names {shown(text)}, which is not JSON: {error}") from None
    protocol = _PROTOCOL.match(text)
    if protocol is None or protocol[1].lower() in ("file", "host_device"):
        return [(text[protocol.end() :] if protocol else text,)]
    return []


def _files_in(value: object) -> list[Alternatives]:
    """Of a json: name: every file, however deep, and however it is written: {"file": {"filename": …}}, or dotted."""
    if isinstance(value, list):
        return [names for item in value for names in _files_in(item)]
    if not isinstance(value, dict):
        return []
    found: list[Alternatives] = []
    for key, item in value.items():
        if not isinstance(item, str):
            found += _files_in(item)
        elif key.rpartition(".")[2] == "filename":
            found += _qemu_names(os.fsencode(item))
    return found
