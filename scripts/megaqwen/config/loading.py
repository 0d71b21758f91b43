"""From YAML files to a validated Config, with every mistake reported in one pass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megaqwen.config.sections import Config
from megaqwen.errors import InputError

DEFAULT_CONFIG = Path("config/config.yaml")


class ConfigError(InputError):
    """All mistakes of a config, one a line."""


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; ConfigError where there is no such file or no mapping in it."""
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}: run in the repository's top folder")
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a mapping of sections is expected")
    return value


def merge_overlay(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overlay` laid over it, mapping by mapping; lists and scalars are replaced.

    A mapping whose `source` the overlay changes is replaced whole: a Hub model does not inherit the
    fields of a tiny one. A value of None removes the key.
    """
    merged = dict(base)
    for key, value in overlay.items():
        earlier = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif (
            isinstance(value, Mapping)
            and isinstance(earlier, Mapping)
            and value.get("source", earlier.get("source")) == earlier.get("source")
        ):
            merged[key] = merge_overlay(earlier, value)
        else:
            merged[key] = value
    return merged


def validate_config(values: Mapping[str, Any]) -> Config:
    """The Config of a merged mapping; ConfigError with all mistakes at once."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(str(error)) from error


def load_config(path: Path, overlay: Mapping[str, Any] | None = None) -> Config:
    """Read, merge and validate.

    Args:
        path: The base file.
        overlay: What Snakemake gathered from `--configfile` and `--config`.
    """
    return validate_config(merge_overlay(read_yaml(path), overlay or {}))
