"""Which numbers a setting takes, written as an interval: "[1, inf)", "(0, 1]", or "-1 or [1, inf)"."""

from __future__ import annotations

import sys
from typing import Any

FINITE = "(-inf, inf)"
_LARGEST: dict[type, float] = {int: 2**53, float: sys.float_info.max}


def out_of_range(value: Any, kind: type, interval: str = FINITE) -> str | None:
    """What is wrong with a value that should be a number of an interval; None if nothing is.

    Args:
        kind: int (whole numbers alone) or float (whole ones too). A bool is neither.
    """
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return f"must be a {'whole ' * (kind is int)}number, got {value!r:.60}"
    if not -_LARGEST[kind] <= value <= _LARGEST[kind]:
        return f"must be {'finite' if kind is float else f'in [-{_LARGEST[int]}, {_LARGEST[int]}]'}, got {value!r:.60}"
    choices = interval.split(" or ")
    if any(_holds(choice, value) for choice in choices):
        return None
    wanted = "not be negative" if interval == "[0, inf)" else f"be {' or '.join(map(_words, choices))}"
    return f"must {wanted}, got {value!r:.60}"


def _holds(choice: str, value: float) -> bool:
    if choice[0] not in "([":
        return value == float(choice)
    low, high = map(float, choice[1:-1].split(","))
    above = value > low if choice[0] == "(" else value >= low
    return above and (value < high if choice[-1] == ")" else value <= high)


def _words(choice: str) -> str:
    low, _, high = choice[1:-1].partition(", ")
    if choice[0] not in "([":
        return choice
    if high != "inf":
        return f"in {choice}"
    return f"{'above' if choice[0] == '(' else 'at least'} {low}"
