"""The search says what trying every order says."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chaos.effects import Candidates, publishes, sees, turns
from tests.chaos.reading import ABSENT, DELETED, VALID
from tests.chaos.register import State, Step, contradiction, is_possible

_KINDS = {
    "publish 1": publishes(Candidates(frozenset([1]), frozenset([0]), False, False), over_wreck=False, unknown=False),
    "publish 2": publishes(Candidates(frozenset([2]), frozenset([0]), False, False), over_wreck=False, unknown=False),
    "delete": turns({VALID: (DELETED,)}),
    "restore or there": turns({DELETED: (VALID,), VALID: (VALID,)}),
    "force": turns({VALID: (ABSENT,), DELETED: (ABSENT,)}),
    "read 1": sees(VALID, contents=[1]),
    "touch": sees(VALID),
    "not found": sees(ABSENT),
}
_LOOKING = ("touch", "not found")


def step(number: int, kind: str, begin: float, end: float, *, optional: bool = False) -> Step:
    end = math.inf if optional else end
    return Step(number, begin, end, _KINDS[kind], only_looks=kind in _LOOKING, key=kind, optional=optional)


def by_trying_all(steps: list[Step]) -> bool:
    required = [one for one in steps if not one.optional]
    optional = [one for one in steps if one.optional]
    for count in range(len(optional) + 1):
        for chosen in itertools.combinations(optional, count):
            for order in itertools.permutations([*required, *chosen]):
                late = any(after.end < before.begin for before, after in itertools.combinations(order, 2))
                if not late and leads_somewhere(order):
                    return True
    return False


def leads_somewhere(order: tuple[Step, ...]) -> bool:
    states = {State()}
    for one in order:
        states = {after for state in states for after in one.effect(state)}
    return bool(states)


_STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(_KINDS)), st.integers(0, 8), st.integers(0, 4), st.booleans()), max_size=6
)


@settings(max_examples=400, deadline=None)
@given(_STEPS)
def test_the_search_finds_an_order_when_there_is_one(drawn: list[tuple[str, int, int, bool]]) -> None:
    steps = [
        step(number, kind, begin, begin + length, optional=optional and kind not in _LOOKING)
        for number, (kind, begin, length, optional) in enumerate(drawn, 1)
    ]
    assert is_possible(steps) == by_trying_all(steps)


def test_a_contradiction_is_told_in_few_operations() -> None:
    steps = [
        step(1, "publish 1", 0, 1),
        step(2, "touch", 2, 3),
        step(3, "delete", 4, 5),
        step(4, "restore or there", 6, 7),
        step(5, "publish 2", 8, 9),
        step(6, "touch", 10, 11),
    ]
    assert is_possible(steps) is False
    # A second publish, and nothing that removed what was there.
    assert contradiction(steps) == [1, 5]


def test_who_cannot_find_out_says_so() -> None:
    steps = [step(number, "force", 0, 1, optional=True) for number in range(3)] + [step(9, "touch", 2, 3)]
    assert is_possible(steps, budget=0) in (None, False)
