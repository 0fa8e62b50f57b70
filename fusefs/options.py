"""The options of `-o`: our own, and libfuse's that are passed on."""

import math
import os
from dataclasses import dataclass, field

from fusefs.attributes import Owner

FILE_SYSTEM_NAME = "image-mount"

# Of mount(8), fusermount3 and libfuse: passed on as they are.
_PASSED_FLAGS = {
    "allow_other", "allow_root", "auto_unmount", "debug", "default_permissions", "ro", "rw", "suid", "nosuid", "dev",
    "nodev", "exec", "noexec", "async", "sync", "atime", "noatime", "dirsync",
}  # fmt: skip
_PASSED_VALUES = {"fsname", "max_read", "max_idle_threads"}
# Of fstab: for mount(8) and for systemd, not for us. And when a look changes the time of access: here it never does,
# and libfuse refuses these.
_IGNORED_FLAGS = {
    "defaults", "auto", "noauto", "user", "nouser", "users", "_netdev", "nofail",
    "relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime", "lazytime", "nolazytime",
}  # fmt: skip
_OWN = "settle=, attr_timeout=, entry_timeout=, uid=, gid=, umask=, xattr, ro, allow_other"
_IGNORED_PREFIXES = ("x-", "comment=")


class OptionError(ValueError):
    """An option of `-o` that is not known, or has a value that cannot be meant."""


@dataclass(slots=True)
class MountOptions:
    """What `-o` says."""

    settle_seconds: float = 2.0
    attr_timeout: float = 5.0
    entry_timeout: float = 5.0
    owner: Owner = field(default_factory=lambda: Owner(os.getuid(), os.getgid()))
    may_cover_files: bool = False
    attributes: bool = False
    passed: dict[str, str | bool] = field(default_factory=dict)

    def for_libfuse(self, address: str) -> dict[str, str | bool]:
        """All that libfuse is to be told. `address`: where the sidecar is, for the first column of df."""
        permissions: dict[str, str | bool] = {}
        if "allow_other" in self.passed or "allow_root" in self.passed:
            # Others are let in: the kernel holds them to what stat shows.
            permissions["default_permissions"] = True
        return {
            "fsname": address.replace(",", "_"),
            "subtype": FILE_SYSTEM_NAME,
            "entry_timeout": f"{self.entry_timeout:g}",
            "attr_timeout": f"{self.attr_timeout:g}",
            **permissions,
            **self.passed,
        }


def parse_options(texts: tuple[str, ...]) -> MountOptions:
    """The options of every `-o`, each a list separated by commas. Raises OptionError, which names the option."""
    options = MountOptions()
    uid, gid, umask = options.owner.uid, options.owner.gid, 0
    for text in ",".join(texts).split(","):
        name, equals, value = text.strip().partition("=")
        if not name or name in _IGNORED_FLAGS or text.startswith(_IGNORED_PREFIXES):
            continue
        match name:
            case "settle":
                options.settle_seconds = _seconds(name, value)
            case "attr_timeout":
                options.attr_timeout = _seconds(name, value)
            case "entry_timeout":
                options.entry_timeout = _seconds(name, value)
            case "uid":
                uid = _number(name, value, 10)
            case "gid":
                gid = _number(name, value, 10)
            case "umask":
                umask = _number(name, value, 8)
            case "xattr":
                options.attributes = True
            case "nonempty":
                options.may_cover_files = True
            case _ if name in _PASSED_FLAGS and not equals:
                options.passed[name] = True
            case _ if name in _PASSED_VALUES and value:
                options.passed[name] = value
            case _:
                raise OptionError(f"unknown option {text!r}: known are {_OWN}, and those of libfuse")
    options.owner = Owner(uid, gid, umask)
    return options


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 86400:
        raise OptionError(f"{name}={value}: give seconds, from 0 to 86400")
    return seconds


def _number(name: str, value: str, base: int) -> int:
    try:
        number = int(value, base)
    except ValueError:
        number = -1
    limit = 0o777 if base == 8 else 0xFFFF_FFFE
    if not 0 <= number <= limit:
        wanted = f"an octal number from 0 to {limit:o}" if base == 8 else f"a number from 0 to {limit}"
        raise OptionError(f"{name}={value}: give {wanted}")
    return number
