"""From YAML files to a validated Config, with every mistake reported in one pass."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaqwen.config.blends import data_mistakes
from megaqwen.config.checks import model_mistakes
from megaqwen.config.combinations import checkpoint_mistakes, train_mistakes
from megaqwen.config.megatron_options import validate_train_options
from megaqwen.config.mistakes import Mistake, mistakes_of
from megaqwen.config.packed_options import packed_mistakes
from megaqwen.config.reading import ConfigError, read_yaml, scalar
from megaqwen.config.sections import Config, TinyModel
from megaqwen.config.tiny_shapes import tiny_hf_config

DEFAULT_CONFIG = Path("config/config.yaml")


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


def examine(merged: Mapping[str, Any]) -> tuple[Config | None, list[Mistake]]:
    """The Config of a merged mapping, or None, and all mistakes."""
    values: dict[str, Any] = plain(merged)
    mistakes: list[Mistake] = []
    train = values.get("train")
    if isinstance(train, Mapping):
        canonical, mistakes = validate_train_options(train)
        mistakes += train_mistakes(canonical)
        data = values.get("data")
        if isinstance(data, Mapping) and data.get("kind") == "sft":
            mistakes += packed_mistakes(canonical)
        values["train"] = canonical
    mistakes = data_mistakes(values) + mistakes
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        return None, mistakes_of(error, Config.model_json_schema()) + mistakes
    mistakes += checkpoint_mistakes(config.checkpoints, config.train)
    if not mistakes and isinstance(config.model, TinyModel):
        mistakes = model_mistakes(config, tiny_hf_config(config.model.architecture), None)
    return config, mistakes


def validate_config(values: Mapping[str, Any]) -> Config:
    """The Config of a merged mapping, `train` in canonical form; ConfigError with all mistakes.

    A tiny model's shape is known without files, so that what does not fit it is a mistake here.
    """
    config, mistakes = examine(values)
    if config is None or mistakes:
        count = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError("\n    ".join([f"the config has {count}:", *map(str, mistakes)]))
    return config


def load_config(
    path: Path, overlay: Mapping[str, Any] | None = None, overlay_files: Iterable[Path] = ()
) -> Config:
    """Read, merge and validate the config of one run.

    Args:
        path: The base file.
        overlay: The values of `--config`, laid over everything else.
        overlay_files: The files of `--configfile`, each laid over what comes before it.
    """
    base = merged_files(path, overlay_files)
    over: dict[str, Any] = plain(overlay or {})
    if merge_overlay(base, over).get("sweep"):
        raise ConfigError(
            "this config has a sweep, and one run is asked for: give the config of one of its runs,"
            " which is results/runs/NAME/config.yaml"
        )
    return validate_config(merge_overlay(base, with_types(base, over)))


def merged_files(path: Path, overlay_files: Iterable[Path] = ()) -> dict[str, Any]:
    """The values of a base file with those of others laid over it in turn."""
    base = read_yaml(path)
    for file in overlay_files:
        base = merge_overlay(base, read_yaml(Path(file)))
    return base


def with_types(base: Mapping[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """The values of `--config` as what they were meant to be, by what is wrong with them otherwise."""
    _, mistakes = examine(merge_overlay(base, overlay)) if overlay else (None, [])
    return mend_types(overlay, mistakes) if mistakes else overlay


def as_written(values: Mapping[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """Values of `--config` with whole numbers as the command line writes them: 012 is a name, too.

    Args:
        values: What Snakemake read.
        words: Those of the command line.
    """
    given = (word.removeprefix("--config=").removeprefix("-C") for word in words)
    written = dict(word.split("=", 1) for word in given if "=" in word)
    return {
        name: written[name].strip("'\"") if type(value) is int and name in written else value
        for name, value in values.items()
    }


def mend_types(overlay: dict[str, Any], mistakes: list[Mistake]) -> dict[str, Any]:
    """`overlay` with texts as the numbers that they write, and the reverse, where that was wrong.

    Snakemake reads `--config train='{lr: 1e-3}'` without types, and `--config run=7` as a number.
    """
    overlay = copy.deepcopy(overlay)
    for mistake in mistakes:
        inside = overlay
        *parents, key = mistake.path or ("",)
        try:
            for step in parents:
                inside = inside[step]  # type: ignore[index]
            inside[key] = mended(inside[key], mistake.wants_text)  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            continue  # the base file has that value, not the overlay
    return overlay


def mended(value: Any, wants_text: bool) -> Any:
    """A value of the other type that it may have been meant as.

    A float is no text: nobody knows whether 1.1 was written 1.10.
    """
    if isinstance(value, list):
        return [mended(item, wants_text) for item in value]
    if isinstance(value, str) and not wants_text:
        return scalar(value)
    if wants_text and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def plain(values: Any) -> Any:
    """Dicts, lists and scalars only: Snakemake's mappings and sequences have types of their own."""
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    return values
