"""What the tests of hostile input share: secrets that nobody may touch, bounds, and every call that takes an image."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sidecar import errors
from sidecar.client import SidecarClient
from tests.crash.support import answers
from tests.support.places import MIB, TIMESTAMP, Place, write_flat_disk
from tests.support.world import World

SHADOW = Path("/etc/shadow")
GIGABYTE = 1 << 30
MOST_MEMORY = 64 * MIB
MOST_SECONDS = 10.0
# An error of these says that the sidecar, or the datastore, is at fault: not what somebody put there.
MISLEADING = {"INTERNAL", "DATASTORE_UNAVAILABLE", "DEADLINE_EXCEEDED"}

_LONG_AGO_NS = 10**18  # an access time before every mtime: the next read sets it, also where it is `relatime`


class Outside:
    """Files beside the datastores: `secret` is a disk's data, `image` a whole image, and /etc/shadow."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = directory / "image"
        write_flat_disk(self.image, "a")
        (self.image / TIMESTAMP).touch()
        self.secret = directory / "secret"
        self.secret.write_bytes(b"secret\n" * (2 * MIB // 7) + b"\n" * (2 * MIB % 7))
        self.directory_secret = directory / "more"
        self.directory_secret.mkdir()
        (self.directory_secret / "kept").write_bytes(b"kept")
        self._tells_reads = self._reads_are_told()
        self._read_on_purpose: set[Path] = set()
        self._contents = {path: path.read_bytes() for path in self._files()}
        for path in self._files():
            if path != SHADOW:
                os.utime(path, ns=(_LONG_AGO_NS, path.stat().st_mtime_ns))
        self._before = self._look()

    def may_be_read(self, *paths: Path) -> None:
        """Has another name inside a datastore: a hard link cannot be told from the file."""
        self._read_on_purpose.update(paths)

    def assert_untouched(self) -> None:
        assert self._look() == self._before
        untold = self._read_on_purpose | {SHADOW}  # which whoever logs in, or changes users, reads too
        for path in (path for path in self._files() if self._tells_reads and path not in untold):
            assert path.stat().st_atime_ns == _LONG_AGO_NS, f"{path} was read"
        assert {path: path.read_bytes() for path in self._files()} == self._contents

    def _files(self) -> list[Path]:
        return [SHADOW, *(path for path in sorted(self.directory.rglob("*")) if path.is_file())]

    def _look(self) -> dict[Path, tuple[int, int, int, int]]:
        """What there is, and that nothing of it was changed; not how many links a file has."""
        found = {}
        for path in (SHADOW, self.directory, *sorted(self.directory.rglob("*"))):
            status = path.stat()
            found[path] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns)
        return found

    def _reads_are_told(self) -> bool:
        """False where the file system is mounted with `noatime`."""
        os.utime(self.secret, ns=(_LONG_AGO_NS, self.secret.stat().st_mtime_ns))
        self.secret.read_bytes()
        return self.secret.stat().st_atime_ns != _LONG_AGO_NS


@contextlib.contextmanager
def bounded(pid: int, *, seconds: float = MOST_SECONDS, memory: int = MOST_MEMORY) -> Iterator[None]:
    """The block is over within `seconds`, and the process never had `memory` more bytes than before it."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is that of now
    before, began = _resident(pid, "VmRSS"), time.monotonic()
    yield
    assert time.monotonic() - began < seconds
    grown = _resident(pid, "VmHWM") - before
    assert grown < memory, f"{grown >> 20} MiB more than before"


def _resident(pid: int, which: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {which}")


def harmless_calls(client: SidecarClient, place: Place, image_id: str) -> dict[str, Callable[[], object]]:
    """Every call about one image that leaves it there."""
    ref, files = f"{place.name}/{image_id}", (f"{image_id}.vmdk", f"{image_id}-flat.vmdk", f"{image_id}.ecv")
    reads = {f"read {name}": lambda name=name: list(client.read_file(ref, name)) for name in files}
    return {
        "list": lambda: list(client.images(place.name)),
        "image": lambda: client.image(ref),
        "validate": lambda: client.validate(ref),
        "repair": lambda: client.validate(ref, repair=True),
        "touch": lambda: client.touch(ref),
        "update": lambda: client.update_metadata(ref, files={f"{image_id}.ecv": b"{}"}),
        "copy": lambda: client.copy(ref, f"{place.name}/copied").wait(),
        "clone disk": lambda: clone_disk(client, ref, f"{place.name}/cloned"),
        "clone range": lambda: clone_range(client, ref, f"{place.name}/cloned", files[1]),
        **reads,
    }


def ending_calls(client: SidecarClient, place: Place, image_id: str) -> dict[str, Callable[[], object]]:
    ref = f"{place.name}/{image_id}"
    return {
        "delete": lambda: client.delete(ref),
        "restore": lambda: client.restore(ref),
        "delete again": lambda: client.delete(ref),
        "purge": lambda: client.purge(ref),
        "force": lambda: client.delete(ref, force=True),
        "stage": lambda: client.create_staging(ref).abort(),
    }


def clone_disk(client: SidecarClient, source: str, target: str) -> None:
    with client.create_staging(target) as staging:
        list(staging.clone_disk(source))


def clone_range(client: SidecarClient, source: str, target: str, name: str) -> None:
    with client.create_staging(target) as staging:
        staging.clone_range(source, name, 0, "x", 0, MIB)


def every_call(world: World, place: Place, image_id: str = "a") -> dict[str, str]:
    """What each call comes to: `ok`, or the reason of an error of ours, soon and without much memory."""
    found = {}
    calls = harmless_calls(world.client, place, image_id) | ending_calls(world.client, place, image_id)
    for name, call in calls.items():
        with bounded(world.sidecar.pid):
            found[name] = answers(call)
        with contextlib.suppress(errors.ImagesError):
            world.client.delete(f"{place.name}/copied", force=True)
    misleading = {name: reason for name, reason in found.items() if reason in MISLEADING}
    assert not misleading, found
    return found
