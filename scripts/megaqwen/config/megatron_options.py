"""Megatron's options under their own names, checked without importing Megatron.

megatron_options.json lists what the pinned wheel's real parser takes (`scripts/generate_config.py`
writes it). An option is named by its dest or by any of its flags, so `apply_rope_fusion: false` and
`no_rope_fusion: true` are the same; the canonical form is the dest with the dest's value.
"""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from megaqwen.config.managed_options import reason_not_to_set
from megaqwen.config.mistakes import Mistake, did_you_mean, listed, shown

OPTIONS_FILE = Path(__file__).with_name("megatron_options.json")
REQUIRED = (
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "lr",
    "save_interval",
)
# Where a config leaves these out, training/arguments.py has another default than Megatron's parser.
OWN_DEFAULTS = (
    "no_persist_layer_norm",
    "gradient_accumulation_fusion",
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "bias_swiglu_fusion",
    "bias_dropout_fusion",
    "overlap_p2p_comm",
    "eval_interval",
    "use_transformer_engine_op_fuser",
)

Option = Mapping[str, Any]


class WrongValue(Exception):
    """A value that an option does not take: what is allowed instead."""

    def __init__(self, allowed: str, wants_text: bool = False):
        super().__init__(allowed)
        self.wants_text = wants_text


@cache
def megatron_options() -> dict[str, dict[str, Any]]:
    """Every option of Megatron's parser by its dest: see `parser_options` for the entries."""
    options: dict[str, dict[str, Any]] = json.loads(OPTIONS_FILE.read_text(encoding="utf-8"))
    return options


def flags(option: Option) -> list[str]:
    """All of an option's flags."""
    return [*option.get("flags", ()), *option.get("on", ()), *option.get("off", ())]


def name_of_flag(flag: str) -> str:
    """A flag as a key of a config: without leading dashes, words joined by underscores."""
    return flag.lstrip("-").replace("-", "_")


@cache
def option_names() -> dict[str, tuple[str, bool]]:
    """Every name that an option has: its dest, and whether the name says the opposite of the dest.

    Where one option's dest is another's flag, the name means the dest.
    """
    names = {dest: (dest, False) for dest in megatron_options()}
    for dest, option in megatron_options().items():
        for flag in flags(option):
            names.setdefault(name_of_flag(flag), (dest, flag in option.get("off", ())))
    return names


@cache
def settable_names() -> dict[str, tuple[str, bool]]:
    """`option_names` of the options that a config may set."""
    options = megatron_options()
    return {
        name: (dest, opposite)
        for name, (dest, opposite) in option_names().items()
        if reason_not_to_set(dest, options[dest]) is None
    }


def validate_train_options(
    options: Mapping[str, object],
) -> tuple[dict[str, object], list[Mistake]]:
    """The options by their dests with values of the parser's types, and what is wrong with them.

    Args:
        options: The config's `train` section.

    Returns:
        The canonical options, without those that have mistakes; and the mistakes.
    """
    canonical: dict[str, object] = {}
    given_as: dict[str, str] = {}
    mistakes: list[Mistake] = []

    def mistake(key: str, text: str) -> None:
        mistakes.append(Mistake(("train", key), text))

    for key, value in options.items():
        name = str(key)
        if name not in option_names():
            hint = did_you_mean(name, settable_names())
            mistake(name, f"Megatron has no such option{hint}")
            continue
        dest, opposite = option_names()[name]
        option = megatron_options()[dest]
        reason = reason_not_to_set(dest, option)
        if reason:
            mistake(name, f"leave it out: {reason}")
        elif dest in given_as:
            mistake(name, f"is the same option as train.{given_as[dest]}: give one of them")
        else:
            given_as[dest] = name
            try:
                canonical[dest] = canonical_value(option, value, opposite)
            except WrongValue as error:
                text = f"{shown(value)} is given, {error}"
                mistakes.append(Mistake(("train", name), text, wants_text=error.wants_text))
    missing = [dest for dest in REQUIRED if dest not in given_as]
    mistakes += [
        Mistake(("train", dest), "is missing: every run has to say it") for dest in missing
    ]
    return canonical, mistakes


def canonical_value(option: Option, value: object, opposite: bool = False) -> object:
    """`value` as the option's dest has it after parsing; WrongValue says what is allowed."""
    if option["type"] == "bool":
        if not isinstance(value, bool):
            raise WrongValue("true or false is allowed")
        return checked_bool(option, value is not opposite)
    nargs = option.get("nargs")
    if nargs is None:
        return checked_scalar(option, value)
    items = value if isinstance(value, list | tuple) else [value]
    if isinstance(nargs, int) and len(items) != nargs:
        raise WrongValue(f"a list of {nargs} values is allowed")
    if nargs == "+" and not items and option["default"] != []:
        raise WrongValue("a list of one or more values is allowed")
    return [checked_scalar(option, item) for item in items]


def checked_bool(option: Option, value: bool) -> bool:
    """`value`, if a flag says it or if it is so without one."""
    if "flags" in option or option["on" if value else "off"] or bool(option["default"]) is value:
        return value
    only = str(not value).lower()
    raise WrongValue(f"but Megatron has no flag for it: only {only} can be set")


def checked_scalar(option: Option, value: object) -> object:
    """One value of the option's type; an int where a float is meant becomes one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match option["type"]:
        case "float":
            if not number or not math.isfinite(value):  # type: ignore[arg-type]
                raise WrongValue("a number is allowed")
            value = float(value)  # type: ignore[arg-type]
        case "int" if not number or isinstance(value, float):
            raise WrongValue("a whole number is allowed")
        case "str" if not isinstance(value, str) and "choices" not in option:
            hint = ": put it in quotes" if number else ""
            raise WrongValue(f"a text is allowed{hint}", wants_text=True)
        case "pattern" if not number and not isinstance(value, str | list):
            raise WrongValue("a whole number or a list expression such as ([0]+[1]*23) is allowed")
        case "int_tuple" if not isinstance(value, list | tuple):
            raise WrongValue("a list of whole numbers is allowed")
    choices = option.get("choices")
    if choices is not None and value not in choices:
        raise WrongValue(f"{listed(choices)} is allowed{did_you_mean(value, choices)}")
    return value


def without_defaults(canonical: Mapping[str, object]) -> dict[str, object]:
    """The options that say something: without those that repeat the default of Megatron's parser.

    Those in OWN_DEFAULTS always say something.
    """
    return {
        dest: value
        for dest, value in canonical.items()
        if dest in OWN_DEFAULTS or value != megatron_options()[dest]["default"]
    }


def to_arguments(canonical: Mapping[str, object]) -> list[str]:
    """The words of a command line that Megatron's parser parses back into these values.

    Args:
        canonical: Options by their dests, also those that a config may not set; None leaves one
            out.

    Raises:
        ValueError: An option that Megatron does not have, or a value that no flag says.
    """
    words: list[str] = []
    for dest, value in canonical.items():
        option = megatron_options().get(dest)
        if option is None:
            raise ValueError(f"Megatron has no option {dest}")
        if value is None:
            continue
        try:
            words += option_words(option, canonical_value(option, value))
        except WrongValue as error:
            raise ValueError(f"{dest}: {shown(value)} is given, {error}") from error
    return words


def option_words(option: Option, value: object) -> list[str]:
    """The words that set one option to its canonical value."""
    if option["type"] == "bool" and "flags" not in option:
        words: list[str] = option["on" if value else "off"][:1]
        return [] if option["default"] is value else words
    flag = option["flags"][0]
    if "nargs" in option:
        assert isinstance(value, list)
        return [flag, *(word(option, item) for item in value)] if value else empty(option)
    if option["type"] == "bool":  # the parser calls bool() on the text: only an empty one is False
        return [f"{flag}={'True' if value else ''}"]
    return [f"{flag}={word(option, value)}"]


def empty(option: Option) -> list[str]:
    """The words for a list of nothing."""
    return option["flags"][:1] if option["nargs"] == "*" else []


def word(option: Option, value: object) -> str:
    """One value as the option's converter in the parser reads it."""
    if isinstance(value, list | tuple):
        values = ",".join(str(item) for item in value)
        return values if option["type"] == "int_tuple" else f"[{values}]"
    if isinstance(value, float) and "nargs" in option:
        return format(Decimal(repr(value)), "f")  # in a list, argparse takes -1e-05 for a flag
    return str(value)
