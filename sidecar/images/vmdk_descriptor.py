"""The text that describes a VMDK: its parser, and the one change that is ever made to it.

A descriptor comes from strangers, and several programs read it that do not agree with each other: QEMU finds
`parentFileNameHint` anywhere, also in a comment, ends a file name at the first quotation mark, reads an extent across
line ends, and counts it again for each blank line before it (seen with 7.2). What two readers could understand
differently is refused, so that what was checked here is what they will open.
"""

import enum
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sidecar.errors import InvalidDisk
from sidecar.images.names import is_reserved

SECTOR = 512
MAX_DESCRIPTOR_BYTES = 1 << 20
"""A longer text is refused. Real ones take 300 to 700 bytes, and some 30 bytes more for each extent."""
MAX_CAPACITY_BYTES = 64 << 40
"""A larger disk is refused. VMFS ends at 62 TiB, so nothing real is above it."""
NO_PARENT = 0xFFFFFFFF

_DELETABLE = re.compile(rb"^[ \t]*ddb\.deletable[ \t]*=.*(?:\n|\Z)", re.MULTILINE | re.IGNORECASE)
_METADATA_SUFFIXES = (".ecv", ".manifest")

_CREATE_TYPES = frozenset(
    {
        "monolithicflat",
        "monolithicsparse",
        "twogbmaxextentflat",
        "twogbmaxextentsparse",
        "2gbmaxextentflat",
        "2gbmaxextentsparse",
        "streamoptimized",
        "vmfs",
        "vmfspreallocated",
        "vmfseagerzeroedthick",
        "vmfsthin",
        "custom",
    }
)
_CONVERT = "convert it to another kind first, with qemu-img convert or vmkfstools -i"
_REFUSED_KINDS = {
    "VMFSRDM": "a raw device mapping: its data is on a device, not in a file",
    "VMFSRDMP": "a raw device mapping: its data is on a device, not in a file",
    "VMFSRAW": "a raw device: its data is not in a file",
    "VMFSSPARSE": f"the redo log of an ESX snapshot; {_CONVERT}",
    "SESPARSE": f"the space-efficient redo log of an ESX snapshot; {_CONVERT}",
}
# All are supersets of ASCII in which no byte of a longer character is a quotation mark or a slash, so that a line can
# be cut into its parts before it is decoded.
_ENCODINGS = {
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "ascii",
    "shift-jis": "cp932",
    "windows-31j": "cp932",
    "windows-932": "cp932",
    "gbk": "gbk",
    "gb2312": "gbk",
    "windows-936": "gbk",
    "gb18030": "gb18030",
    "big5": "cp950",
    "windows-950": "cp950",
    "euc-kr": "cp949",
    "windows-949": "cp949",
    "euc-jp": "euc_jp",
    **{f"windows-{page}": f"cp{page}" for page in range(1250, 1259)},
    **{f"iso-8859-{part}": f"iso8859-{part}" for part in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 16)},
}
_ONCE = ("version", "encoding", "cid", "parentcid", "createtype", "ddb.adaptertype")

_EXTENT = re.compile(
    rb'[ \t]*(RW|RDONLY|NOACCESS)[ \t]+([0-9]{1,19})[ \t]+([A-Za-z]+)(?:[ \t]+"([^"]*)"(?:[ \t]+([0-9]{1,19}))?)?[ \t]*'
)
_EXTENT_START = re.compile(rb"[ \t]*(?:RW|RDONLY|NOACCESS)(?:[ \t=]|$)", re.IGNORECASE)
_MOST_LEFT_BEHIND = 7  # of a CID, which has 1 to 8 digits
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
PARENT_HINT = re.compile(rb'parentFileNameHint[ \t]*=?[ \t]*"?([^"\r\n]*)', re.IGNORECASE)
_ESCAPE = re.compile(r"\|[0-9A-Fa-f]{2}")


class Access(enum.StrEnum):
    RW = "RW"
    RDONLY = "RDONLY"
    NOACCESS = "NOACCESS"


class Kind(enum.StrEnum):
    """The kinds of extents that an image may have. VMFS is FLAT as ESX writes it."""

    FLAT = "FLAT"
    VMFS = "VMFS"
    SPARSE = "SPARSE"
    ZERO = "ZERO"

    @property
    def is_flat(self) -> bool:
        return self in (Kind.FLAT, Kind.VMFS)


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of the disk's sectors and where they are. `file_name` is None for ZERO only."""

    access: Access
    size_sectors: int
    kind: Kind
    file_name: str | None
    offset_sectors: int = 0


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says. `parent_file_name_hint` is for messages: bytes that are not UTF-8 are escaped in it."""

    create_type: str
    cid: int
    parent_cid: int
    extents: tuple[Extent, ...]
    adapter_type: str | None = None
    parent_file_name_hint: str | None = None

    @property
    def capacity_bytes(self) -> int:
        return sum(extent.size_sectors for extent in self.extents) * SECTOR

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files of the extents, each once, in order of first use."""
        return tuple(dict.fromkeys(extent.file_name for extent in self.extents if extent.file_name is not None))


def shown(text: str | bytes) -> str:
    """`text` as a message may carry it: quoted, without control characters, and not endless."""
    return repr(text) if len(text) <= 300 else f"{text[:300]!r}..."


def check_file_name(name: str) -> None:
    """Check that `name` can be a file of a disk: a plain name, which every reader takes for the same file.

    Raises InvalidDisk with the name and the reason.
    """
    if reason := _name_fault(name):
        raise InvalidDisk(f"{shown(name)} cannot be a file of a disk: {reason}")


def _name_fault(name: str) -> str | None:
    folded = name.casefold()
    if not name:
        return "it is empty"
    if "/" in name or "\\" in name:
        return "the files of a disk are in the directory of its descriptor, so a name has no slash or backslash"
    if name.startswith("."):
        return "it starts with a dot"
    if _CONTROL_CHARACTER.search(name):
        return "it has a control character"
    if '"' in name:
        return "it has a quotation mark, at which QEMU ends the name"
    if _ESCAPE.search(name):
        return "it has a '|' and two hexadecimal digits, the escape of VMware's own files, which QEMU does not know"
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "it is not Unicode text"
    if length > 255:
        return f"it is {length} bytes long, and a name has at most 255"
    if is_reserved(folded) or folded.endswith(_METADATA_SUFFIXES):
        return "images keep their own state under that name"
    return None


def parse_descriptor(raw: bytes) -> Descriptor:
    """What the descriptor `raw` says; trailing NULs are padding.

    Raises InvalidDisk, and nothing else, for whatever is not a descriptor of a disk that can be an image. A parent is
    no fault here: see `require_standalone`.
    """
    entries, extent_lines = _read_lines(_lines(raw))
    for key in ("version", "cid", "parentcid", "createtype"):
        if key not in entries:
            raise InvalidDisk(f"not a VMDK descriptor: it has no {key} line")
    if entries["version"] not in (b"1", b"2", b"3", b"4"):
        raise InvalidDisk(f"the descriptor's version is {shown(entries['version'])}; 1 to 4 are known")
    create_type = _text(entries["createtype"])
    if create_type.casefold() not in _CREATE_TYPES:
        raise InvalidDisk(f"a disk of type {shown(create_type)} cannot be an image; {_CONVERT}")
    codec = codec_of(entries)
    extents = tuple(_extent(match, codec) for _, match in extent_lines)
    _check_extents(extents)
    hint = PARENT_HINT.search(raw)
    adapter_type = entries.get("ddb.adaptertype")
    return Descriptor(
        create_type=create_type,
        cid=_content_id("CID", entries["cid"]),
        parent_cid=_content_id("parentCID", entries["parentcid"]),
        extents=extents,
        adapter_type=None if adapter_type is None else _text(adapter_type),
        parent_file_name_hint=None if hint is None else _text(hint[1]),
    )


def require_standalone(descriptor: Descriptor) -> None:
    """Raise InvalidDisk when the disk is a delta on top of another one.

    Any mention of a parent's name counts, because QEMU follows it even from a comment.
    """
    hint = descriptor.parent_file_name_hint
    if descriptor.parent_cid != NO_PARENT or hint is not None:
        parent = f"parentCID {descriptor.parent_cid:08x}" if hint is None else shown(hint)
        raise InvalidDisk(f"the disk has a parent ({parent}); flatten it first with qemu-img convert")


def rewrite_descriptor(raw: bytes, renames: Mapping[str, str]) -> bytes:
    """`raw` with the extents' files renamed, and every other byte as it was; names that `renames` has not are kept.

    Raises InvalidDisk when `raw` is no descriptor, a new name cannot be a file of a disk, or the descriptor's encoding
    has no way to write it.
    """
    parse_descriptor(raw)
    lines = _lines(raw)
    entries, extent_lines = _read_lines(lines)
    codec = codec_of(entries)
    for index, match in extent_lines:
        if match[4] is None:
            continue
        new_name = renames.get(_file_name(match[4], codec))
        if new_name is None:
            continue
        check_file_name(new_name)
        start, end = match.span(4)
        try:
            lines[index] = lines[index][:start] + new_name.encode(codec) + lines[index][end:]
        except UnicodeEncodeError:
            raise InvalidDisk(f"the descriptor's encoding, {codec}, cannot write {shown(new_name)}") from None
    rewritten = b"\n".join(lines) + bytes(len(raw) - len(without_padding(raw)))
    parse_descriptor(rewritten)
    return rewritten


def without_deletable(raw: bytes) -> bytes:
    """A descriptor without `ddb.deletable`, by which a server refuses to delete the disk; anything else as it is."""
    return raw if raw.startswith(b"KDMV") else _DELETABLE.sub(b"", raw)


def without_padding(raw: bytes) -> bytes:
    """The text in `raw`, without the NULs that fill it up, and what QEMU leaves among them.

    QEMU writes a CID of fewer digits in place and ends the shorter text with a NUL: up to 7 bytes of the longer one
    stay behind it, in about 1 of 250 disks (seen with 7.2). It does not read them, and a copy does not have them. With
    more behind a NUL all of `raw` is given, which is no descriptor then.
    """
    text, _, rest = raw.partition(b"\0")
    return text if len(rest.rstrip(b"\0")) <= _MOST_LEFT_BEHIND else raw


def embedded_text(area: bytes) -> bytes:
    """The descriptor in the area that a sparse file keeps for it, without what follows the first NUL.

    Raises InvalidDisk when no NUL ends it: QEMU would read on into the sectors behind the area.
    """
    text, end, _ = area.partition(b"\0")
    if not end:
        raise InvalidDisk(f"the embedded descriptor fills its area of {len(area)} bytes, without the NUL that ends it")
    return text


def rewrite_embedded(area: bytes, new_name: str) -> bytes:
    """The area of an embedded descriptor, with its one extent named `new_name`: of the same length, padded with NULs.

    It takes the file's new name and no mapping, because the name inside often is not the name of the file: whoever
    renamed a single-file disk by hand did not change it. Raises InvalidDisk also when the descriptor does not fit.
    """
    text = embedded_text(area)
    rewritten = rewrite_descriptor(text, dict.fromkeys(parse_descriptor(text).file_names, new_name))
    if len(rewritten) >= len(area):
        raise InvalidDisk(
            f"the descriptor takes {len(rewritten)} bytes with the name {shown(new_name)}, and the file keeps "
            f"{len(area) - 1} for it; take a shorter image id"
        )
    return rewritten.ljust(len(area), b"\0")


def _lines(raw: bytes) -> list[bytes]:
    if len(raw) > MAX_DESCRIPTOR_BYTES:
        raise InvalidDisk(f"not a VMDK descriptor: {len(raw)} bytes, and one has at most {MAX_DESCRIPTOR_BYTES}")
    return without_padding(raw).split(b"\n")


def _read_lines(lines: list[bytes]) -> tuple[dict[str, bytes], list[tuple[int, re.Match[bytes]]]]:
    """The key and value lines, keys in lower case, and the extents, each with the index of its line.

    Refuses every line that is no comment, entry or whole extent. A start reads one descriptor for each image.
    """
    entries: dict[str, bytes] = {}
    extents: list[tuple[int, re.Match[bytes]]] = []
    after_blank = False
    for number, ended_line in enumerate(lines, 1):
        line = ended_line.removesuffix(b"\r")
        if _CONTROL.search(line):
            raise InvalidDisk(f"not a VMDK descriptor: line {number} has a control character")
        text = line.strip()
        blank, after_blank = after_blank, not text
        if after_blank or text.startswith(b"#") or line.startswith(b"\xef\xbb\xbf#"):
            continue
        if _EXTENT_START.match(line):
            extent = _EXTENT.fullmatch(line)
            if extent is None:
                raise InvalidDisk(f"line {number} of the descriptor is not an extent: {_extent_fault(line)}")
            if blank:
                raise InvalidDisk(
                    f"line {number} of the descriptor is an extent after a blank line: remove the line, "
                    f"because QEMU counts the extent once more for it"
                )
            extents.append((number - 1, extent))
            continue
        key_bytes, equals, value = line.partition(b"=")
        if not equals:
            raise InvalidDisk(f"not a VMDK descriptor: line {number} is {shown(line.strip())}")
        key = _text(key_bytes.strip()).lower()
        if key in entries and key in _ONCE:
            raise InvalidDisk(
                f"the descriptor says {key} twice (line {number}): programs differ in which one they take"
            )
        value = value.strip()
        entries[key] = value[1:-1] if len(value) >= 2 and value[:1] == value[-1:] == b'"' else value
    return entries, extents


def _extent_fault(line: bytes) -> str:
    if line.count(b'"') > 2:
        return f"the file name in {shown(line.strip())} has a quotation mark, at which QEMU ends the name"
    return shown(line.strip())


def _extent(match: re.Match[bytes], codec: str) -> Extent:
    access, size, kind_bytes, name, offset = match.groups()
    kind_text = kind_bytes.decode("ascii")
    if reason := _REFUSED_KINDS.get(kind_text.upper()):
        raise InvalidDisk(f"an extent is of kind {kind_text}, {reason}")
    line = shown(match[0].strip())
    try:
        kind = Kind(kind_text)
    except ValueError:
        raise InvalidDisk(f"an extent is of an unknown kind: {line}") from None
    if (name is None) != (kind is Kind.ZERO):
        raise InvalidDisk(f"an extent {'names no' if name is None else 'of zeros names a'} file: {line}")
    if kind is Kind.FLAT and offset is None:
        raise InvalidDisk(f"a FLAT extent does not say where in its file it starts: {line}")
    extent = Extent(
        access=Access(access.decode("ascii")),
        size_sectors=int(size),
        kind=kind,
        file_name=None if name is None else _file_name(name, codec),
        offset_sectors=int(offset or 0),
    )
    if not extent.size_sectors:
        raise InvalidDisk(f"an extent is empty: {line}")
    if extent.offset_sectors and not kind.is_flat:
        raise InvalidDisk(f"an extent starts inside its sparse file: {line}")
    if (extent.offset_sectors + extent.size_sectors) * SECTOR > MAX_CAPACITY_BYTES:
        raise InvalidDisk(f"an extent ends behind {MAX_CAPACITY_BYTES} bytes, the most a disk can have: {line}")
    return extent


def _check_extents(extents: tuple[Extent, ...]) -> None:
    if not extents:
        raise InvalidDisk("the descriptor names no extents")
    capacity = sum(extent.size_sectors for extent in extents) * SECTOR
    if capacity > MAX_CAPACITY_BYTES:
        raise InvalidDisk(f"the disk has {capacity} bytes, and at most {MAX_CAPACITY_BYTES} are possible")
    uses: dict[str, list[Extent]] = {}
    for extent in extents:
        if extent.file_name is not None:
            uses.setdefault(extent.file_name, []).append(extent)
    for name, sharing in uses.items():
        sharing.sort(key=lambda extent: extent.offset_sectors)
        for one, following in itertools.pairwise(sharing):
            if not (one.kind.is_flat and following.kind.is_flat):
                raise InvalidDisk(f"two extents name {shown(name)}, which only flat ones may")
            if one.offset_sectors + one.size_sectors > following.offset_sectors:
                raise InvalidDisk(f"two extents overlap in {shown(name)} at sector {following.offset_sectors}")


def codec_of(entries: Mapping[str, bytes]) -> str:
    """The codec for file names. An encoding that is not known is no fault as long as the names are ASCII."""
    declared = _text(entries.get("encoding", b"UTF-8"))
    return _ENCODINGS.get(declared.lower().replace("_", "-"), "ascii")


def _file_name(name: bytes, codec: str) -> str:
    try:
        decoded = name.decode(codec)
    except UnicodeDecodeError:
        raise InvalidDisk(f"{shown(name)} cannot be a file of a disk: it is not text in {codec}") from None
    check_file_name(decoded)
    return decoded


def _content_id(key: str, value: bytes) -> int:
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", value):
        raise InvalidDisk(f"the descriptor's {key} is not a number of up to 8 hexadecimal digits: {shown(value)}")
    return int(value, 16)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")
