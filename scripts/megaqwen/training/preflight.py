"""What can be known to be wrong with a training before torch is imported."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megaqwen.checkpoints import TRACKER
from megaqwen.config import Config, load_config
from megaqwen.config.checks import check_model_fits
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import StageRecord, existing, read_json, sha256_file
from megaqwen.training.ranks import rank_from_environment
from megaqwen.training.scratch import Copy
from megaqwen.training.trackers import check_installed


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A training whose input was checked."""

    config: Config
    hf_config: dict[str, Any]
    """The model's config.json."""
    data: dict[str, Any]
    """The results in preprocess's manifest."""
    model: Path
    checkpoint: Path
    data_directory: Path
    output: Path
    checkpoints: Path
    """Where this config of training saves: another one never resumes from it."""
    terminal: TextIO
    record: StageRecord
    copy: Copy | None = None
    """This node's copy of the data, while training reads it."""

    @property
    def files(self) -> Path:
        """The directory that the data is read from."""
        return self.copy.directory if self.copy else self.data_directory


def check_run(arguments: argparse.Namespace) -> TrainingRun:
    """The run that the command line names.

    Raises:
        InputError: The layout does not fit the model or the ranks, or an input is not there.
    """
    config = load_config(arguments.config)
    check_installed(config.tracking)
    layout = Layout(config=config)
    world_size = rank_from_environment().world_size
    hf_config = read_json(existing(arguments.model / "config.json", "download"))
    data = read_json(existing(arguments.data / "manifest.json", "preprocess"))
    check_kind(data["results"], config.data.kind)
    if rank_from_environment().rank == 0:  # one reads what would be read again for each rank
        check_tokenizer(data["results"]["tokenizer"], arguments.model, arguments.data)
    existing(arguments.checkpoint / TRACKER, "convert")
    mistakes = check_model_fits(config, hf_config, world_size)
    if mistakes:
        raise InputError("\n  ".join(["this training does not fit:", *mistakes]))
    return TrainingRun(
        config=config,
        hf_config=hf_config,
        data=data["results"],
        model=arguments.model,
        checkpoint=arguments.checkpoint,
        data_directory=arguments.data,
        output=arguments.output,
        checkpoints=arguments.output / "checkpoints" / layout.checkpoints.name,
        terminal=arguments.terminal,
        record=StageRecord("train", layout.stage_config("train")),
    )


def check_tokenizer(tokenizer: Mapping[str, Any], model: Path, data: Path) -> None:
    """InputError where the data was tokenized by another tokenizer than the model's.

    Args:
        tokenizer: What preprocess recorded of the one that it used.
        model: The Hugging Face directory that is trained.
        data: The directory of the tokenized data, for the message.
    """
    for name, digest in tokenizer["files"].items():
        path = model / name
        if not path.is_file() or sha256_file(path) != digest:
            raise InputError(
                f"{data} was tokenized by another tokenizer than that of {model} ({name} differs): "
                "its ids, and its ends of documents, would mean something else. Run preprocess with "
                "this model"
            )


def check_kind(made: Mapping[str, Any], kind: str) -> None:
    """InputError where the data was preprocessed as another kind than the config's.

    Args:
        made: The results in preprocess's manifest; one from before there were kinds names none.
        kind: data.kind.
    """
    found = made.get("kind", "pretrain")
    if found != kind:
        raise InputError(
            f"the data was preprocessed as data.kind {found}, and the config has data.kind {kind}: run"
            " preprocess with this config, or give --data what it made"
        )
