"""YAML as a config means it: 1e-3 is a number, and a key is written once."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megaqwen.errors import InputError

FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


class ConfigError(InputError):
    """All mistakes of a config, one a line."""


class ConfigLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with YAML 1.2's floats and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping, whose keys differ."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node.value, str) else None
            line = key_node.start_mark.line + 1
            if key in seen:
                problem = f"the key {key_node.value} is given twice, first in line {seen[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key:
                seen[key] = line
        return super().construct_mapping(node, deep)


class ConfigDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes the texts that `ConfigLoader` would take for numbers."""


# PyYAML follows YAML 1.1, where a float needs a dot: it reads 1e-3 as a text.
for each in (ConfigLoader, ConfigDumper):
    each.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; ConfigError where there is no such file or no mapping in it."""
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.load(text, Loader=ConfigLoader)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no config file {path}: run in the repository's top folder"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: the config file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the config file is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{yaml_problem(error)}") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: a mapping of sections is expected, such as config/config.yaml has"
        )
    return value


def yaml_problem(error: yaml.YAMLError) -> str:
    """Line, column and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{where}: {what}"


def scalar(text: str) -> Any:
    """What a text would be as a plain YAML value: "1e-3" the number, "true" the boolean."""
    try:
        value = yaml.load(text, Loader=ConfigLoader)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, bool | int | float) else text
