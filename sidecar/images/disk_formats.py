"""What people take for a VMDK, known by its first bytes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OtherFormat:
    """`what` it is, as after "this is"; an archive has to be unpacked, a disk to be converted."""

    what: str
    is_archive: bool = False


# Where it has which bytes.
_FORMATS = (
    (0, b"QFI\xfb", OtherFormat("a qcow2 disk")),
    (0, b"QED\0", OtherFormat("a QED disk")),
    (0, b"vhdxfile", OtherFormat("a VHDX disk")),
    (0, b"conectix", OtherFormat("a VHD disk")),
    (64, b"\x7f\x10\xda\xbe", OtherFormat("a VirtualBox disk (VDI)")),
    (257, b"ustar", OtherFormat("a tar archive (an OVA is one)", is_archive=True)),
    (0, b"PK\x03\x04", OtherFormat("a zip archive", is_archive=True)),
    (0, b"\x1f\x8b", OtherFormat("compressed with gzip", is_archive=True)),
    (0, b"\xfd7zXZ\0", OtherFormat("compressed with xz", is_archive=True)),
    (0, b"\x28\xb5\x2f\xfd", OtherFormat("compressed with zstd", is_archive=True)),
    (0, b"BZh", OtherFormat("compressed with bzip2", is_archive=True)),
)


def other_format(head: bytes) -> OtherFormat | None:
    """What a file is that begins so; None for a VMDK, and for what cannot be told, such as a raw disk.

    512 bytes are enough.
    """
    return next((found for offset, magic, found in _FORMATS if head.startswith(magic, offset)), None)
