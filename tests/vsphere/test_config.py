"""How a vSphere server and its datastores are configured; what is secret is in no message."""

from pathlib import Path

import pytest

from sidecar.config import ConfigError, Flags, SidecarConfig, load_config

SERVER = '[vsphere.vc]\naddress = "vc.example.org"\n'
CREDENTIALS = 'credentials_file = "/etc/vc"\n'
ONE = '[datastore.one]\npath = "/one"\ntype = "vsphere"\nserver = "vc"\n'


def load(directory: Path, toml: str, *flags: str) -> SidecarConfig:
    file = directory / "images.toml"
    file.write_text(toml)
    return load_config(file, {}, Flags(listen="localhost:0", datastores=flags))


def test_a_server_and_a_datastore_of_it(tmp_path: Path) -> None:
    config = load(tmp_path, SERVER + CREDENTIALS + ONE + 'datacenter = "/A/DC"\ndatastore = "fast"\n')
    server, (one,) = config.vsphere["vc"], config.datastores
    assert (server.host_and_port, server.insecure, server.timeout_seconds) == (("vc.example.org", 443), False, 30)
    assert (one.server, one.datacenter, one.datastore) == ("vc", "/A/DC", "fast")
    # Of the two ways the one that fails where it is the wrong one.
    assert one.locks == "exclusive-open"


def test_a_datastore_of_a_flag_may_be_of_a_server_of_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, SERVER + CREDENTIALS, "two=/two,type=vsphere,server=vc,locks=flock")
    assert (config.datastores[0].server, config.datastores[0].locks) == ("vc", "flock")


def test_without_a_path_it_is_reached_by_its_server_in_a_flag_too(tmp_path: Path) -> None:
    config = load(tmp_path, SERVER + CREDENTIALS, "two=,type=vsphere,server=vc,datacenter=/A/DC", "three=/three")
    two, three = config.datastores
    assert (two.path, two.server, two.datacenter, two.layout, two.rescan_seconds) == (None, "vc", "/A/DC", None, 60)
    assert (three.path, three.layout, three.rescan_seconds) == ("/three", "compound", 2)


@pytest.mark.parametrize(
    ("address", "host_and_port"),
    [
        ("vc", ("vc", 443)),
        ("10.0.0.1:8443", ("10.0.0.1", 8443)),
        ("[fe80::1]", ("[fe80::1]", 443)),
        ("[::1]:8443", ("[::1]", 8443)),
    ],
)
def test_an_address_with_a_port_or_without(tmp_path: Path, address: str, host_and_port: tuple[str, int]) -> None:
    config = load(tmp_path, f'[vsphere.vc]\naddress = "{address}"\n' + CREDENTIALS + ONE)
    assert config.vsphere["vc"].host_and_port == host_and_port


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (ONE, "datastore.one.server: there is no [vsphere.vc]; there are: none"),
        (ONE.replace('server = "vc"\n', ""), "datastore.one: is of type vsphere, and has no server"),
        (ONE.replace("vsphere", "nfs"), "datastore.one: is of type nfs: server, datacenter and datastore are for"),
        (SERVER + ONE, "vsphere.vc: needs one of credentials_file and credentials_variable"),
        (SERVER + CREDENTIALS + 'credentials_variable = "VC"\n' + ONE, "vsphere.vc: needs one of credentials_file and"),
        (SERVER + CREDENTIALS + "insecure = true\nca_file = '/ca'\n" + ONE, "vsphere.vc: has more than one of ca_file"),
        (SERVER + CREDENTIALS + "thumbprint = 'ab'\n" + ONE, "vsphere.vc.thumbprint: is no SHA-256 thumbprint"),
        (
            SERVER + CREDENTIALS + "timeout = 3\n" + ONE,
            "vsphere.vc.timeout: no such key; did you mean timeout_seconds?",
        ),
        ("[vsphere.vc]\n" + CREDENTIALS + ONE, "vsphere.vc.address: is missing"),
        ("vsphere = 3\n" + ONE, "vsphere: is no table of servers: write [vsphere.NAME]"),
        ("vsphere = {vc = 3}\n" + ONE, "vsphere.vc: is no table: write [vsphere.vc]"),
        (SERVER.replace("vc", '"v c"', 1) + CREDENTIALS + ONE, "vsphere.v c: is no name: 1 to 128 of letters"),
    ],
)
def test_a_fault_is_named_with_its_key(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "line",
    [
        'password = "hidden-word"',
        'credentials_file = "me:hidden-word"',
        'credentials_variable = "me:hidden-word"',
        'address = "https://me:hidden-word@vc"',
        'address = "vc:99999hidden-word"',
        'ca_file = "me:hidden-word"',
        'thumbprint = "me:hidden-word"',
        'insecure = "me:hidden-word"',
        'timeout_seconds = "me:hidden-word"',
    ],
)
def test_a_password_in_the_wrong_place_is_not_shown(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"[vsphere.vc]\n{line}\n" + ONE)
    assert "hidden-word" not in caught.value.message
    assert f"vsphere.vc.{line.partition(' ')[0]}: " in caught.value.message


@pytest.mark.parametrize(
    "toml",
    [
        'vsphere = "me:hidden-word@vc"\n' + ONE,
        '[vsphere]\nvc = "me:hidden-word@vc"\n' + ONE,
        SERVER + CREDENTIALS + ONE.replace('"vc"', '"me:hidden-word@vc"'),
    ],
)
def test_a_password_in_the_place_of_a_table_or_its_name_is_not_shown(tmp_path: Path, toml: str) -> None:
    with pytest.raises(ConfigError, match=r"is no table|is not the name of a table") as caught:
        load(tmp_path, toml)
    assert "hidden-word" not in caught.value.message
