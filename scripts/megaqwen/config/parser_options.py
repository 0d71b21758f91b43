"""The options of Megatron's real argument parser as plain data, for megatron_options.json.

Heavy: it imports Megatron. Only `scripts/generate_config.py` and tests use it.
"""

import argparse
import enum
import json
import os
from typing import Any

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

from megatron.core.transformer.enums import CudaGraphModule
from megatron.training.arguments import add_megatron_arguments

# Megatron's own converters, by their names, and what we call the values that they take.
CONVERTERS = {
    "moe_freq_type": "pattern",
    "no_rope_freq_type": "pattern",
    "la_freq_type": "pattern",
    "tuple_type": "int_tuple",
    "enum_type_handler": "enum",
    "_parse_cuda_graph_modules_arg": "enum",
}
PLAIN_TYPES = {int: "int", float: "float", str: "str", None: "str", bool: "bool"}


def megatron_parser() -> argparse.ArgumentParser:
    """The parser that Megatron itself builds in `parse_args`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    return add_megatron_arguments(parser)


def parser_options() -> dict[str, dict[str, Any]]:
    """Every option by its dest, in the parser's order.

    Each has `group`, `type` (bool, int, float, str, enum, pattern or int_tuple), `default`, `help`.
    A bool has `on` and `off`, the flags that set it; the others have `flags`, and `choices` and
    `nargs` where the parser has them.
    """
    options: dict[str, dict[str, Any]] = {}
    for group in megatron_parser()._action_groups:
        for action in group._group_actions:
            entry = describe_action(action) | {"group": group.title}
            if action.dest in options:
                for side in ("on", "off"):
                    options[action.dest][side] += entry[side]
            else:
                options[action.dest] = entry
    return options


def describe_action(action: argparse.Action) -> dict[str, Any]:
    """One action of the parser as JSON values."""
    help_text = " ".join((action.help or "").replace("%%", "%").split())
    default = plain(action.default)
    flags = list(action.option_strings)
    if action.nargs == 0:
        on, off = flag_sides(action)
        return {"type": "bool", "on": on, "off": off, "default": default, "help": help_text}
    entry: dict[str, Any] = {"type": type_name(action), "flags": flags, "default": default}
    if action.choices is not None:
        entry["choices"] = [plain(choice) for choice in action.choices]
    elif action.dest in ("cuda_graph_modules", "cuda_graph_scope_deprecated"):
        entry["choices"] = [module.name for module in CudaGraphModule]
    if action.nargs is not None:
        entry["nargs"] = action.nargs
    return entry | {"help": help_text}


def flag_sides(action: argparse.Action) -> tuple[list[str], list[str]]:
    """The flags of a valueless action that set its dest to True, and those that set it to False."""
    flags = list(action.option_strings)
    if isinstance(action, argparse.BooleanOptionalAction):
        off = [flag for flag in flags if flag.startswith("--no-")]
        return [flag for flag in flags if flag not in off], off
    if isinstance(action.const, bool):
        return (flags, []) if action.const else ([], flags)
    raise ValueError(f"{flags}: an action that is not known here: {type(action).__name__}")


def type_name(action: argparse.Action) -> str:
    """What we call the values of an action that takes some."""
    if action.type in PLAIN_TYPES:
        return PLAIN_TYPES[action.type]  # type: ignore[index]
    name = getattr(action.type, "__name__", str(action.type))
    if name not in CONVERTERS:
        raise ValueError(f"{action.option_strings}: a converter that is not known here: {name}")
    return CONVERTERS[name]


def plain(value: Any) -> Any:
    """A default or choice as JSON: enums by name, tuples as lists."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def options_json() -> str:
    """megatron_options.json: one option a line."""
    lines = [
        f"{json.dumps(dest)}: {json.dumps(entry, ensure_ascii=False)}"
        for dest, entry in parser_options().items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"
