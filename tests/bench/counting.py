"""What a sidecar asks its server for, counted by the server."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.support.processes import wait_until
from tests.support.vcsim import STATUS_REQUESTS, Vcsim

COLUMNS = ("what", "requests", "calls", "looks at tasks", "of files", "which")
_LOOKS, _FILES = "RetrievePropertiesEx Task", " /folder"
_QUIET_SECONDS = 0.4


@dataclass(frozen=True, slots=True)
class Counted:
    what: str
    requests: Mapping[str, int]

    def row(self) -> list[str]:
        calls = {name: n for name, n in self.requests.items() if name != _LOOKS and not name.endswith(_FILES)}
        files = {name: n for name, n in self.requests.items() if name.endswith(_FILES)}
        numbers = (sum(self.requests.values()), sum(calls.values()), self.requests.get(_LOOKS, 0), sum(files.values()))
        told = {name.removesuffix("_Task").removesuffix(_FILES): n for name, n in sorted((calls | files).items())}
        which = ", ".join(f"{n} {name}" if n > 1 else name for name, n in told.items())
        return [self.what, *map(str, numbers), which]


def settled(simulator: Vcsim) -> Counter[str]:
    """When nothing was asked for a moment."""
    while True:
        before = simulator.requests()
        time.sleep(_QUIET_SECONDS)
        if simulator.requests() == before:
            return before


def without_status(requests: Counter[str]) -> Counter[str]:
    """Without the looks at the datastores' state, which come as time goes by."""
    return Counter({name: n for name, n in requests.items() if name not in STATUS_REQUESTS})


def count(simulator: Vcsim, operation: Callable[[], object]) -> Counter[str]:
    """What an operation asks for, with what follows from it. Begun just after a look at the datastores' state."""
    seen = simulator.requests()["RefreshDatastore"]
    wait_until(lambda: simulator.requests()["RefreshDatastore"] > seen, "the state is looked at")
    before = settled(simulator)
    operation()
    return settled(simulator) - before


def least(counts: Sequence[Counter[str]]) -> Counter[str]:
    return min(counts, key=lambda each: each.total())
