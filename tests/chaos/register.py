"""The exact search: is there an order of the operations on one name that explains every answer, and keeps to real time?

A name is a register. Each operation takes effect at one moment between its beginning and its answer; one without an
answer may take effect at any moment after its beginning, or never. When no order explains the answers, a promise is
broken, and the search says which operations cannot have been.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tests.chaos.reading import ABSENT

# How many states of the search are looked at, before it gives up: to decide, and to make a contradiction smaller.
BUDGET, SMALL_BUDGET = 200_000, 10_000


@dataclass(frozen=True, slots=True)
class State:
    """What is under the name. `contents` and `updates`: what the disk and the metadata may be, one of each."""

    status: str = ABSENT
    contents: frozenset[int] = frozenset()
    updates: frozenset[int | None] = frozenset()


Effect = Callable[[State], Sequence[State]]
"""The states that the operation may leave, from the one that it finds; none when it cannot have found that one."""


@dataclass(frozen=True, slots=True)
class Step:
    """`operation`: its id, for the report. `key`: two optional steps of the same key do the same.

    `only_looks`: it changes nothing, whatever it finds.
    """

    operation: int
    begin: float
    end: float
    effect: Effect
    only_looks: bool = False
    key: str = ""
    optional: bool = False


def weakened(step: Step) -> Step:
    """As if there had been no answer: what is impossible with this, is with the step."""
    return replace(step, end=math.inf, key=f"{step.operation}", optional=True)


def is_possible(steps: Sequence[Step], start: State | None = None, budget: int = BUDGET) -> bool | None:
    """None when that was not found out within the budget."""
    steps = sorted(steps, key=lambda step: (step.begin, step.end))
    required = sum(1 << index for index, step in enumerate(steps) if not step.optional)
    everything = (1 << len(steps)) - 1
    first = (0, start or State())
    seen = {first}
    stack = [first]
    while stack:
        done, state = stack.pop()
        if done & required == required:
            return True
        if len(seen) > budget:
            return None
        for node in _next(steps, everything & ~done, required, done, state):
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return False


def _next(steps: list[Step], left: int, required: int, done: int, state: State) -> list[tuple[int, State]]:
    horizon = min((steps[index].end for index in _indices(left & required)), default=math.inf)
    found: list[tuple[int, State]] = []
    keys = set()
    for index in _indices(left):
        step = steps[index]
        if step.begin > horizon:
            break
        if step.optional:
            # Of those that do the same, the one that may come first: the others may come whenever it may.
            if step.key in keys:
                continue
            keys.add(step.key)
        for after in step.effect(state):
            node = (done | 1 << index, after)
            if after == state:
                if step.optional:
                    continue
                # What it says is true now, and it leaves all as it is: no order is lost when it comes here.
                if step.only_looks:
                    return [node]
            found.append(node)
    return found[::-1]  # the earlier first


def _indices(mask: int) -> list[int]:
    found = []
    while mask:
        lowest = mask & -mask
        found.append(lowest.bit_length() - 1)
        mask ^= lowest
    return found


def contradiction(steps: Sequence[Step]) -> list[int]:
    """Of steps that are not possible: operations that contradict each other by themselves, as few as can be had.

    Every other one may be taken for unanswered, and there is still no order.
    """
    left = list(steps)
    for index in sorted(range(len(left)), key=lambda index: -left[index].end):
        if left[index].optional:
            continue
        weaker = [*left[:index], weakened(left[index]), *left[index + 1 :]]
        if is_possible(weaker, budget=SMALL_BUDGET) is False:
            left = weaker
    return sorted({step.operation for step in left if not step.optional})
