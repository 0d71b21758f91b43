"""The texts of a conversation kept apart from special tokens, by a character that none of them has."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from megaqwen.errors import InputError

NONCHARACTERS = [chr(point) for point in range(0xFDD0, 0xFDF0)]


def broken(text: str, tokens: re.Pattern[str], character: str) -> str:
    """A text in which no token stands any more."""
    return tokens.sub(lambda found: f"{found[0][:1]}{character}{found[0][1:]}", text)


def unused_character(value: Any) -> str:
    """A character that no text of a value has."""
    text = json.dumps(value, ensure_ascii=False)
    for character in NONCHARACTERS:
        if character not in text:
            return character
    raise InputError("it has every one of Unicode's noncharacters: leave it out")


def holds(value: Any, test: Callable[[str], bool]) -> bool:
    """Whether a text anywhere in a value passes a test."""
    if isinstance(value, str):
        return test(value)
    if isinstance(value, Mapping):
        return any(holds(key, test) or holds(each, test) for key, each in value.items())
    return isinstance(value, list) and any(holds(each, test) for each in value)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): with_texts(each, change) for key, each in value.items()}
    return [with_texts(each, change) for each in value] if isinstance(value, list) else value
