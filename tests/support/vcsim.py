"""A real vSphere API server for tests, with directories of ours as its datastores. See scripts/vcsim."""

import contextlib
import json
import select
import signal
import ssl
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.processes import stop_now

SCRIPT = Path(__file__).parents[2] / "scripts" / "vcsim"
USER, PASSWORD = "administrator@vsphere.local", "simulated-secret"
# What looks at the state of a datastore, as a sidecar does now and then.
STATUS_REQUESTS = frozenset({"RetrievePropertiesEx Folder", "RetrievePropertiesEx Datastore", "RefreshDatastore"})
# The first start builds it, unless scripts/test has done so.
_START_SECONDS = 110


class Vcsim:
    """The simulator in a process of its own. `kind`: vcenter or host; `delays`: milliseconds by method.

    `certificate`: a file that has its key too. `types`: VMFS or NFS by datastore, each named as its directory.
    """

    def __init__(
        self,
        directory: Path,
        datastores: Mapping[str, Path],
        *,
        kind: str = "vcenter",
        delays: Mapping[str, int] | None = None,
        copy_seconds: float = 0,
        certificate: Path | None = None,
        types: Mapping[str, str] | None = None,
        datacenters: int = 1,
        folders: int = 0,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / "vcsim.log"
        self.credentials = directory / "credentials"
        self.credentials.write_text(f"{USER}:{PASSWORD}\n")
        self.port = 0
        self._options: Sequence[str] = [
            *(f"-datacenters={datacenters}", f"-folders={folders}"),
            *(f"-kind={kind}", f"-login={USER}:{PASSWORD}", f"-copy-seconds={copy_seconds}"),
            *([f"-certificate={certificate}"] if certificate else []),
            *(f"-datastore={name}={path}{_type(types, name)}" for name, path in datastores.items()),
            *(f"-delay={method}={milliseconds}" for method, milliseconds in (delays or {}).items()),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Also after it ended; at the same port then."""
        listen = f"-listen=127.0.0.1:{self.port}"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [SCRIPT, listen, *self._options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        try:
            ready, _, _ = select.select([self.process.stdout], [], [], _START_SECONDS)
            address = self.process.stdout.readline().decode() if ready else ""
            assert address.startswith("https://127.0.0.1:"), f"the simulator did not start:\n{self.log.read_text()}"
        except BaseException:
            self.kill()
            raise
        self.port = int(address.removeprefix("https://127.0.0.1:").removesuffix("/sdk\n"))
        return self

    def configuration(self, timeout: float = 30.0) -> str:
        """A sidecar's, of this server by the name of sim."""
        return (
            f'[vsphere.sim]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
            f'credentials_file = "{self.credentials}"\ntimeout_seconds = {timeout}\n'
        )

    def requests(self) -> Counter[str]:
        """What it was asked since its start; see tests/vcsim/requests.go."""
        url, context = f"https://127.0.0.1:{self.port}/requests", ssl._create_unverified_context()
        with urllib.request.urlopen(url, timeout=10, context=context) as answer:
            return Counter(json.load(answer))

    def kill(self) -> None:
        """kill -9, and waits until it is gone."""
        assert self.process is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """It answers nothing for the time of the block; the kernel still accepts connections for it."""
        assert self.process is not None
        stop_now(self.process)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


def _type(types: Mapping[str, str] | None, name: str) -> str:
    return f",type={types[name]}" if types and name in types else ""
