"""Whatever bytes come: a parser gives a value that holds what it promises, or an error of ours, and nothing else.

Those of disks are in tests/images/test_vmdk.py, the one of lock holders is in tests/locks/test_file_locks.py.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.client_staging import parse_ref
from sidecar.config import CONFIG, DATASTORES, LISTEN, ConfigError, Flags, SidecarConfig, load_config
from sidecar.ctl.disk_source import open_disk
from sidecar.datastores.posix import PosixDatastore
from sidecar.errors import ImagesError, InvalidImageId, InvalidMetadata, InvalidRequest
from sidecar.images.catalog import Catalog
from sidecar.images.image import Image, ImageKey, ImageState
from sidecar.images.layouts import LAYOUTS
from sidecar.images.metadata import parse_metadata
from sidecar.images.names import check_file_name, check_image_id, is_bookkeeping
from sidecar.images.store import ImageStore
from sidecar.images.watching import Watches
from sidecar.locks.interface import LockHolder
from sidecar.strict_json import parse_json
from tests.crash.support import write_image

ANY_TEXT = st.text(st.characters())  # lone surrogates too: names that are not UTF-8
SEPARATORS = st.lists(
    st.one_of(
        st.sampled_from(list("/=,;.:%|\"'[]{}\\\n\r\t\0 -_")), st.sampled_from(["..", "layout", "path"]), ANY_TEXT
    )
).map("".join)
DIGITS = st.one_of(
    st.integers().map(str),
    st.sampled_from(
        ["1" * 5000, "9" * 400 + ".5", "1e999", "nan", "inf", "-0", "0x10", "1_0", "\u0661", "\u00b2", "1."]
    ),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def mutations(*samples: bytes) -> st.SearchStrategy[bytes]:
    """Samples with some bytes replaced, taken out, or said again."""

    def change(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
        for start, length, new in changes:
            at = start % (len(data) + 1)
            data = data[:at] + new + data[at + length :]
        return data

    pieces = st.binary(max_size=6) | st.sampled_from([b"\xff", b"\0", b"\n", b"[" * 2000, b"9" * 5000, b"\xef\xbb\xbf"])
    changes = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 20), pieces), max_size=4)
    return st.builds(change, st.sampled_from(samples), changes)


def told(work: Callable[[], object], *kinds: type[ImagesError]) -> object:
    """Its value, or None for one of these errors, whose message can be told."""
    try:
        return work()
    except kinds as error:
        assert error.message.strip()
        return None


def passes(check: Callable[[], None], kind: type[ImagesError]) -> bool:
    def work() -> bool:
        check()
        return True

    return told(work, kind) is True


# What lies in an image's directory

METADATA = (
    b'{"a": [1, 2.5, null, true], "b": {"c": "\\u00e4"}}',
    b'{"imageType": "CLOUD", "imageReplication": "EAGER"}',
)


@given(st.one_of(st.binary(), mutations(*METADATA), JSON.map(lambda value: json.dumps(value).encode())))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"a": ' + b"9" * 5000 + b"}")
@example(b'{"a": 1e999}')
@example(b'{"imageType": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(b'{"imageType": "' + b"x" * 500_000 + b'"}')
@example(b'{"imageType": "\\ud800"}')
@example(b"\xef\xbb\xbf{}")
def test_any_metadata_is_an_object_or_invalid(content: bytes) -> None:
    for name in ("a.ecv", "a.manifest"):
        value = told(lambda name=name: parse_metadata(name, content), InvalidMetadata)  # type: ignore[misc]
        assert value is None or isinstance(value, dict)
    try:
        value = parse_json(content)
    except ValueError:
        return
    json.dumps(value, allow_nan=False)  # every program reads it


@pytest.mark.parametrize("depth", range(1, sys.getrecursionlimit() + 50, 37))
def test_metadata_of_any_depth_is_an_object_or_invalid(depth: int) -> None:
    for before, after in ((b"[", b"]"), (b'{"a":', b"}")):
        for start in (b'{"a": ', b'{"imageType": '):
            content = start + before * depth + b"1" + after * depth + b"}"
            told(lambda content=content: parse_metadata("a.manifest", content), InvalidMetadata)  # type: ignore[misc]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    root = tmp_path_factory.mktemp("datastore")
    write_image(root, "compound", "a")
    return ImageStore(PosixDatastore("one", str(root)), LAYOUTS["compound"])


def put(store: ImageStore, name: str, content: bytes) -> None:
    (Path(store.datastore.root_path) / "image_a" / name).write_bytes(content)


@given(st.one_of(st.binary(max_size=80), mutations(b"1448496000", b"1448496000\n"), DIGITS.map(str.encode)))
@example(b"1" * 64)
@example(b"253402300800")
@example(b"\xd9\xa1")
def test_any_marker_is_a_time_or_a_problem(store: ImageStore, content: bytes) -> None:
    put(store, "unused_image_marker.txt", content)
    image = store.read("a")
    assert image.state is ImageState.VALID
    if image.marked_unused_s is None:
        assert any("does not hold a time" in problem for problem in image.problems)
    else:
        assert 0 <= image.marked_unused_s < 253_402_300_800
        assert not image.problems


@given(st.one_of(st.binary(), mutations(b'RW 2048 FLAT "a-flat.vmdk" 0\nCID=1\nversion=1\ncreateType="vmfs"\n')))
def test_any_descriptor_of_an_image_is_read_or_a_problem(content: bytes) -> None:
    # Not by the fixture: what one example leaves there is the next one's.
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "image_a").mkdir()
        (Path(directory) / "image_a" / "a.vmdk").write_bytes(content)
        datastore = PosixDatastore("one", directory)
        image = ImageStore(datastore, LAYOUTS["compound"]).read("a")
        assert image.problems
        for problem in image.problems:
            assert problem.isprintable()
        told(lambda: open_disk(f"{directory}/image_a/a.vmdk"), ImagesError)
        datastore.close()


HOLDER = b'{"host": "h", "pid": 7, "process": "p", "operation": "o", "since": "2026-01-01T00:00:00+00:00"}\n'


@given(mutations(HOLDER))
@example(HOLDER.replace(b"7", b"9" * 4000))
@example(HOLDER.replace(b"2026", b"0001").replace(b"+00:00", b"+14:00"))
@example(HOLDER.replace(b'"h"', b"[" * 1500 + b"]" * 1500))
def test_any_lock_holder_is_one_that_can_be_told_or_none(content: bytes) -> None:
    holder = LockHolder.from_bytes(content)
    if holder is not None:
        assert str(holder).isprintable()
        assert len(str(holder)) < 2000


# What clients send


@given(st.one_of(ANY_TEXT, SEPARATORS, st.text("aA0._-", max_size=140)))
@example("a" * 128)
@example("a" * 129)
@example("a\n")
@example("a.ec_lock")
@example("..")
def test_any_image_id_stays_where_its_image_is(text: str) -> None:
    if not passes(lambda: check_image_id(text), InvalidImageId):
        return
    assert text.isascii()
    for layout in LAYOUTS.values():
        for path in (layout.image_directory(text), layout.image_lock(text), layout.staging_place(text, "t").directory):
            parts = path.split("/")
            assert not {"", ".", ".."} & set(parts)
            assert all(len(part) < 256 for part in parts)
        collection, _, name = layout.image_directory(text).rpartition("/")
        assert layout.image_id(collection, name) == text
        lock = layout.image_lock(text)
        assert layout.image_id(*lock.rpartition("/")[::2]) is None, "no image is where a lock has to be"


@given(st.one_of(ANY_TEXT, SEPARATORS))
def test_any_name_of_a_file_is_one_component(text: str) -> None:
    if passes(lambda: check_file_name(text), InvalidRequest):
        assert "/" not in text
        assert text not in ("", ".", "..")
        assert 0 < len(text.encode()) < 256
        is_bookkeeping(text)


@given(st.one_of(ANY_TEXT, SEPARATORS, st.text("a/.", max_size=6)))
def test_any_name_of_an_image_at_the_shell_has_two_parts(text: str) -> None:
    ref = told(lambda: parse_ref(text), ImagesError)
    if ref is not None:
        assert text in (f"{ref.datastore}/{ref.image_id}", text)  # type: ignore[attr-defined]
        assert "/" not in ref.image_id  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    catalog = Catalog()
    for number in range(7):
        key = ImageKey("one" if number % 2 else "two", f"i{number}")
        catalog.put(Image(key, "", ImageState.VALID))
        if number == 3:
            catalog.remove(key)
    return catalog


@given(st.one_of(ANY_TEXT, SEPARATORS, DIGITS, st.builds("{}/{}".format, st.sampled_from(["one", "two"]), ANY_TEXT)))
def test_any_page_token_goes_on_somewhere_and_comes_to_an_end(catalog: Catalog, token: str) -> None:
    after: str | None = token
    seen: list[str] = []
    for _ in range(10):
        page = catalog.page(["two", "one"], {ImageState.VALID}, "", after or "", 2)
        seen += [str(image.key) for image in page.images]
        if (after := page.after) is None:
            assert seen == sorted(set(seen))
            return
    raise AssertionError("pages without an end")


@given(st.one_of(ANY_TEXT, DIGITS, SEPARATORS), st.booleans())
def test_any_resume_token_is_a_revision_that_was_or_everything(catalog: Catalog, text: str, own: bool) -> None:
    watches = Watches(catalog, [])
    token = f"{watches._life}:{text}" if own else text
    event = next(watches.follow("", token, lambda: True))
    revision = int(event.resume_token.partition(":")[2])
    assert revision == 8
    assert event.everything == (not own or text not in [str(number) for number in range(1, 9)]) or text[:1] == "0"


# What the operator writes

TOML = b"""listen = "unix:/run/x.sock"
log_level = "info"
[datastore.one]
path = "/srv/images"
layout = "compound"
type = "nfs"
reserve = "64MiB"
rescan_seconds = 10
[limits]
max_copies = 16
shutdown_seconds = 0.5
lock_timeout_seconds = 30
"""
VALUES = st.one_of(
    DIGITS,
    JSON.map(json.dumps),
    st.sampled_from(
        ["1979-05-27", "07:32:00", "[1, 2]", "{a = 1}", "true", '"unix:"', '"64MiB"', '"1.5.5G"', "[[[[]]]]"]
    ),
)


def configured(config: object) -> None:
    if config is None:
        return
    assert isinstance(config, SidecarConfig)
    for datastore in config.datastores:
        assert datastore.path is not None or datastore.type == "vsphere"
        assert datastore.path is None or (datastore.path.startswith("/") and "\0" not in datastore.path)
        assert datastore.reserve >= 0


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "sidecar.toml"


@given(st.one_of(st.binary(), mutations(TOML)))
@example(b"a = " + b"[" * 20_000)
@example(b"a = " + b"{a=" * 20_000)
@example(b"a" + b".a" * 500 + b" = 1")
@example(b"listen = " + b"9" * 5000)
@example(TOML.replace(b'"64MiB"', b'"' + b"9" * 400 + b'.5"'))
@example(TOML.replace(b'"64MiB"', b'"' + b"9" * 5000 + b'"'))
@example(TOML.replace(b"rescan_seconds = 10", b"rescan_seconds = " + b"9" * 4000))
def test_any_file_is_a_configuration_or_an_error_with_its_name(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    configured(told(lambda: load_config(file, {}, Flags()), ConfigError))


KEYS = ("listen", "log_level", "datastore", "datastores", "limits", "datastore.one", "datastore.one.path",
        "datastore.one.reserve", "datastore.one.layout", "datastore.one.name", "datastore.one.rescan_seconds",
        "limits.max_copies", "limits.shutdown_seconds", "limits.staging_lease_seconds", "x")  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4))
@settings(max_examples=200)
def test_any_value_of_any_key_is_taken_or_an_error_that_names_the_file(
    file: Path, entries: list[tuple[str, str]]
) -> None:
    text = "".join(f"{key} = {value}\n" for key, value in dict(entries).items())
    file.write_bytes(text.encode("utf-8", "replace"))
    try:
        configured(load_config(file, {}, Flags(datastores=["one=/srv/a"])))
    except ConfigError as error:
        assert str(file) in error.message


SPECS = st.one_of(
    ANY_TEXT,
    SEPARATORS,
    mutations(b"one=/srv/a,layout=sharded,type=nfs,reserve=1GiB,rescan_seconds=5").map(
        lambda data: data.decode("utf-8", "surrogateescape")
    ),
    st.builds("one=/srv/a,{}={}".format, st.sampled_from(["reserve", "rescan_seconds", "layout"]), DIGITS | ANY_TEXT),
    st.builds("{}={}".format, ANY_TEXT, ANY_TEXT),
)


@given(SPECS)
@example("one=/srv/a,reserve=" + "9" * 400 + ".5")
@example("one=/srv/a,reserve=" + "9" * 5000)
@example("one=/srv/a,rescan_seconds=" + "9" * 5000)
@example("one=/srv/a\0")
@example("one=/srv/\udcff")
@example("one=/srv/a,reserve=1K{value}")
def test_any_datastore_flag_or_variable_is_taken_or_an_error(spec: str) -> None:
    configured(told(lambda: load_config(None, {}, Flags(datastores=[spec])), ConfigError))
    configured(told(lambda: load_config(None, {DATASTORES: spec}, Flags()), ConfigError))


@given(
    st.one_of(ANY_TEXT, SEPARATORS, DIGITS, st.builds("{}:{}".format, SEPARATORS, DIGITS), DIGITS.map("[::1]:".__add__))
)
@example("unix:" + "x" * 5000)
@example("unix:\udcff\0")
@example("[::1%\0]:7")
@example("127.0.0.1:\u0661")
def test_any_address_is_one_of_this_host_or_an_error(text: str) -> None:
    one = ("one=/srv/a",)
    for environ, flags in (({LISTEN: text}, Flags(datastores=one)), ({}, Flags(listen=text, datastores=one))):
        config = told(lambda environ=environ, flags=flags: load_config(None, environ, flags), ConfigError)  # type: ignore[misc]
        if config is not None:
            assert isinstance(config, SidecarConfig)
            assert config.listen.startswith(("unix:/", "127.", "[::1]:"))


@given(st.one_of(ANY_TEXT.filter(bool), SEPARATORS.filter(bool)))
@example("\0")
@example("x" * 5000)
def test_any_name_of_a_configuration_file_is_read_or_an_error(name: str) -> None:
    told(lambda: load_config(None, {CONFIG: f"/nonexistent/{name}"}, Flags()), ConfigError)
