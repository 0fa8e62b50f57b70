"""Files read and written at a server's /folder address."""

from contextlib import closing
from pathlib import Path

import pytest

from sidecar.errors import InvalidRequest
from sidecar.vsphere.folder import Folder
from sidecar.vsphere.known import KnownDatastore
from tests.vsphere.conftest import Site, end_sessions

NAMES = ["plain.txt", "with space.txt", "100%41.txt", "a#b?c.txt", "ünïcode.txt", "plus+and&.txt", "'quoted\".txt"]


@pytest.fixture
def folder(site: Site) -> Folder:
    connection = site.connection()
    return Folder(connection, KnownDatastore(site.address(connection, "one")))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_written_and_read(site: Site, folder: Folder, name: str) -> None:
    content = bytes(range(256)) * 1000
    (site.roots["one"] / "dir").mkdir()
    folder.write(f"dir/{name}", len(content), lambda: [content[:1000], content[1000:]])
    assert (site.roots["one"] / "dir" / name).read_bytes() == content
    assert folder.size(f"dir/{name}") == len(content)
    assert folder.read(f"dir/{name}", 1000, 300) == content[1000:1300]
    assert folder.read(f"dir/{name}", len(content) - 10, 300) == content[-10:]
    assert folder.read(f"dir/{name}", len(content), 300) == b""
    with closing(folder.open(f"dir/{name}", 5)) as download:
        assert download.read(10) == content[5:15]
        assert b"".join(iter(lambda: download.read(10_000), b"")) == content[15:]


def test_what_is_not_there_is_told_so_and_not_taken_for_a_server_that_is_away(folder: Folder) -> None:
    for call in (
        lambda: folder.read("none/x", 0, 10),
        lambda: folder.size("none/x"),
        lambda: folder.open("none/x", 0),
    ):
        with pytest.raises(FileNotFoundError):
            call()


def test_a_directory_is_no_file(site: Site, folder: Folder) -> None:
    (site.roots["one"] / "dir").mkdir()
    with pytest.raises(InvalidRequest):
        folder.read("dir", 0, 10)


def test_connections_are_used_again_whatever_was_left_unread(site: Site, folder: Folder) -> None:
    path: Path = site.roots["one"] / "large"
    path.write_bytes(bytes(1 << 20) + b"end")
    for _ in range(5):
        with closing(folder.open("large", 0)) as download:
            assert download.read(100) == bytes(100)
        assert folder.read("large", 1 << 20, 10) == b"end"


def test_an_upload_survives_the_end_of_the_session(site: Site, folder: Folder) -> None:
    folder.write("before", 3, lambda: [b"abc"])
    end_sessions(site)
    folder.write("after", 3, lambda: [b"def"])
    assert (site.roots["one"] / "after").read_bytes() == b"def"
