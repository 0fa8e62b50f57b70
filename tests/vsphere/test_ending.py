"""The end of a sidecar with several servers."""

import threading
from pathlib import Path

import pytest

from sidecar.config import Flags, load_config
from sidecar.vsphere.connection import Connection
from sidecar.wiring import build


def test_the_servers_are_left_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may take some seconds."""
    together = threading.Barrier(2, timeout=10)
    met: list[int] = []
    monkeypatch.setattr(Connection, "close", lambda self: met.append(together.wait()))
    toml = ""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        toml += f'[vsphere.{name}]\naddress = "127.0.0.1:1"\ncredentials_file = "/none"\n'
        toml += (
            f'[datastore.{name}]\npath = "{tmp_path / name}"\ntype = "vsphere"\nserver = "{name}"\nlocks = "flock"\n'
        )
    file = tmp_path / "images.toml"
    file.write_text(toml)
    build(load_config(file, {}, Flags(listen="localhost:0"))).close()
    assert sorted(met) == [0, 1]
