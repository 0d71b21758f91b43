"""A config's section `sweep`: the runs that it names, and what each of them lays over the config."""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megaqwen.config.mistakes import Mistake, mistakes_of
from megaqwen.config.reading import ConfigError
from megaqwen.config.sections import Sweep
from megaqwen.provenance import digest

MOST_RUNS = 10_000
LONGEST_NAME = 120  # characters; logs and temporary files add to it
NOT_IN_NAMES = re.compile(r"[^\w.-]+")
OWN = ("run", "results", "sweep")  # keys that all runs of a sweep have in common

Overlay = dict[str, Any]


def sweep_of(section: Any) -> Sweep:
    """The section of a merged config; ConfigError with all that is wrong with it."""
    try:
        sweep = Sweep.model_validate(section)
    except ValidationError as error:
        found = mistakes_of(error, Sweep.model_json_schema())
        raise sweep_error([of_section(each) for each in found]) from None
    if mistakes := list(sweep_mistakes(sweep)):
        raise sweep_error(mistakes)
    return sweep


def of_section(mistake: Mistake) -> Mistake:
    """A mistake of the section, by its path in the config."""
    path = ("sweep", *mistake.path)
    if path[-1] == "[key]":  # pydantic's word for a key itself
        return Mistake(path[:-1], "is no name of letters, digits, '.', '_' and '-'")
    return Mistake(path, mistake.text)


def sweep_error(mistakes: list[Mistake]) -> ConfigError:
    """The error of a section with mistakes."""
    return ConfigError("\n    ".join(["the sweep cannot be made:", *map(str, mistakes)]))


def sweep_mistakes(sweep: Sweep) -> Iterator[Mistake]:
    """What its types alone do not say."""
    count = max(1, len(sweep.runs)) * math.prod(len(values) for values in sweep.grid.values())
    if count > MOST_RUNS:
        yield Mistake(("sweep",), f"these are {count:,} runs, and at most {MOST_RUNS:,} are made")
    for key, values in sweep.grid.items():
        where = ("sweep", "grid", key)
        if key.partition(".")[0] in OWN:
            yield Mistake(where, "is what the runs of a sweep have in common: leave it out")
        texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
        if not values:
            yield Mistake(where, "has no value: name at least one")
        elif again := next((text for text in texts if texts.count(text) > 1), None):
            yield Mistake(where, f"has {again} twice")
    for name, overlay in sweep.runs.items():
        for key in sorted(set(OWN) & set(overlay)):
            text = "is what the runs of a sweep have in common: leave it out"
            yield Mistake(("sweep", "runs", name, key), text)


def overlays(sweep: Sweep, name: str) -> dict[str, Overlay]:
    """What each run of a sweep lays over the config, by the run's name.

    A name tells the values, so that a value more in a grid renames no run that is there.

    Args:
        sweep: Checked.
        name: The config's own `run`, with which each run's name begins.

    Raises:
        ConfigError: Two runs would have one name.
    """
    keys = tuple(sweep.grid)
    found: dict[str, Overlay] = {}
    for chosen, overlay in (sweep.runs or {"": {}}).items():
        for values in itertools.product(*sweep.grid.values()):
            point = dict(zip(keys, values, strict=True))
            words = [name, *([chosen] if chosen else []), *value_words(point)]
            run = ".".join(words)
            if len(run) > LONGEST_NAME:
                run = ".".join([name, digest([chosen, point])])
            if run in found:
                text = f"two runs would be named {run}: give them names under sweep.runs"
                raise sweep_error([Mistake(("sweep", "grid"), text)])
            found[run] = with_values(overlay, point)
    return found


def value_words(point: Mapping[str, Any]) -> Iterator[str]:
    """The part of a run's name for each key of a grid: `lr-0.001`."""
    lasts = [key.rpartition(".")[2] for key in point]
    for (key, value), last in zip(point.items(), lasts, strict=True):
        label = last if lasts.count(last) == 1 else key
        plain = not isinstance(value, list | dict)
        text = json.dumps(value, default=str).strip('"') if plain else digest(value)[:8]
        yield NOT_IN_NAMES.sub("-", f"{label}-{text}")


def with_values(overlay: Mapping[str, Any], point: Mapping[str, Any]) -> Overlay:
    """An overlay with the values of keys that have dots in them, such as `train.lr`."""
    whole: Overlay = dict(overlay)
    for key, value in point.items():
        inside = whole
        *sections, last = key.split(".")
        for section in sections:
            there = inside.get(section)
            inside[section] = dict(there) if isinstance(there, Mapping) else {}
            inside = inside[section]
        inside[last] = value
    return whole


def flattened(overlay: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of an overlay by their keys with dots."""
    for key, value in overlay.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
