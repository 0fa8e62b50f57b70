"""Which tests of a suite that runs in several places run in one of them."""

from collections.abc import Callable

import pytest


def keep(config: pytest.Config, items: list[pytest.Item], runs: Callable[[pytest.Function], bool]) -> None:
    """Takes out of the collected items those that do not run."""
    left_out = [item for item in items if isinstance(item, pytest.Function) and not runs(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def is_named(item: pytest.Function, names: dict[str, str]) -> bool:
    """Whether it is in the table, alone or, in brackets, with one of its parameters."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    name = item.originalname
    return name in names or any(f"{name}[{value}]" in names for value in parameters)
