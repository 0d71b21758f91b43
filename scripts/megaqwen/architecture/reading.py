"""Values of a config.json, read with the mistakes that a person can mend."""

from collections.abc import Mapping
from typing import Any

from megaqwen.errors import InputError

Facts = Mapping[str, Any]


def given(facts: Facts) -> dict[str, Any]:
    """The keys whose value is not null."""
    return {key: value for key, value in facts.items() if value is not None}


def positive(facts: Facts, key: str) -> int:
    """A whole number above zero; InputError where there is none."""
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = f"{value!r}" if key in facts else "missing"
        raise InputError(f"config.json: {key} is {found}: a whole number above zero is expected")
    return value


def above_zero(facts: Facts, key: str) -> float:
    """A number above zero; InputError where there is none."""
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        found = f"{value!r}" if key in facts else "missing"
        raise InputError(f"config.json: {key} is {found}: a number above zero is expected")
    return float(value)
