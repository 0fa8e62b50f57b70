"""Disks that strangers send: what may become an image, what must not, and that renaming one keeps its data."""

import errno
import itertools
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.errors import InvalidDisk
from sidecar.images.vmdk import (
    MAX_DESCRIPTOR_BYTES,
    Disk,
    Kind,
    SparseHeader,
    check_disk,
    check_file_name,
    parse_descriptor,
    read_disk,
    renamed_files,
    require_standalone,
    rewrite_descriptor,
    rewrite_embedded,
)
from sidecar.images.vmdk_descriptor import without_deletable

SUBFORMATS = ("monolithicFlat", "monolithicSparse", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse", "streamOptimized")
CAPACITY = 4 * 2**30 + 5 * 2**20 + 512  # three extents of 2 GiB each, and the last one ends inside a grain
MIB = 2**20


class Files:
    """The reader over bytes in memory. `sizes` makes a file look larger than the bytes that it has."""

    def __init__(self, files: Mapping[str, bytes], sizes: Mapping[str, int] | None = None) -> None:
        self.files = dict(files)
        self.sizes = dict(sizes or {})
        self.bytes_read = 0

    def size(self, name: str) -> int:
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return self.sizes.get(name, len(self.files[name]))

    def read(self, name: str, offset: int, length: int) -> bytes:
        data = self.files[name][offset : offset + length]
        self.bytes_read += len(data)
        return data


class Directory:
    """The reader over a real directory. `cut` makes a file look as if it ended there; `hidden` are not there."""

    def __init__(self, path: Path, cut: Mapping[str, int] | None = None, hidden: tuple[str, ...] = ()) -> None:
        self.path = path
        self.cut = dict(cut or {})
        self.hidden = hidden

    def size(self, name: str) -> int:
        if name in self.hidden:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return self.cut.get(name, (self.path / name).stat().st_size)

    def read(self, name: str, offset: int, length: int) -> bytes:
        with (self.path / name).open("rb") as file:
            file.seek(offset)
            return file.read(max(0, min(length, self.size(name) - offset)))


def descriptor(
    *extents: str,
    create_type: str = "monolithicFlat",
    parent: str = "ffffffff",
    more: str = "",
    encoding: str = "UTF-8",
) -> bytes:
    lines = extents or ('RW 2048 FLAT "disk-flat.vmdk" 0',)
    text = (
        f'# Disk DescriptorFile\nversion=1\nencoding="{encoding}"\nCID=fffffffe\nparentCID={parent}\n'
        f'createType="{create_type}"\n{more}\n# Extent description\n' + "\n".join(lines) + "\n\n"
        '# The Disk Data Base\n#DDB\n\nddb.adapterType = "lsilogic"\nddb.virtualHWVersion = "8"\n'
    )
    return text.encode()


def sparse_file(
    *,
    capacity: int = 128 * 4,
    grain: int = 128,
    table_entries: int = 512,
    text: bytes | None = None,
    directory: tuple[int, ...] = (4,),
    table: tuple[int, ...] = (128,),
    **fields: int,
) -> bytes:
    """A sparse file as small as they come: header, descriptor, directory at 3, table at 4, a grain at 128."""
    values = {"version": 1, "flags": 1, "descriptor_offset": 1, "descriptor_size": 2, "directory_offset": 3}
    values |= {"redundant": 0, "overhead": 128, "compression": 0, "line_ends": int.from_bytes(b"\n \r\n")} | fields
    header = struct.pack(
        "<4sIIQQQQIQQQB4sH",
        b"KDMV",
        values["version"],
        values["flags"],
        capacity,
        grain,
        values["descriptor_offset"],
        values["descriptor_size"],
        table_entries,
        values["redundant"],
        values["directory_offset"],
        values["overhead"],
        0,
        values["line_ends"].to_bytes(4),
        values["compression"],
    )
    if text is None:
        text = descriptor(f'RW {capacity} SPARSE "disk.vmdk"', create_type="monolithicSparse")
    head = header.ljust(512, b"\0") + text.ljust(1024, b"\0")
    head += struct.pack(f"<{len(directory)}I", *directory).ljust(512, b"\0")
    head += struct.pack(f"<{len(table)}I", *table).ljust(2048, b"\0")
    return head.ljust(128 * 512, b"\0") + bytes(grain * 512)


def qemu_img(*arguments: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data at the start, across the border of two extents, and at the very end."""
    path = tmp_path_factory.mktemp("source") / "source.raw"
    noise = random.Random(7).randbytes(1_200_000)
    with path.open("wb") as file:
        file.truncate(CAPACITY)
        for offset in (0, 2 * 2**30 - 300_000, CAPACITY - len(noise)):
            file.seek(offset)
            file.write(noise)
    return path


@pytest.fixture(scope="module")
def disks(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def disk(subformat: str) -> Path:
        if subformat not in made:
            made[subformat] = tmp_path_factory.mktemp(subformat)
            name = made[subformat] / "my disk.vmdk"
            qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", source, name)
        return made[subformat]

    return disk


def rename(directory: Path, disk: Disk, new_id: str, target: Path) -> Path:
    """What a copy does with the names: the files under the new ones, and the descriptor rewritten."""
    renames = renamed_files(disk, new_id)
    for old, new in renames.items():
        if old != disk.name:
            os.link(directory / old, target / new)
    path = target / renames[disk.name]
    raw = Directory(directory).read(disk.name, disk.descriptor_offset, disk.descriptor_length)
    if disk.embedded:
        shutil.copy(directory / disk.name, path)
        with path.open("r+b") as file:
            file.seek(disk.descriptor_offset)
            file.write(rewrite_embedded(raw, path.name))
    else:
        path.write_bytes(rewrite_descriptor(raw, renames))
    return path


def with_footer(stream: bytes) -> bytes:
    """The stream as VMware writes it: the directory's place is in a footer, which ends the file."""
    offset = 56
    header = stream[:offset] + b"\xff" * 8 + stream[offset + 8 :]
    marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    return header.ljust(-(-len(header) // 512) * 512, b"\0") + marker + stream[:512] + bytes(512)


# What qemu-img writes


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_a_renamed_disk_has_the_same_data(
    subformat: str, source: Path, disks: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = disks(subformat)
    disk = check_disk("my disk.vmdk", Directory(directory))
    require_standalone(disk.descriptor)
    assert disk.capacity_bytes == CAPACITY
    assert len(disk.files) == (3 if subformat.startswith("two") else 1)
    assert set(disk.file_names) == {path.name for path in directory.iterdir()}

    path = rename(directory, disk, "photon-1.0", tmp_path)

    again = check_disk("photon-1.0.vmdk", Directory(tmp_path))
    assert set(again.file_names) == {path.name for path in tmp_path.iterdir()}
    assert all(name.startswith("photon-1.0") for name in (*again.file_names, *again.descriptor.file_names))
    if "Flat" not in subformat:  # qemu-img has no check for flat extents
        qemu_img("check", path)
    assert "identical" in qemu_img("compare", "-f", "vmdk", "-F", "raw", path, source)


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse"])
def test_a_missing_extent_is_found(subformat: str, disks: Callable[[str], Path]) -> None:
    directory = disks(subformat)
    for file in read_disk("my disk.vmdk", Directory(directory)).files:
        with pytest.raises(InvalidDisk, match=f"'{file.name}', which is not there"):
            check_disk("my disk.vmdk", Directory(directory, hidden=(file.name,)))


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_a_truncated_extent_is_found(subformat: str, disks: Callable[[str], Path]) -> None:
    directory = disks(subformat)
    for file in check_disk("my disk.vmdk", Directory(directory)).files:
        size = (directory / file.name).stat().st_size
        # QEMU pads the last grain of a stream to a whole grain of zeros, which nobody misses.
        end = size - 64 * 1024 if subformat == "streamOptimized" else size
        for length in (end - 512, end - 4096, size // 2, size // 10, 1536, 100, 0):
            with pytest.raises(InvalidDisk) as caught:
                check_disk("my disk.vmdk", Directory(directory, cut={file.name: length}))
            assert file.name in str(caught.value)


def test_a_stream_that_lost_its_end_is_found(source: Path, disks: Callable[[str], Path], tmp_path: Path) -> None:
    stream = with_footer((disks("streamOptimized") / "my disk.vmdk").read_bytes())
    path = tmp_path / "disk.vmdk"
    path.write_bytes(stream)
    assert "identical" in qemu_img("compare", "-f", "vmdk", "-F", "raw", path, source)
    disk = check_disk("disk.vmdk", Files({"disk.vmdk": stream}))
    assert disk.embedded
    for length in (len(stream) - 1, len(stream) - 512, len(stream) - 1536, len(stream) // 2, 1536, 513):
        with pytest.raises(InvalidDisk):
            check_disk("disk.vmdk", Files({"disk.vmdk": stream[:length]}))


def test_a_sparse_extent_of_another_size_is_found(disks: Callable[[str], Path], tmp_path: Path) -> None:
    for path in disks("twoGbMaxExtentSparse").iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / "my disk-s002.vmdk").unlink()
    os.link(tmp_path / "my disk-s003.vmdk", tmp_path / "my disk-s002.vmdk")
    with pytest.raises(InvalidDisk, match=r"s002.*expected 4194304"):
        check_disk("my disk.vmdk", Directory(tmp_path))


def test_one_extent_of_many_is_not_taken_for_the_disk(disks: Callable[[str], Path]) -> None:
    for subformat, name in (("twoGbMaxExtentSparse", "my disk-s001.vmdk"), ("monolithicFlat", "my disk-flat.vmdk")):
        with pytest.raises(InvalidDisk, match=r"without a descriptor|not a VMDK descriptor"):
            read_disk(name, Directory(disks(subformat)))


def test_a_blank_line_does_not_double_the_disk(tmp_path: Path) -> None:
    raw = descriptor().replace(b"# Extent description\n", b"\n")
    (tmp_path / "disk.vmdk").write_bytes(raw)
    (tmp_path / "disk-flat.vmdk").write_bytes(bytes(MIB))
    assert "virtual size: 1 MiB" not in qemu_img("info", tmp_path / "disk.vmdk")
    with pytest.raises(InvalidDisk, match="blank line"):
        check_disk("disk.vmdk", Directory(tmp_path))


# Names


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/shadow", "../../x", "sub/disk-flat.vmdk", "..", ".", ".hidden", "C:\\disk.vmdk", "..\\x", "a\tb", ""),
        *("nbd://localhost:10809", "vsan://5d3c-52f2/x.vmdk", "x|2f|2e|2e", "é" * 128, "x" * 256),
        *("image_timestamp.txt", "image_timestamp.txt.renamed", "image_tombstone.txt", "unused_image_marker.txt"),
        *("Image_Timestamp.TXT", "disk.ec_lock", "disk.ecv", "disk.manifest", "disk.MANIFEST"),
    ],
)
def test_an_extent_cannot_name_a_file_that_is_not_the_disks(name: str) -> None:
    with pytest.raises(InvalidDisk) as caught:
        parse_descriptor(descriptor(f'RW 2048 FLAT "{name}" 0'))
    assert "control character" in str(caught.value) or repr(name)[:200] in str(caught.value)
    with pytest.raises(InvalidDisk):
        check_file_name(name)


def test_a_quotation_mark_cannot_hide_which_file_is_meant() -> None:
    with pytest.raises(InvalidDisk, match="quotation mark"):
        parse_descriptor(descriptor('RW 2048 FLAT "my "disk-flat.vmdk" 0'))
    with pytest.raises(InvalidDisk, match="quotation mark"):
        rewrite_descriptor(descriptor(), {"disk-flat.vmdk": 'a"b.vmdk'})


def test_a_name_that_is_not_text_is_refused() -> None:
    for encoding in ("UTF-8", "no-such-encoding", "UTF-16", "\\x00"):
        with pytest.raises(InvalidDisk, match="not text"):
            parse_descriptor(descriptor(encoding=encoding).replace(b"disk-flat", b"d\xff-flat"))
    assert parse_descriptor(descriptor(encoding="no-such-encoding")).file_names == ("disk-flat.vmdk",)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("UTF-8", "Das ist ein Test's Gerät (1) 磁盘 12:30-flat.vmdk"),
        ("windows-1252", "Gerät-flat.vmdk"),
        ("Shift_JIS", "表ディスク-flat.vmdk"),
        ("GBK", "磁盘 1-flat.vmdk"),
    ],
)
def test_every_byte_but_the_names_stays(encoding: str, name: str) -> None:
    codec = {"windows-1252": "cp1252", "Shift_JIS": "cp932"}.get(encoding, encoding)
    extents = (f'RW 10 FLAT "{name}" 0', "RW 5 ZERO", f'RDONLY 10  FLAT\t"{name}" 10 ', 'NOACCESS 7 VMFS "b.vmdk"')
    text = descriptor(*extents, create_type="custom", encoding=encoding, more='ddb.comment="@ disk-flat.vmdk"').decode()
    raw = text.replace("\n", "\r\n").encode(codec).replace(b"@", b"\xe4\xff") + bytes(100)
    parsed = parse_descriptor(raw)
    assert parsed.file_names == (name, "b.vmdk")
    assert parsed.capacity_bytes == 32 * 512
    assert parsed.adapter_type == "lsilogic"
    assert rewrite_descriptor(raw, {}) == raw
    rewritten = rewrite_descriptor(raw, {name: "new-flat.vmdk"})
    assert rewritten == raw.replace(name.encode(codec), b"new-flat.vmdk")
    assert rewrite_descriptor(rewritten, {"new-flat.vmdk": name}) == raw


def test_a_new_name_that_the_encoding_lacks_is_refused() -> None:
    with pytest.raises(InvalidDisk, match="encoding"):
        rewrite_descriptor(descriptor(encoding="windows-1252"), {"disk-flat.vmdk": "磁盘.vmdk"})


def test_renaming_cannot_make_two_extents_one_file() -> None:
    with pytest.raises(InvalidDisk, match="overlap"):
        rewrite_descriptor(descriptor('RW 9 FLAT "a" 0', 'RW 9 FLAT "b" 0'), {"a": "b"})


def described(name: str, *extents: str, create_type: str = "custom") -> Disk:
    return read_disk(name, Files({name: descriptor(*extents, create_type=create_type)}))


@pytest.mark.parametrize(
    ("extents", "as_esx_makes_them"),
    [
        (['RW 8 VMFS "old-flat.vmdk"'], True),
        (['RW 8 FLAT "old-flat.vmdk" 0'], True),
        (['RW 8 FLAT "old-flat.vmdk" 8'], False),
        (['RW 8 FLAT "old-flat.vmdk" 0', 'RW 8 FLAT "old-flat.vmdk" 8'], False),
        (['RW 8 FLAT "old-flat.vmdk" 0', "RW 8 ZERO"], False),
        (['RW 8 FLAT "other-flat.vmdk" 0'], False),
        (['RW 8 SPARSE "old-flat.vmdk"'], False),
    ],
)
def test_what_esx_makes_is_one_extent_that_is_all_of_its_file(extents: list[str], as_esx_makes_them: bool) -> None:
    assert described("old.vmdk", *extents).is_as_esx_makes_them is as_esx_makes_them


def test_renamed_files_are_named_as_vmware_names_them() -> None:
    flat = described("old.vmdk", 'RW 8 VMFS "data"', create_type="vmfs")
    assert renamed_files(flat, "new") == {"old.vmdk": "new.vmdk", "data": "new-flat.vmdk"}
    split = [f'RW 8 FLAT "part{number}" 0' for number in (1, 2)]
    two = described("old.vmdk", *split, create_type="twoGbMaxExtentFlat")
    assert list(renamed_files(two, "new").values()) == ["new.vmdk", "new-f001.vmdk", "new-f002.vmdk"]
    only = described("old.vmdk", split[0], create_type="twoGbMaxExtentFlat")
    assert list(renamed_files(only, "new").values()) == ["new.vmdk", "new-f001.vmdk"]
    sparse = described("old", 'RW 8 SPARSE "x"', 'RW 8 SPARSE "old-s002.vmdk"', 'RW 8 SPARSE "new-s001.vmdk"')
    assert list(renamed_files(sparse, "new").values()) == [
        "new.vmdk",
        "new-s002.vmdk",
        "new-s001.vmdk",
        "new-s003.vmdk",
    ]


def test_a_renamed_file_does_not_become_bookkeeping_or_too_long() -> None:
    disk = described("a.vmdk", 'RW 8 FLAT "a.txt" 0', f'RW 8 FLAT "a{"x" * 250}" 0', 'RW 8 FLAT "a.VMDK" 0')
    names = renamed_files(disk, "image_timestamp")
    assert names["a.txt"] == "image_timestamp-f001.vmdk"
    assert max(map(len, names.values())) <= 255
    for bad in ("../x", ".x", "a/b", "x" * 251):
        with pytest.raises(InvalidDisk):
            renamed_files(disk, bad)


def test_thousands_of_extents_are_renamed_in_one_pass() -> None:
    lines = [f'RW 8 FLAT "{stem}-f{number:03d}.vmdk" 0' for stem in ("x", "a") for number in range(1, 10_000)]
    names = renamed_files(described("a.vmdk", *lines), "n")
    assert len(set(names.values())) == len(names) == 19_999


# Parents


@pytest.mark.parametrize(
    "raw",
    [
        descriptor(parent="12345678"),
        descriptor(more='parentFileNameHint="../image/image.vmdk"'),
        descriptor(more='PARENTFILENAMEHINT = "x"'),
        descriptor(more='# parentFileNameHint="/etc/passwd"'),
        descriptor(more='ddb.comment = "parentFileNameHint=x"'),
    ],
)
def test_a_delta_cannot_become_an_image_without_its_parent(raw: bytes) -> None:
    with pytest.raises(InvalidDisk, match="qemu-img convert"):
        require_standalone(parse_descriptor(raw))


def test_a_disk_without_parent_is_standalone() -> None:
    require_standalone(parse_descriptor(descriptor()))
    assert parse_descriptor(descriptor()).parent_file_name_hint is None


# Descriptors


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (descriptor('RW 8 VMFSRDM "disk-rdm.vmdk"', create_type="custom"), "raw device mapping"),
        (descriptor('RW 8 VMFSSPARSE "disk-delta.vmdk"', create_type="custom"), "snapshot"),
        (descriptor('RW 8 FLOPPY "a"'), "unknown kind"),
        (descriptor(create_type="vmfsRawDeviceMap"), "cannot be an image"),
        (descriptor(create_type="fullDevice"), "cannot be an image"),
        (descriptor('RW 8 FLAT "a"'), "where in its file"),
        (descriptor('RW 8 FLAT "a" 0', 'RW 8 FLAT "a" 7'), "overlap"),
        (descriptor('RW 8 FLAT "a" 0', 'RW 8 SPARSE "a"'), "only flat"),
        (descriptor('RW 8 SPARSE "a" 5'), "inside its sparse file"),
        (descriptor('RW 0 FLAT "a" 0'), "empty"),
        (descriptor('RW 8 ZERO "a"'), "zeros names a file"),
        (descriptor("RW 8 SPARSE"), "names no file"),
        (descriptor('RW 9999999999999999999 FLAT "a" 0'), "at most|most a disk"),
        (descriptor('RW 8 FLAT "a" 9999999999999999999'), "most a disk"),
        (descriptor(*["RW 100000000000 ZERO"] * 3), "at most"),
        (descriptor("RW"), "not an extent"),
        (descriptor("RW 8", 'FLAT "a" 0'), "not an extent"),
        (descriptor("RW 8 FLAT", '"a" 0'), "line 10"),
        (descriptor('rw 8 FLAT "a" 0'), "not an extent"),
        (descriptor("# none"), "no extents"),
        (descriptor(more="CID=1"), "cid twice"),
        (descriptor(more='createType="vmfs"'), "createtype twice"),
        (descriptor(more="stray words"), "stray words"),
        (descriptor(more='# x\rRW 8 FLAT "/etc/shadow" 0'), "control character"),
        (descriptor(more="# x\0"), "control character"),
        (descriptor(parent="none"), "hexadecimal"),
        (descriptor().replace(b"version=1", b"version=9"), "version"),
        (b"", "no version"),
        (bytes(512), "no version"),
    ],
)
def test_a_descriptor_that_cannot_be_meant_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(InvalidDisk, match=reason):
        parse_descriptor(raw)


def test_a_descriptor_cannot_name_itself() -> None:
    with pytest.raises(InvalidDisk, match="itself"):
        described("disk-flat.vmdk")


def test_a_descriptor_of_a_gigabyte_is_not_read() -> None:
    files = Files({"disk.vmdk": descriptor() + b"#" * MAX_DESCRIPTOR_BYTES}, {"disk.vmdk": 2**30})
    with pytest.raises(InvalidDisk, match="1073741824 bytes"):
        read_disk("disk.vmdk", files)
    assert files.bytes_read <= 512
    with pytest.raises(InvalidDisk, match="at most"):
        parse_descriptor(bytes(MAX_DESCRIPTOR_BYTES + 1))


def test_a_flat_extent_of_the_wrong_size_is_found() -> None:
    files = {"disk.vmdk": descriptor(), "disk-flat.vmdk": bytes(2048 * 512)}
    assert check_disk("disk.vmdk", Files(files)).files[0].kind is Kind.FLAT
    for size in (0, 2048 * 512 - 1, 2048 * 512 + 1):
        with pytest.raises(InvalidDisk, match=f"disk-flat.*expected exactly 1048576 bytes, found {size}"):
            check_disk("disk.vmdk", Files(files, {"disk-flat.vmdk": size}))
    shared = descriptor('RW 8 FLAT "a" 100', 'RW 8 FLAT "a" 0', create_type="custom")
    (file,) = check_disk("disk.vmdk", Files({"disk.vmdk": shared, "a": b""}, {"a": 108 * 512})).files
    assert (file.minimum_size_bytes, file.exact) == (108 * 512, False)
    assert file.fits(108 * 512 + 1)
    assert not file.fits(108 * 512 - 1)


@pytest.mark.parametrize("failing", ["disk.vmdk", "disk-flat.vmdk"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_storage_outage_is_not_a_fault_of_the_disk(failing: str, number: int) -> None:
    class Failing(Files):
        def size(self, name: str) -> int:
            if name == failing:
                raise OSError(number, "storage")
            return super().size(name)

    with pytest.raises(OSError, match="storage") as caught:
        check_disk("disk.vmdk", Failing({"disk.vmdk": descriptor()}))
    assert caught.value.errno == number


def test_a_disk_that_is_not_there_is_not_an_invalid_one() -> None:
    with pytest.raises(FileNotFoundError):
        check_disk("disk.vmdk", Files({}))


# Sparse files


def test_the_smallest_sparse_disk_is_whole() -> None:
    disk = check_disk("disk.vmdk", Files({"disk.vmdk": sparse_file()}))
    assert (disk.embedded, disk.descriptor_offset, disk.descriptor_length) == (True, 512, 1024)
    rounded = descriptor('RW 500 SPARSE "a"', create_type="streamOptimized")
    assert check_disk("disk.vmdk", Files({"disk.vmdk": sparse_file(text=rounded)})).capacity_bytes == 500 * 512


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (sparse_file(version=4), "version 4"),
        (sparse_file(capacity=0, text=descriptor()), "capacity"),
        (sparse_file(capacity=2**63, text=descriptor()), "capacity"),
        (sparse_file(grain=4), "grain"),
        (sparse_file(grain=129), "grain"),
        (sparse_file(table_entries=0), "grain table"),
        (sparse_file(table_entries=2**31), "grain table"),
        (sparse_file(capacity=2**37, grain=8, table_entries=1), "grain directory of"),
        (sparse_file(compression=9), "compression"),
        (sparse_file(line_ends=int.from_bytes(b"\n \n\n")), "as text"),
        (sparse_file(descriptor_size=2**62), "for the descriptor"),
        (sparse_file(descriptor_offset=2), "expected 1"),
        (sparse_file(descriptor_offset=0), "without a descriptor"),
        (sparse_file(text=b""), "without a descriptor"),
        (sparse_file(text=descriptor().ljust(1024, b"#")), "NUL"),
        (sparse_file(text=descriptor(create_type="streamOptimized")), "other extents"),
        (sparse_file(text=descriptor(create_type="vmfs")), "single file"),
        (sparse_file(text=descriptor('RW 8 SPARSE "a"', create_type="streamOptimized")), "512 sectors"),
        (sparse_file(directory_offset=0), "no grain directory"),
        (sparse_file(directory_offset=2**40), "grain directory"),
        (sparse_file(directory_offset=2**64 - 1), "footer"),
        (sparse_file(overhead=2**60), "overhead"),
        (sparse_file(flags=3, redundant=2**50), "redundant"),
        (sparse_file(directory=(2**31,)), "grain table"),
        (sparse_file(directory=(4, 4), capacity=128 * 1024), "twice"),
        (sparse_file(table=(129,)), "a grain reaches"),
        (sparse_file(table=(2**32 - 1,)), "a grain reaches"),
        (b"COWD" + bytes(2048), "COWD"),
        (b"\xbe\xba\xfe\xca" + bytes(2048), "SESparse"),
        (b"KDMV", "sparse header"),
    ],
)
def test_a_sparse_file_that_leads_astray_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidDisk, match=reason) as caught:
        check_disk("disk.vmdk", Files({"disk.vmdk": data}))
    assert str(caught.value).startswith("'disk.vmdk'")


def test_a_compressed_grain_that_lost_its_end_is_found() -> None:
    grain = sparse_file(compression=1, flags=0x30001)[: 128 * 512] + struct.pack("<QI", 0, 1000)
    check_disk("disk.vmdk", Files({"disk.vmdk": grain + bytes(1000)}))
    with pytest.raises(InvalidDisk, match="a grain reaches"):
        check_disk("disk.vmdk", Files({"disk.vmdk": grain + bytes(999)}))


def test_an_extent_with_a_descriptor_of_its_own_is_refused() -> None:
    top = descriptor('RW 512 SPARSE "a"', create_type="twoGbMaxExtentSparse")
    check_disk("disk.vmdk", Files({"disk.vmdk": top, "a": sparse_file(text=b"")}))
    check_disk("disk.vmdk", Files({"disk.vmdk": top, "a": sparse_file(text=b"", descriptor_offset=0)}))
    with pytest.raises(InvalidDisk, match="of its own"):
        check_disk("disk.vmdk", Files({"disk.vmdk": top, "a": sparse_file()}))


def test_an_embedded_descriptor_keeps_its_room() -> None:
    text = descriptor('RW 512 SPARSE "generated-stream.vmdk"', create_type="streamOptimized")
    area = text + bytes(600 - len(text))
    rewritten = rewrite_embedded(area, "new.vmdk")
    assert len(rewritten) == len(area)
    assert rewritten.rstrip(b"\0") == text.replace(b"generated-stream", b"new")
    with pytest.raises(InvalidDisk, match="shorter image id"):
        rewrite_embedded(text + b"\0", "a-name-that-is-longer.vmdk")
    assert rewrite_embedded(text + b"\0", "generated-stream.vmdk") == text + b"\0"


# Whatever bytes come

EXTENT_NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


def value_or_invalid(function: Callable[[], object]) -> None:
    try:
        function()
    except InvalidDisk as fault:
        fault.message.encode()


def mutated(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    result = bytearray(data)
    for position, inserted in changes:
        result[position % len(result) : position % len(result) + len(inserted)] = inserted
    return bytes(result)


CHANGES = st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)


@given(st.binary(max_size=2000))
@settings(deadline=None)
def test_any_bytes_are_a_descriptor_or_an_invalid_disk(data: bytes) -> None:
    value_or_invalid(lambda: parse_descriptor(data))
    value_or_invalid(lambda: rewrite_embedded(data, "new.vmdk"))
    value_or_invalid(lambda: SparseHeader.parse(b"KDMV" + data))
    value_or_invalid(lambda: check_disk("disk.vmdk", Files({"disk.vmdk": data})))


@given(CHANGES)
@settings(max_examples=300, deadline=None)
def test_any_damage_to_a_descriptor_is_survived(changes: list[tuple[int, bytes]]) -> None:
    raw = mutated(descriptor('RW 8 FLAT "a" 0', "RW 5 ZERO", 'RW 8 VMFS "b"', create_type="custom"), changes)
    value_or_invalid(lambda: parse_descriptor(raw))
    value_or_invalid(lambda: rewrite_descriptor(raw, {"a": "c"}))
    value_or_invalid(lambda: renamed_files(read_disk("d.vmdk", Files({"d.vmdk": raw})), "new"))


@given(st.booleans(), CHANGES, st.integers(0, 3000))
@settings(max_examples=300, deadline=None)
def test_any_damage_to_a_sparse_file_is_survived(stream: bool, changes: list[tuple[int, bytes]], cut: int) -> None:
    data = sparse_file(grain=8, table=tuple(range(128, 168, 8)), compression=int(stream), flags=0x30001)
    data = mutated(with_footer(data) if stream else data, changes)
    data = data[: len(data) - cut] if cut % 3 == 0 else data
    value_or_invalid(lambda: check_disk("disk.vmdk", Files({"disk.vmdk": data})))
    top = descriptor('RW 512 SPARSE "disk.vmdk"', create_type="twoGbMaxExtentSparse")
    value_or_invalid(lambda: check_disk("top.vmdk", Files({"top.vmdk": top, "disk.vmdk": data})))


@given(st.lists(EXTENT_NAMES, min_size=1, max_size=5, unique=True), st.text("abz019._-", min_size=1, max_size=128))
@settings(max_examples=200, deadline=None)
def test_no_name_leads_out_of_the_directory(names: list[str], new_id: str) -> None:
    raw = descriptor(*(f'RW 8 FLAT "{name}" 0' for name in names), create_type="custom")
    try:
        disk = read_disk("d.vmdk", Files({"d.vmdk": raw}))
        renames = renamed_files(disk, new_id)
    except InvalidDisk:
        return
    for name in itertools.chain(disk.file_names, renames.values()):
        assert "/" not in name
        assert name not in ("", ".", "..")
        assert len(name.encode()) <= 255
    assert len(set(renames.values())) == len(renames) == len(disk.file_names)
    parsed = parse_descriptor(rewrite_descriptor(raw, renames))
    assert parsed == replace(
        disk.descriptor,
        extents=tuple(replace(extent, file_name=renames[extent.file_name or ""]) for extent in disk.descriptor.extents),
    )


def test_the_mark_that_keeps_a_server_from_deleting_goes_and_nothing_else() -> None:
    text = b'# Disk DescriptorFile\nCID=1\nddb.adapterType = "lsilogic"\nddb.deletable = "false"\nddb.uuid = "1"\n'
    assert without_deletable(text) == text.replace(b'ddb.deletable = "false"\n', b"")
    assert without_deletable(text.removesuffix(b'ddb.uuid = "1"\n')[:-1]).endswith(b'"lsilogic"\n')
    for other in (b"", b'# ddb.deletable = "false"\n', b'KDMV\0\nddb.deletable = "false"\n', b"CID=1\n"):
        assert without_deletable(other) == other
