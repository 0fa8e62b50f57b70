"""The rules of the mount, tests/mount, on the datastores of a vCenter by its API alone: what makes images, and what
takes them away."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import LAYOUTS
from tests.support.choosing import is_named, keep
from tests.support.processes import Sidecar
from tests.support.vcsim import Vcsim

# What the API does not tell or do, by test; a word in brackets: with this parameter only.
NOT_BY_API = {
    "test_cp_is_an_image_copy[source]": "counts allocated bytes: what is a hole the server does not tell",
}


@pytest.fixture
def sidecar(tmp_path: Path, stack: ExitStack) -> Sidecar:
    roots = {name: tmp_path / name for name in ("one", "two", "three")}
    for root in roots.values():
        root.mkdir()
    simulator = stack.enter_context(Vcsim(tmp_path / "vcsim", roots))
    config = simulator.configuration()
    for name, layout in zip(roots, LAYOUTS, strict=True):
        config += f'[datastore.{name}]\ntype = "vsphere"\nserver = "sim"\nlayout = "{layout}"\n'
        config += "rescan_seconds = 0.5\nreserve = 0\n"
    return stack.enter_context(Sidecar(tmp_path / "run", config=config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep(config, items, lambda item: item.path.parent != Path(__file__).parent or not is_named(item, NOT_BY_API))
