"""JSON as the standard has it, and as every program reads it."""

import json
import math
from typing import Any, NoReturn


def parse_json(text: str | bytes) -> Any:
    """What the text, in UTF-8, says; ValueError for any text that is not JSON.

    That is also NaN and Infinity, which Python would take and write again, and a number that would become one of them.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number
