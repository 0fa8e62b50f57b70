"""An image that another host replaces while it is read here: a reader gets the one or the other, whole, or an error."""

import errno
import hashlib
import os
import signal
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from sidecar.client import SidecarClient
from tests.mount.harness import log_of, process_name, wait_listed
from tests.support.disks import MIB, import_image, make_disk
from tests.support.processes import Mount, Sidecar, run, wait_until

# What a reader is told while there is no such image, or while it is replaced.
_REFUSED = {errno.ENOENT, errno.ESTALE}


class Reader:
    """Reads a file over and over, as `cat` does, and counts what it got."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = threading.Event()
        self.turn = threading.Lock()  # held while the file is open
        self._thread = threading.Thread(target=self._run)
        self.last = ""
        self.digests: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            self._end.wait(0.002)  # which lets another one take the turn
            try:
                with self.turn, self._path.open("rb", buffering=0) as file:
                    digest = hashlib.sha256()
                    while part := file.read(256 * 1024):
                        digest.update(part)
                self.last = digest.hexdigest()
                self.digests[self.last] += 1
            except OSError as error:
                self.refused[error.errno or 0] += 1


def test_a_reader_gets_no_mixture_of_two_images(
    sidecar: Sidecar, client: SidecarClient, tmp_path: Path, stack: ExitStack
) -> None:
    sizes = {"large": 8 * MIB, "small": 3 * MIB}
    for seed, (name, size) in enumerate(sizes.items()):
        import_image(client, f"two/{name}", make_disk(tmp_path / name, size=size, data=((0, size),), seed=seed))
    whole = {name: hashlib.sha256((tmp_path / name / "disk-flat.vmdk").read_bytes()).hexdigest() for name in sizes}
    client.copy("two/small", "one/a").wait()
    other = stack.enter_context(Sidecar(tmp_path / "other", f"one={tmp_path / 'one'},layout=compound"))
    mount = stack.enter_context(Mount(tmp_path / "lasting", other.address, options="entry_timeout=60,attr_timeout=60"))
    path = wait_listed(mount, "one/a") / "a-flat.vmdk"
    readers = [stack.enter_context(Reader(path)) for _ in range(3)]
    for name in list(sizes) * 15:
        with ExitStack() as paused:
            for reader in readers:  # what is open cannot be freed
                paused.enter_context(reader.turn)
            # It learns of both at once, as of one image that became another.
            other.stop_now()
            paused.callback(other.signal, signal.SIGCONT)
            client.delete("one/a", force=True)
            client.copy(f"two/{name}", "one/a").wait()
        wait_until(lambda digest=whole[name]: readers[0].last == digest, f"{name} is read:\n{log_of(mount)}")  # type: ignore[misc]
    for reader in readers:
        assert set(reader.digests) <= set(whole.values())
        assert set(reader.refused) <= _REFUSED


def test_a_listing_does_not_cut_what_is_open(sidecar: Sidecar, client: SidecarClient, tmp_path: Path) -> None:
    import_image(client, "one/a", make_disk(tmp_path / "source"), companions={"a.nvram": b"x" * 300_000})
    with Mount(tmp_path / "lasting", sidecar.address, options="entry_timeout=60,attr_timeout=60") as mount:
        path = wait_listed(mount, "one/a") / "a.nvram"
        with path.open("rb", buffering=0) as file:
            assert file.read(1000) == b"x" * 1000
            client.update_metadata("one/a", files={"a.nvram": b"y" * 500})
            wait_until(lambda: sizes_listed(path.parent)["a.nvram"] == 300_000, "it is shown as what is open")
            wait_until(lambda: is_refused(path), "the new one is in the index")
            run("ls", "-l", path.parent)
            assert file.read(500_000) == b"x" * 299_000
        assert path.read_bytes() == b"y" * 500


def test_what_is_open_is_not_cut_after_its_image_was_restored_by_a_rename(
    sidecar: Sidecar, client: SidecarClient, tmp_path: Path
) -> None:
    import_image(client, "one/a", make_disk(tmp_path / "source"), companions={"a.nvram": b"x" * 300_000})
    with Mount(tmp_path / "lasting", sidecar.address, options="entry_timeout=60,attr_timeout=60") as mount:
        image = wait_listed(mount, "one/a")
        deleted = image.parent / ".deleted" / "a"
        run("rm", "-r", image)
        with (deleted / "a.nvram").open("rb", buffering=0) as file:
            run("mv", deleted, image)
            client.update_metadata("one/a", files={"a.nvram": b"y" * 500})
            path = image / "a.nvram"
            told = f"still open in {process_name()} (pid {os.getpid()})"
            # Before, the sidecar knows that it is another file.
            wait_until(lambda: is_refused(path) and told in log_of(mount), "the new one is in the index")
            assert path.stat().st_size == 300_000
            assert file.read(500_000) == b"x" * 300_000
        wait_until(lambda: not is_refused(path), "the older one is closed")
        assert path.read_bytes() == b"y" * 500


def sizes_listed(directory: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in os.scandir(directory)}


def is_refused(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError as error:
        return error.errno == errno.ESTALE
    return False
