"""Contenders in turn: what disturbs the machine for a while meets all of them."""

from collections.abc import Callable, Mapping, Sequence

from tests.bench.command import progress

# One run: values by what was measured. Told whether it is in the first round, which is not counted, but checked.
Contender = Callable[[bool], Mapping[str, float]]


def take_turns(title: str, contenders: Mapping[str, Contender], runs: int) -> dict[str, dict[str, list[float]]]:
    """The values of each run, by contender and by what was measured."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for number in range(runs + 1):
        for name, contender in contenders.items():
            for what, value in contender(number == 0).items():
                if number:
                    values[name].setdefault(what, []).append(value)
        progress(f"{title}: {'warm-up' if number == 0 else f'run {number} of {runs}'}")
    return values


def by_measure(values: Mapping[str, Mapping[str, Sequence[float]]], what: str) -> dict[str, Sequence[float]]:
    """The values of one measure by contender, of those that have it."""
    return {name: measured[what] for name, measured in values.items() if what in measured}
