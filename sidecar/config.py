"""The sidecar's configuration: flags over environment over a TOML file, validated, every fault named with its place."""

import difflib
import errno
import ipaddress
import os
import posixpath
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from sidecar.errors import ImagesError

LISTEN = "IMAGE_SIDECAR_LISTEN"
CONFIG = "IMAGE_SIDECAR_CONFIG"
DATASTORES = "IMAGE_SIDECAR_DATASTORES"

# sockaddr_un holds 108 bytes, the last of them a NUL.
MAX_SOCKET_PATH = 107

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}

Model = TypeVar("Model", bound=BaseModel)
# Of a problem and the key that has it: the line for the user.
Fault = Callable[..., str]


class ConfigError(ImagesError):
    """The configuration cannot be meant; one line a fault, each with its source and key."""

    reason, code, errno, exit_code = "INVALID_CONFIGURATION", "INVALID_ARGUMENT", errno.EINVAL, 2


def _wrong(problem: str) -> PydanticCustomError:
    # pydantic formats the text with its context: braces in a value must not be taken for a field of it.
    return PydanticCustomError("wrong", "{problem}", {"problem": problem})


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise _wrong(f"{value!r} is no name: 1 to 128 of letters, digits, '.', '_', '-', not starting with a dot")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise _wrong(f"{value!r} is not an absolute path")
    if ".." in value.split("/"):
        # What `..` leads to depends on the symbolic links before it: two spellings of one datastore would pass for two.
        raise _wrong(f"{value!r} has a '..' in it: write the directory that is meant")
    if "\0" in value:
        raise _wrong(f"{value!r} has a NUL in it")
    return "/" + posixpath.normpath(value).lstrip("/")


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    # No more digits than a file system has bytes: Python refuses to read thousands of them.
    found = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?) *([A-Za-z]*)", value.strip(), re.ASCII)
    unit = None if found is None else _UNITS.get(found[2])
    if found is None or unit is None:
        raise _wrong(f"{value!r} is no size: write bytes, or a number with K, M, G, T (KiB, …) or KB, MB, GB, TB")
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


def _seconds(value: object) -> object:
    # From a flag or a variable it is text; a TOML file has numbers.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise _wrong(f"{value!r} is no number of seconds") from None
    return value


def _listen(value: str) -> str:
    """The address as it is bound: `unix:` and an absolute path, or a loopback IP address and a port."""
    if value.startswith("unix:"):
        given = value.removeprefix("unix:")
        if not given or given.endswith("/") or "\0" in given:
            raise _wrong(f"{value!r} names no socket: write unix:PATH")
        path = "/" + os.path.abspath(given).lstrip("/")
        length = len(os.fsencode(path))
        if length > MAX_SOCKET_PATH:
            raise _wrong(f"{path!r} is {length} bytes long: the path of a socket has at most {MAX_SOCKET_PATH}")
        return f"unix:{path}"
    found = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:]*)):(\d{1,5})", value, re.ASCII)
    if found is None or int(found[3]) > 65535:
        raise _wrong(f"{value!r} is no address: write unix:PATH, or HOST:PORT with a loopback host")
    # The name is never looked up: what a resolver says of it could be an address that others reach.
    host = "127.0.0.1" if found[2] == "localhost" else found[1] or found[2]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise _wrong(f"{host!r} is no loopback address: others are refused until there is TLS") from None
    if not address.is_loopback or getattr(address, "scope_id", None) or getattr(address, "ipv4_mapped", None):
        raise _wrong(f"{host!r} is not a loopback address: others are refused until there is TLS")
    return f"[{address}]:{int(found[3])}" if address.version == 6 else f"{address}:{int(found[3])}"


def _server_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        # Without the value: somebody may have written an address with a password into it.
        raise _wrong("is not the name of a table [vsphere.NAME]")
    return value


def _address(value: str) -> str:
    found = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?", value, re.ASCII)
    if found is None or int(found[1] or 443) > 65535:
        # Without the value: somebody may have written a password into it.
        raise _wrong("is no address of a server: write HOST or HOST:PORT")
    return value


def _secret_file(value: str) -> str:
    # Without the value: it may be the secret itself, in the wrong place.
    if not value.startswith("/") or "\0" in value:
        raise _wrong("is not the absolute path of a file; the file has one line, USER:PASSWORD")
    return value


def _secret_variable(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value, re.ASCII):
        raise _wrong("is not the name of an environment variable; the variable has USER:PASSWORD")
    return value


def _thumbprint(value: str) -> str:
    digits = value.rpartition("=")[2].replace(":", "").strip()  # openssl prints `sha256 Fingerprint=` before them
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", digits):
        raise _wrong(f"{value!r} is no SHA-256 thumbprint: 64 hex digits, colons between them or not")
    return digits


LockKindId = Literal["flock", "exclusive-open"]


def _rescan(known: dict[str, Any]) -> float:
    if known.get("type") == "vsphere" and known.get("path") is None:
        return 60.0  # each is a task on the server, which others see
    return 2.0 if known.get("type") == "local" else 10.0


def _locks(known: dict[str, Any]) -> LockKindId:
    return "exclusive-open" if known.get("type") in ("vmfs", "vsphere") else "flock"


def _layout(known: dict[str, Any]) -> Literal["compound"] | None:
    return None if known.get("type") == "vsphere" else "compound"


Seconds = Annotated[float, BeforeValidator(_seconds), Field(allow_inf_nan=False, gt=0, le=30 * 86400)]
Interval = Annotated[float, BeforeValidator(_seconds), Field(allow_inf_nan=False, ge=0, le=365 * 86400)]
Grace = Annotated[float, BeforeValidator(_seconds), Field(allow_inf_nan=False, ge=0, le=10 * 365 * 86400)]
Count = Annotated[int, Field(ge=1, le=1024)]


class _Model(BaseModel):
    # Strict: "16" and true are no counts.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DatastoreConfig(_Model):
    """A place that holds images. Whether it is there is asked when it is opened, and again while it is not."""

    name: Annotated[str, AfterValidator(_name)]
    # The directory; None: of type vsphere, and reached by its server alone.
    path: Annotated[str, AfterValidator(_absolute)] | None = None
    type: Literal["local", "nfs", "vmfs", "vsphere"] = "local"
    # How others are excluded: every sidecar of a datastore has to do it the same way. ESX has no flock between hosts.
    locks: LockKindId = Field(default_factory=_locks)
    # None: what the server tells that the datastore is decides.
    layout: Literal["compound", "sharded", "vsan"] | None = Field(default_factory=_layout)
    # Bytes that no new image may take.
    reserve: Annotated[int, BeforeValidator(_bytes), Field(ge=0)] = 64 * 1024**2
    # Between two listings of the whole datastore, where the kernel does not tell of changes: every one that is
    # not `local`, and a `local` one without inotify.
    rescan_seconds: Seconds = Field(default_factory=_rescan)
    # Of type vsphere: the table [vsphere.NAME], and what the datastore is called there: by name or inventory path.
    server: Annotated[str, AfterValidator(_server_name)] | None = None
    datacenter: str | None = None
    datastore: str | None = None

    @model_validator(mode="after")
    def _has_a_server(self) -> Self:
        if self.type == "vsphere" and self.server is None:
            raise _wrong('is of type vsphere, and has no server: write server = "NAME", and a table [vsphere.NAME]')
        if self.type != "vsphere" and self.path is None:
            raise _wrong("has no path: write the directory where the datastore is")
        if self.path is None and "locks" in self.model_fields_set:
            raise _wrong("has locks, and no path: without one, locks are the server's directories")
        if self.type != "vsphere" and (self.server or self.datacenter or self.datastore):
            raise _wrong(f'is of type {self.type}: server, datacenter and datastore are for type = "vsphere"')
        return self


class VsphereServer(_Model):
    """A vCenter or a single ESXi host. The account is in a file or a variable, and nowhere else."""

    address: Annotated[str, AfterValidator(_address)]
    credentials_file: Annotated[str, AfterValidator(_secret_file)] | None = None
    credentials_variable: Annotated[str, AfterValidator(_secret_variable)] | None = None
    # How its certificate is checked: by these authorities, else by those of the system; or by its own SHA-256.
    ca_file: Annotated[str, AfterValidator(_absolute)] | None = None
    thumbprint: Annotated[str, AfterValidator(_thumbprint)] | None = None
    # Not at all: whoever is on the way gets the password.
    insecure: bool = False
    # Without an answer, until a call is given up; a copy, when the server is away for longer.
    timeout_seconds: Seconds = 30.0

    @model_validator(mode="after")
    def _is_told_once(self) -> Self:
        if (self.credentials_file is None) == (self.credentials_variable is None):
            raise _wrong("needs one of credentials_file and credentials_variable")
        if (self.ca_file is not None) + (self.thumbprint is not None) + self.insecure > 1:
            raise _wrong("has more than one of ca_file, thumbprint and insecure: keep one")
        return self

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, colon, port = self.address.rpartition(":")
        return (host, int(port)) if colon and not port.endswith("]") else (self.address, 443)


class Limits(_Model):
    """What the sidecar takes on at a time, and how long it waits."""

    # Inside each datastore, and as many again between it and others.
    max_copies: Count = 16
    max_watches: Count = 64
    # Streams of WriteFile and ReadFile, of each datastore.
    max_transfers: Count = 32
    # Other calls that run at a time, of each datastore, and as many commits, aborts and purges; more wait in line.
    max_calls: Count = 16
    # For running calls to end after SIGTERM, before they are cancelled.
    shutdown_seconds: Annotated[float, BeforeValidator(_seconds), Field(allow_inf_nan=False, ge=0, le=3600)] = 10.0
    lock_timeout_seconds: Seconds = 30.0
    # Without a call that names it for this long, a staging directory is dropped.
    staging_lease_seconds: Seconds = 600.0


class MaintenanceConfig(_Model):
    """What the sidecar does by itself on every datastore. An interval of 0: never."""

    # Free the trash, and staging directories that nobody makes any more and that are older than the grace time.
    reap_interval_seconds: Interval = 600.0
    staging_grace_seconds: Grace = 7200.0
    # Purge deleted images, this long after their deletion.
    purge_interval_seconds: Interval = 600.0
    tombstone_grace_seconds: Grace = 86400.0
    # Bytes: with fewer free ones, purge the oldest deleted images before their time. 0: never.
    purge_below_free: Annotated[int, BeforeValidator(_bytes), Field(ge=0)] = 0
    # Scan, and then sweep. Images that were used within the grace time before the scan stay.
    sweep_interval_seconds: Interval = 0.0
    sweep_grace_seconds: Grace = 7 * 86400.0
    # VMs, images and deletions a minute, of these scans and sweeps, and how long each may take.
    rate: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    timeout_seconds: Seconds = 7 * 86400.0


class SidecarConfig(_Model):
    listen: Annotated[str, AfterValidator(_listen)]
    datastores: tuple[DatastoreConfig, ...]
    limits: Limits = Limits()
    maintenance: MaintenanceConfig = MaintenanceConfig()
    vsphere: dict[Annotated[str, AfterValidator(_name)], VsphereServer] = {}
    log_level: Literal["debug", "info", "warning", "error"] = "info"


_TABLES: dict[str, type[BaseModel]] = {"limits": Limits, "maintenance": MaintenanceConfig, "vsphere": VsphereServer}


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line says; None and () where it says nothing. `datastores`: NAME=[PATH][,key=value]…"""

    listen: str | None = None
    datastores: Sequence[str] = ()
    log_level: str | None = None


@dataclass(frozen=True, slots=True)
class _Given:
    """A value and where it was given, for the messages."""

    source: str
    key: str
    value: Any

    def fault(self, problem: str, *below: str) -> str:
        return ": ".join(part for part in (self.source, ".".join(filter(None, (self.key, *below))), problem) if part)


@dataclass(slots=True)
class _Settings:
    """What the sources say so far: later ones replace earlier ones, key by key, the datastores as one key."""

    values: dict[str, _Given] = field(default_factory=dict)
    datastores: list[_Given] = field(default_factory=list)


def load_config(file: str | os.PathLike[str] | None, environ: Mapping[str, str], flags: Flags) -> SidecarConfig:
    """Reads the file (else the one that IMAGE_SIDECAR_CONFIG names, else none), the environment and the flags.

    A source that names datastores replaces those of the sources below it. Raises ConfigError.
    """
    settings = _Settings()
    if file is not None:
        _take_file(settings, os.fspath(file), "")
    elif environ.get(CONFIG):
        _take_file(settings, environ[CONFIG], f"{CONFIG}: ")
    _take_environment(settings, environ)
    _take_flags(settings, flags)
    if "listen" not in settings.values:
        settings.values["listen"] = _Given("the default", "listen", _default_listen(environ))
    return _validate_all(settings)


def _default_listen(environ: Mapping[str, str]) -> str:
    if os.geteuid() == 0:
        return "unix:/run/image-sidecar.sock"
    directory = environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return f"unix:{directory}/image-sidecar.sock"


def _take_file(settings: _Settings, path: str, named_by: str) -> None:
    try:
        table = tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{named_by}{path}: {error.strerror}") from error
    except ValueError as error:  # of the TOML, or of its UTF-8
        raise ConfigError(f"{named_by}{path}: {error}") from error
    except RecursionError:
        raise ConfigError(f"{named_by}{path}: it is nested too deeply") from None
    # The model's own name for it would otherwise be taken, and then replaced.
    if "datastores" in table:
        raise ConfigError(f"{path}: datastores: no such key; did you mean datastore?")
    datastores = table.pop("datastore", None)
    for key, value in table.items():
        settings.values[key] = _Given(path, key, value)
    if datastores is None:
        return
    given = _Given(path, "datastore", datastores)
    if not isinstance(datastores, dict):
        raise ConfigError(given.fault("must be tables, such as [datastore.one]"))
    settings.datastores = []
    for name, keys in datastores.items():
        if not isinstance(keys, dict):
            raise ConfigError(given.fault(f"must be a table: [datastore.{name}]", name))
        if "name" in keys:
            raise ConfigError(given.fault("a datastore is named by its table: [datastore.NAME]", name, "name"))
        settings.datastores.append(_Given(path, f"datastore.{name}", {"name": name, **keys}))


def _take_environment(settings: _Settings, environ: Mapping[str, str]) -> None:
    for name in environ:
        # Others may share the prefix (service links of a container platform), but none of them is nearly one of ours.
        if name.startswith("IMAGE_SIDECAR_") and name not in (LISTEN, CONFIG, DATASTORES):
            near = difflib.get_close_matches(name, (LISTEN, CONFIG, DATASTORES), 1, 0.9)
            if near:
                raise ConfigError(f"{name}: not a variable of the sidecar; did you mean {near[0]}?")
    if environ.get(LISTEN):
        settings.values["listen"] = _Given(LISTEN, "", environ[LISTEN])
    if environ.get(DATASTORES):
        specs = [spec for spec in environ[DATASTORES].split(";") if spec.strip()]
        settings.datastores = [_datastore(DATASTORES, spec.strip()) for spec in specs]


def _take_flags(settings: _Settings, flags: Flags) -> None:
    if flags.listen is not None:
        settings.values["listen"] = _Given("--listen", "", flags.listen)
    if flags.log_level is not None:
        settings.values["log_level"] = _Given("--log-level", "", flags.log_level)
    if flags.datastores:
        settings.datastores = [_datastore("--datastore", spec) for spec in flags.datastores]


def _datastore(source: str, spec: str) -> _Given:
    """`NAME=PATH[,key=value]…`; a path with a comma in it needs the file. Without PATH: by its server alone."""
    first, *others = spec.split(",")
    name, equals, path = first.partition("=")
    if not (name and equals):
        raise ConfigError(f"{source}: {spec!r} is not of the form NAME=PATH[,layout=…][,type=…][,reserve=…]")
    values = {"name": name, "path": path} if path else {"name": name}
    for other in others:
        key, equals, value = other.partition("=")
        if not equals:
            raise ConfigError(f"{source}: {name}: {other!r} is not of the form KEY=VALUE")
        if key in values:
            raise ConfigError(f"{source}: {name}.{key}: given twice")
        values[key] = value
    return _Given(source, name, values)


def _validate_all(settings: _Settings) -> SidecarConfig:
    faults: list[str] = []
    datastores = [_validate(DatastoreConfig, given.value, given.fault, faults) for given in settings.datastores]
    if not datastores:
        faults.append(f"no datastore: name one with --datastore NAME=PATH, {DATASTORES} or [datastore.NAME]")
    values = {key: given.value for key, given in settings.values.items()}
    values["datastores"] = tuple(datastore for datastore in datastores if datastore is not None)
    config = _validate(
        SidecarConfig, values, lambda problem, key, *below: settings.values[key].fault(problem, *below), faults
    )
    if config is not None:
        faults.extend(_overlaps(config.datastores, settings.datastores))
        for datastore, given in zip(datastores, settings.datastores, strict=True):
            if datastore is not None and datastore.server is not None and datastore.server not in config.vsphere:
                known = ", ".join(config.vsphere) or "none"
                faults.append(given.fault(f"there is no [vsphere.{datastore.server}]; there are: {known}", "server"))
    if config is None or faults:
        raise ConfigError("\n".join(faults))
    return config


def _validate(model: type[Model], values: Mapping[str, Any], fault: Fault, faults: list[str]) -> Model | None:
    """The model of these values, or None and more faults."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        for detail in error.errors():
            # The last is no fault: a default that depends on a value which is one.
            if detail["type"] != "default_factory_not_called":
                # pydantic tells of a table's name by its key below it.
                place = [str(each) for each in detail["loc"] if each != "[key]"]
                faults.append(fault(_problem(model, detail), *place))
        return None


def _problem(model: type[BaseModel], detail: ErrorDetails) -> str:
    text = _problem_with_value(model, detail)
    # Somebody may have written a password there.
    return text.removeprefix(repr(detail["input"])).lstrip(": ") if detail["loc"][:1] == ("vsphere",) else text


def _problem_with_value(model: type[BaseModel], detail: ErrorDetails) -> str:
    value = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            owner = _TABLES[str(detail["loc"][0])] if len(detail["loc"]) > 1 else model
            known = [key for key in owner.model_fields if key != "name"]
            # As it is written in the file.
            known = ["datastore" if key == "datastores" else key for key in known]
            near = difflib.get_close_matches(str(detail["loc"][-1]), known, 1)
            return "no such key; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
        case "missing":
            return "is missing"
        case "literal_error":
            expected = detail["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
            return f"{value!r} is not one of {expected}"
        case "model_type":
            return f"{value!r} is no table: write [{'.'.join(map(str, detail['loc']))}]"
        case "dict_type":
            return f"{value!r} is no table of servers: write [{detail['loc'][-1]}.NAME]"
        case "wrong":
            return detail["msg"]
        case _:
            return f"{value!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _overlaps(datastores: Sequence[DatastoreConfig], given: Sequence[_Given]) -> list[str]:
    """Two of one name, or of one place, would each take the other's images for its own."""
    faults = []
    for index, later in enumerate(datastores):
        for earlier in datastores[:index]:
            problem = None
            if later.name == earlier.name:
                problem = "this datastore is configured twice"
            elif later.path is None or earlier.path is None:
                same = (later.server, later.datacenter, later.datastore or later.name)
                if same == (earlier.server, earlier.datacenter, earlier.datastore or earlier.name):
                    problem = f"it is the same datastore of the server {later.server} as {earlier.name}"
            elif later.path == earlier.path:
                problem = f"{later.path} is the directory of datastore {earlier.name} too"
            elif _inside(later.path, earlier.path):
                problem = f"{later.path} is inside {earlier.path}, the directory of datastore {earlier.name}"
            elif _inside(earlier.path, later.path):
                problem = f"{earlier.path}, the directory of datastore {earlier.name}, is inside {later.path}"
            if problem is not None:
                where = [] if later.name == earlier.name or later.path is None else ["path"]
                faults.append(given[index].fault(problem, *where))
    return faults


def _inside(path: str, directory: str) -> bool:
    return path.startswith(directory.rstrip("/") + "/")
