"""The configuration: what is given where wins, and every fault is found and named."""

import os
from pathlib import Path
from typing import get_args

import pytest

from sidecar.config import CONFIG, DATASTORES, LISTEN, ConfigError, DatastoreConfig, Flags, SidecarConfig, load_config
from sidecar.datastores.kinds import DATASTORE_TYPES
from sidecar.images.layouts import LAYOUTS
from sidecar.locks.kinds import LOCK_KINDS

ONE = '[datastore.one]\npath = "/one"\n'


def from_toml(directory: Path, text: str) -> SidecarConfig:
    file = directory / "images.toml"
    file.write_text(text)
    return load_config(file, {}, Flags(listen="localhost:0"))


def listening(listen: str) -> str:
    return load_config(None, {}, Flags(listen=listen, datastores=["one=/one"])).listen


def fault_of(toml: str, directory: Path) -> str:
    """The message without the directory of the file."""
    with pytest.raises(ConfigError) as caught:
        from_toml(directory, toml)
    assert caught.value.exit_code == 2
    return caught.value.message.replace(f"{directory}/", "")


def test_a_file_alone_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "images.toml"
    file.write_text(
        'listen = "127.0.0.1:7070"\nlog_level = "debug"\n'
        '[datastore.one]\npath = "/srv/one//"\nlayout = "sharded"\ntype = "nfs"\nreserve = "1.5G"\n'
        '[datastore.two]\npath = "/srv/two"\nrescan_seconds = 7\n'
        "[limits]\nmax_copies = 2\nshutdown_seconds = 0\n"
    )
    config = load_config(file, {}, Flags())
    assert config.listen == "127.0.0.1:7070"
    assert config.log_level == "debug"
    one, two = config.datastores
    assert (one.name, one.path, one.layout, one.type) == ("one", "/srv/one", "sharded", "nfs")
    assert (one.reserve, one.rescan_seconds) == (1536 * 1024**2, 10.0)
    assert (two.layout, two.type, two.reserve, two.rescan_seconds) == ("compound", "local", 64 * 1024**2, 7.0)
    assert (config.limits.max_copies, config.limits.max_watches, config.limits.shutdown_seconds) == (2, 64, 0)


def test_a_local_datastore_without_events_is_listed_within_the_five_seconds_that_are_promised() -> None:
    config = load_config(None, {}, Flags(datastores=["one=/one"]))
    assert config.datastores[0].rescan_seconds < 5


def test_the_type_says_how_a_datastore_is_locked_unless_it_is_told() -> None:
    given = ("local", "nfs", "vmfs", "nfs,locks=exclusive-open", "vmfs,locks=flock")
    flags = [f"d{number}=/d{number},type={words}" for number, words in enumerate(given)]
    config = load_config(None, {}, Flags(datastores=flags))
    assert [place.locks for place in config.datastores] == [
        "flock",
        "flock",
        "exclusive-open",
        "exclusive-open",
        "flock",
    ]


def test_everything_that_can_be_configured_is_there() -> None:
    fields = DatastoreConfig.model_fields
    assert set(get_args(fields["type"].annotation)) == {*DATASTORE_TYPES, "vsphere"}
    assert set(get_args(fields["locks"].annotation)) == set(LOCK_KINDS)
    layouts, none = get_args(fields["layout"].annotation)
    assert set(get_args(layouts)) == set(LAYOUTS) and none is type(None)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "images.toml"
    file.write_text('listen = "127.0.0.1:1"\nlog_level = "error"\n' + ONE)
    environ = {CONFIG: str(file)}
    assert load_config(None, environ, Flags()).listen == "127.0.0.1:1"
    environ |= {LISTEN: "127.0.0.1:2", DATASTORES: "two=/two,layout=vsan; three=/three ;"}
    config = load_config(None, environ, Flags())
    assert config.listen == "127.0.0.1:2"
    assert [(d.name, d.path, d.layout) for d in config.datastores] == [
        ("two", "/two", "vsan"),
        ("three", "/three", "compound"),
    ]
    config = load_config(None, environ, Flags("127.0.0.1:3", ["four=/four,type=nfs,reserve=1MB"], "warning"))
    assert (config.listen, config.log_level) == ("127.0.0.1:3", "warning")
    assert [(d.name, d.type, d.reserve) for d in config.datastores] == [("four", "nfs", 1_000_000)]


def test_the_config_flag_wins_over_the_file_that_the_environment_names(tmp_path: Path) -> None:
    for name in ("flag", "environment"):
        (tmp_path / name).write_text(f'[datastore.{name}]\npath = "/{name}"\n')
    config = load_config(tmp_path / "flag", {CONFIG: str(tmp_path / "environment")}, Flags())
    assert [d.name for d in config.datastores] == ["flag"]


def test_without_an_address_the_sidecar_listens_where_its_clients_look(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = Flags(datastores=["one=/one"])
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert load_config(None, {"XDG_RUNTIME_DIR": "/x"}, flags).listen == "unix:/run/image-sidecar.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert load_config(None, {"XDG_RUNTIME_DIR": "/x"}, flags).listen == "unix:/x/image-sidecar.sock"
    assert load_config(None, {}, flags).listen == "unix:/run/user/1000/image-sidecar.sock"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            '[datastore.one]\npath = "/one"\nlayout = "foo"\n',
            "images.toml: datastore.one.layout: 'foo' is not one of compound, sharded, vsan",
        ),
        (ONE + 'type = "vsan"\n', "images.toml: datastore.one.type: 'vsan' is not one of local, nfs, vmfs"),
        (ONE + 'locks = "none"\n', "images.toml: datastore.one.locks: 'none' is not one of flock, exclusive-open"),
        ('[datastore.one]\npath = "one"\n', "images.toml: datastore.one.path: 'one' is not an absolute path"),
        ('[datastore.one]\npath = "/a/../b"\n', "images.toml: datastore.one.path: '/a/../b' has a '..' in it"),
        ('[datastore.one]\nlayout = "vsan"\n', "images.toml: datastore.one: has no path: write the directory"),
        ('[datastore."a/b"]\npath = "/one"\n', "images.toml: datastore.a/b.name: 'a/b' is no name"),
        (
            '[datastore.".hidden"]\npath = "/one"\n',
            "images.toml: datastore..hidden.name: '.hidden' is no name: 1 to 128",
        ),
        (ONE + 'name = "two"\n', "images.toml: datastore.one.name: a datastore is named by its table"),
        (ONE + 'reserve = "many"\n', "images.toml: datastore.one.reserve: 'many' is no size"),
        (ONE + "reserve = -1\n", "images.toml: datastore.one.reserve: -1: input should be greater than or equal to 0"),
        (ONE + "rescan_seconds = inf\n", "images.toml: datastore.one.rescan_seconds: inf: "),
        (ONE + "reserv = 1\n", "images.toml: datastore.one.reserv: no such key; did you mean reserve?"),
        (ONE + "[limits]\nmax_copy = 1\n", "images.toml: limits.max_copy: no such key; did you mean max_copies?"),
        (
            ONE + '[limits]\nmax_copies = "16"\n',
            "images.toml: limits.max_copies: '16': input should be a valid integer",
        ),
        (ONE + "[limits]\nmax_copies = true\n", "images.toml: limits.max_copies: True: "),
        (ONE + "[limits]\nmax_calls = 0\n", "images.toml: limits.max_calls: 0: "),
        ("limits = 3\n" + ONE, "images.toml: limits: 3 is no table: write [limits]"),
        ('[datastores.one]\npath = "/one"\n', "images.toml: datastores: no such key; did you mean datastore?"),
        ('datastore = ["/one"]\n', "images.toml: datastore: must be tables, such as [datastore.one]"),
        ('[datastore]\none = "/one"\n', "images.toml: datastore.one: must be a table: [datastore.one]"),
        ("listen = \n", "images.toml: Invalid value"),
        ('loglevel = "info"\n' + ONE, "images.toml: loglevel: no such key; did you mean log_level?"),
    ],
)
def test_a_fault_in_the_file_is_named_with_its_key(tmp_path: Path, toml: str, message: str) -> None:
    assert message in fault_of(toml, tmp_path)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    message = fault_of('[datastore.one]\npath = "one"\nlayuot = "vsan"\n[limits]\nmax_copies = 0\n', tmp_path)
    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "datastore.one.path",
        "datastore.one.layuot",
        "limits.max_copies",
    ]


def test_a_file_that_cannot_be_read_is_named_with_who_named_it(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match=rf"^{missing}: No such file or directory$"):
        load_config(missing, {}, Flags())
    with pytest.raises(ConfigError, match=rf"^IMAGE_SIDECAR_CONFIG: {missing}: No such file or directory$"):
        load_config(None, {CONFIG: str(missing)}, Flags())
    (tmp_path / "latin1.toml").write_bytes(b'listen = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin1\.toml: .*utf-8"):
        load_config(tmp_path / "latin1.toml", {}, Flags())


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        ({}, Flags(listen="0.0.0.0:1"), "--listen: '0.0.0.0' is not a loopback address"),
        ({LISTEN: "host"}, Flags(), "IMAGE_SIDECAR_LISTEN: 'host' is no address"),
        ({}, Flags(log_level="loud"), "--log-level: 'loud' is not one of debug, info, warning, error"),
        ({DATASTORES: "one=/one,layout=x"}, Flags(), "IMAGE_SIDECAR_DATASTORES: one.layout: 'x' is not one of"),
        ({DATASTORES: "/one"}, Flags(), "IMAGE_SIDECAR_DATASTORES: '/one' is not of the form NAME=PATH"),
        ({}, Flags(datastores=["one="]), "--datastore: one: has no path: write the directory where the datastore is"),
        ({}, Flags(datastores=["one=,type=vsphere"]), "--datastore: one: is of type vsphere, and has no server"),
        ({}, Flags(datastores=["=/one"]), "--datastore: '=/one' is not of the form NAME=PATH"),
        ({}, Flags(datastores=["one=/one,size=3"]), "--datastore: one.size: no such key"),
        ({}, Flags(datastores=["one=/one,vsan"]), "--datastore: one: 'vsan' is not of the form KEY=VALUE"),
        ({}, Flags(datastores=["one=/one,type=nfs,type=local"]), "--datastore: one.type: given twice"),
        ({}, Flags(datastores=["one=/a{b}/../c"]), "--datastore: one.path: '/a{b}/../c' has a '..' in it"),
        ({"IMAGE_SIDECAR_DATASTORE": "one=/one"}, Flags(), "did you mean IMAGE_SIDECAR_DATASTORES?"),
        ({DATASTORES: " ; "}, Flags(), "no datastore: name one with --datastore NAME=PATH"),
    ],
)
def test_a_fault_in_a_variable_or_flag_names_it(environ: dict[str, str], flags: Flags, message: str) -> None:
    if not flags.datastores and DATASTORES not in environ:
        environ = {DATASTORES: "one=/one", **environ}
    with pytest.raises(ConfigError) as caught:
        load_config(None, environ, flags)
    assert message in caught.value.message


def test_variables_that_a_container_platform_sets_for_a_service_of_that_name_do_no_harm() -> None:
    environ = {
        "IMAGE_SIDECAR_PORT": "tcp://10.0.0.1:80",
        "IMAGE_SIDECAR_SERVICE_HOST": "10.0.0.1",
        "IMAGE_SIDECAR": "x",
    }
    load_config(None, environ, Flags(datastores=["one=/one"]))


@pytest.mark.parametrize(
    ("datastores", "message"),
    [
        (["one=/a", "one=/b"], "--datastore: one: this datastore is configured twice"),
        (["one=/a", "two=/a/./"], "--datastore: two.path: /a is the directory of datastore one too"),
        (["one=/a", "two=/a/b"], "--datastore: two.path: /a/b is inside /a, the directory of datastore one"),
        (["one=/a/b", "two=/a"], "--datastore: two.path: /a/b, the directory of datastore one, is inside /a"),
        (["one=/", "two=/a"], "--datastore: two.path: /a is inside /, the directory of datastore one"),
    ],
)
def test_two_datastores_that_would_take_each_others_images_for_their_own_are_refused(
    datastores: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {}, Flags(datastores=datastores))
    assert caught.value.message == message


def test_directories_whose_names_begin_alike_are_not_inside_each_other() -> None:
    assert len(load_config(None, {}, Flags(datastores=["one=/a", "two=/ab"])).datastores) == 2


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("1 KiB", 1024),
        ("2M", 2 << 20),
        ("2MB", 2_000_000),
        ("0.5G", 1 << 29),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_mean_what_their_suffixes_say(given: str, size: int) -> None:
    config = load_config(None, {}, Flags(datastores=[f"one=/one,reserve={given}"]))
    assert config.datastores[0].reserve == size


@pytest.mark.parametrize("given", ["", "-1", "1X", "M", "1e3", "1.G", "\u0661M"])
def test_what_is_no_size_is_not_guessed(given: str) -> None:
    with pytest.raises(ConfigError, match=r"one\.reserve: .* is no size"):
        load_config(None, {}, Flags(datastores=[f"one=/one,reserve={given}"]))


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        ("unix:/run/x.sock", "unix:/run/x.sock"),
        ("unix:///run/x.sock", "unix:/run/x.sock"),
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("127.1.2.3:65535", "127.1.2.3:65535"),
        ("[::1]:50051", "[::1]:50051"),
        # Never looked up: a resolver could say that it is an address which others reach.
        ("localhost:50051", "127.0.0.1:50051"),
    ],
)
def test_addresses_that_only_this_host_reaches_are_taken(given: str, bound: str) -> None:
    assert listening(given) == bound


def test_a_relative_socket_means_the_directory_that_the_sidecar_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert listening("unix:x.sock") == f"unix:{tmp_path}/x.sock"


@pytest.mark.parametrize(
    "given",
    ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[fe80::1%lo]:1", "[::ffff:10.0.0.1]:1", "example.org:1", ":1", "[]:1"],
)
def test_an_address_that_others_reach_is_refused_until_there_is_tls(given: str) -> None:
    with pytest.raises(ConfigError, match="until there is TLS"):
        listening(given)


@pytest.mark.parametrize("given", ["", "unix:", "unix:/run/", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "::1:1"])
def test_what_is_no_address_is_refused_before_anything_listens(given: str) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        listening(given)


def test_a_socket_path_that_no_client_could_name_is_refused_with_its_length() -> None:
    fits = "unix:/" + "x" * 106
    assert listening(fits) == fits
    with pytest.raises(ConfigError, match="is 108 bytes long: the path of a socket has at most 107"):
        listening(fits + "x")
    with pytest.raises(ConfigError, match="at most 107"):
        listening("unix:/" + "é" * 54)


def test_the_configuration_cannot_be_changed_while_it_is_used() -> None:
    config = load_config(None, {}, Flags(datastores=["one=/one"]))
    with pytest.raises(ValueError, match="frozen"):
        config.listen = "unix:/elsewhere"


def test_maintenance_is_on_where_it_frees_what_is_nobodys_and_off_where_it_deletes_images(tmp_path: Path) -> None:
    plan = from_toml(tmp_path, ONE).maintenance
    assert (plan.reap_interval_seconds, plan.staging_grace_seconds) == (600, 7200)
    assert (plan.purge_interval_seconds, plan.tombstone_grace_seconds) == (600, 86400)
    assert (plan.purge_below_free, plan.sweep_interval_seconds) == (0, 0)


def test_maintenance_is_configured_and_its_faults_are_named(tmp_path: Path) -> None:
    plan = from_toml(
        tmp_path, ONE + '[maintenance]\nreap_interval_seconds = 0\npurge_below_free = "50GiB"\n'
    ).maintenance
    assert (plan.reap_interval_seconds, plan.purge_below_free) == (0, 50 * 1024**3)
    for line, fault in {
        "reap_interval = 1": "maintenance.reap_interval: no such key; did you mean reap_interval_seconds?",
        "rate = 0": "maintenance.rate: 0: input should be greater than or equal to 1",
        "tombstone_grace_seconds = -1": "maintenance.tombstone_grace_seconds: -1: ",
        'purge_below_free = "much"': "maintenance.purge_below_free: 'much' is no size",
    }.items():
        assert fault in fault_of(f"{ONE}[maintenance]\n{line}\n", tmp_path)
