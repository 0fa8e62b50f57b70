"""What was measured of contenders, and what ours is to reach against the others."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.stage import OURS

COLUMNS = ("what", "how", "median", "range", "against the peers", "targets")


@dataclass(frozen=True, slots=True)
class Target:
    """A limit for what ours has: a value, or a ratio to that of `peer`. None: only to be shown."""

    limit: float | None
    at_most: bool
    peer: str = ""

    def verdict(self, value: float) -> str:
        if self.limit is None:
            return ""
        reached = value <= self.limit if self.at_most else value >= self.limit
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}: {'reached' if reached else 'missed'}"


def at_most(limit: float, peer: str = "") -> Target:
    return Target(limit, at_most=True, peer=peer)


def at_least(limit: float, peer: str = "") -> Target:
    return Target(limit, at_most=False, peer=peer)


def shown_against(peer: str) -> Target:
    return Target(None, at_most=True, peer=peer)


@dataclass(frozen=True, slots=True)
class Result:
    """One measure: the values of each run by contender."""

    what: str
    values: Mapping[str, Sequence[float]]
    shown: Callable[[float], str]
    targets: Sequence[Target] = ()
    ours: str = OURS

    def rows(self) -> list[list[str]]:
        """A row for each contender, the verdicts in that of ours."""
        rows = []
        for how, values in self.values.items():
            against = verdicts = ""
            if how == self.ours:
                ratios = {target: self._ratio(target) for target in self.targets}
                against = ", ".join(f"{ratio:.3g} of {target.peer}" for target, ratio in ratios.items() if target.peer)
                verdicts = ", ".join(filter(None, (target.verdict(ratio) for target, ratio in ratios.items())))
            spread = f"{self.shown(min(values))} to {self.shown(max(values))}" if len(values) > 1 else ""
            rows.append([self.what, how, self.shown(statistics.median(values)), spread, against, verdicts])
        return rows

    def _ratio(self, target: Target) -> float:
        ours = statistics.median(self.values[self.ours])
        return ours / statistics.median(self.values[target.peer]) if target.peer else ours


def seconds(value: float) -> str:
    return f"{value:.3f} s"


def throughput(value: float) -> str:
    """Of bytes in a second."""
    return f"{value / 1024**3:.2f} GiB/s"


def operations(value: float) -> str:
    """Of operations in a second."""
    return f"{value / 1000:.0f} k/s"


def mebibytes(value: float) -> str:
    return f"{value:.0f} MiB"


def jiffies(value: float) -> str:
    return f"{value:.1f} jiffies"
