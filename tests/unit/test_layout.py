"""Where results lie: what shares a directory, and what never resumes from another's checkpoints."""

from pathlib import Path
from typing import Any

import pytest

from commands import ROOT
from megaqwen.config import load_config
from megaqwen.config.megatron_options import OWN_DEFAULTS, megatron_options, settable_names
from megaqwen.config.operational_options import OPERATIONAL
from megaqwen.config.tiny_shapes import TINY, tiny_hf_config
from megaqwen.layout import RECIPE, Layout
from megaqwen.training.arguments import RunPaths, training_options

FILES = {"name": "lines", "source": "files", "files": ["a.jsonl"]}


def layout(**overlay: Any) -> Layout:
    """The layout of the embedded default with sections laid over it."""
    return Layout(config=load_config(ROOT / "config" / "config.yaml", overlay))


@pytest.mark.parametrize(
    "overlay",
    [
        {"model": {"seed": 7}},
        {"model": {"architecture": "qwen2"}},
        {"model": {"source": "hub", "repo_id": "Qwen/Qwen3-0.6B"}},
        {"data": {"corpora": [FILES]}},
        {"data": {"seed": 7}},
        {"data": {"split": [90, 5, 5]}},
        {"train": {"lr": 1.0e-3}},
        {"train": {"adam_eps": 1.0e-6}},
    ],
    ids=str,
)
def test_training_never_resumes_from_another_ones_checkpoints(overlay: dict[str, Any]) -> None:
    assert layout(**overlay).checkpoints != layout().checkpoints


def test_of_equal_corpora_the_field_that_is_read_tells_checkpoints_apart() -> None:
    text, body = (
        layout(data={"corpora": [{**FILES, "text_field": field}]}) for field in ("text", "body")
    )
    assert text.checkpoints != body.checkpoints


@pytest.mark.parametrize(
    "overlay",
    [
        {"train": {"adam_eps": 1.0e-8}},
        {"train": {"pipeline_model_parallel_size": 2}},
        {"train": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}},
        {"train": {"micro_batch_size": 1}},
        {"parity": {"texts": ["Another text."]}},
        {"export": {"dtype": "bfloat16"}},
    ],
    ids=str,
)
def test_training_goes_on_where_nothing_of_it_changed(overlay: dict[str, Any]) -> None:
    assert layout(**overlay).checkpoints == layout().checkpoints


@pytest.mark.parametrize(
    ("options", "shared"),
    [({"lr": 0.5, "lr_warmup_iters": 7}, True), ({"lr_decay_style": "constant"}, False)],
    ids=str,
)
def test_a_verdict_is_not_that_of_another_schedule(options: dict[str, Any], shared: bool) -> None:
    """The gate is shared, so that a sweep passes it once; what a run says of itself is not."""
    one, other = layout(), layout(train=options)
    assert one.stage_digest("gate") == other.stage_digest("gate")
    assert (one.stage_digest("parity") == other.stage_digest("parity")) == shared


def test_what_changes_no_number_trains_nothing_again() -> None:
    """How a training is watched, timed, saved and stopped; each option at a value that it has not."""
    plain = layout()
    assert {dest for dest, _ in settable_names().values()} >= OPERATIONAL
    for name in OPERATIONAL:
        option = megatron_options()[name]
        values = option.get(
            "choices", {"bool": [True, False], "int": [7], "str": ["a"]}[option["type"]]
        )
        value = next(each for each in values if each != option["default"])
        train = {**plain.config.train, name: value}
        other = Layout(config=plain.config.model_copy(update={"train": train}))
        assert other.config.train != plain.config.train
        assert other.checkpoints == plain.checkpoints, name
        assert all(other.stage_digest(stage) == plain.stage_digest(stage) for stage in RECIPE), name


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("gpu", [False, True])
def test_what_training_sets_besides_the_config_has_no_default(architecture: str, gpu: bool) -> None:
    """Leaving such an option out does not mean what setting it to Megatron's default means."""
    train = {"pipeline_model_parallel_size": 2, "eval_interval": None}
    config = layout(train=train, model={"architecture": architecture}).config
    paths = RunPaths(pretrained=Path("a"), checkpoints=Path("b"), tensorboard=Path("c"))
    options = training_options(config, tiny_hf_config(architecture), paths, gpu=gpu)
    own = {name for name in options.keys() - config.train.keys() if name in settable_names()}
    assert own and own <= set(OWN_DEFAULTS)


@pytest.mark.parametrize("name", [name for name in OWN_DEFAULTS if name != "eval_interval"])
def test_megatrons_default_said_is_another_training(name: str) -> None:
    value = megatron_options()[name]["default"]
    without = layout(train={name: None}).checkpoints
    assert layout(train={name: value}).checkpoints != without


def test_runs_share_what_has_the_same_origin() -> None:
    one, other = layout(), layout(run="other", train={"lr": 1.0e-3})
    assert (one.model, one.megatron, one.data, one.gate) == (
        other.model,
        other.megatron,
        other.data,
        other.gate,
    )
    assert one.run != other.run
