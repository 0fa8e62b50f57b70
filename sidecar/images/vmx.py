"""The files that a VM's configuration names: `.vmx`, `.vmtx` (a template's) and `.vmsd` (its snapshots')."""

import os
import re

from sidecar.images.disk_parents import Alternatives, unescaped

CONFIGURATION_SUFFIXES = (".vmx", ".vmtx", ".vmsd")
MAX_CONFIGURATION_BYTES = 4 << 20

_FILE_NAME = re.compile(rb'^[ \t]*([\w.:]+)\.fileName[ \t]*=[ \t]*"?([^"\r\n]*)', re.IGNORECASE | re.MULTILINE)
_DISPLAY_NAME = re.compile(rb'^[ \t]*displayName[ \t]*=[ \t]*"?([^"\r\n]*)', re.IGNORECASE | re.MULTILINE)


def files_named(text: bytes) -> list[Alternatives]:
    """Each value of a `….fileName`, whatever device it is of, and whether that is present or not."""
    names = (name.strip() for _, name in _FILE_NAME.findall(text))
    return [tuple(dict.fromkeys((os.fsdecode(name), os.fsdecode(unescaped(name))))) for name in names if name]


def display_name(text: bytes) -> str:
    """What people call the VM; empty when it has no name."""
    found = _DISPLAY_NAME.search(text)
    return unescaped(found[1]).decode("utf-8", "replace").strip() if found else ""
