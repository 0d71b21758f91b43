"""Options that would be silently wrong with packed conversations are refused where data.kind is sft."""

from typing import Any

import pytest
import yaml

from commands import ROOT
from megaqwen.config.loading import merge_overlay, validate_config
from megaqwen.config.reading import ConfigError

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"context_parallel_size": 2}, "context_parallel_size", "1 is allowed"),
    ({"cuda_graph_impl": "local"}, "cuda_graph_impl", '"none" is allowed'),
    ({"calculate_per_token_loss": False}, "calculate_per_token_loss", "it is set to true"),
    ({"ddp_average_in_collective": True}, "ddp_average_in_collective", "leave it out"),
    (
        {"moe_router_load_balancing_type": ["seq_aux_loss"]},
        "moe_router_load_balancing_type",
        "aux_loss and global_aux_loss are allowed",
    ),
    (
        {"pipeline_model_parallel_size": 2, "moe_aux_loss_coeff": [0.0, 0.01]},
        "moe_aux_loss_coeff",
        "train.pipeline_model_parallel_size 1",
    ),
    ({"iterations_to_skip": [3]}, "iterations_to_skip", "tensor_model_parallel_size 1"),
]


def given(kind: str, train: dict[str, Any]) -> dict[str, Any]:
    default = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    return merge_overlay(default, {"data": {"kind": kind}, "train": train})


@pytest.mark.parametrize(("train", "name", "advice"), REFUSED)
def test_sft_refuses(train: dict[str, Any], name: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(given("sft", train))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert any(line.startswith(f"train.{name}: ") and advice in line for line in lines), lines


@pytest.mark.parametrize(("train", "name", "advice"), REFUSED)
def test_pretraining_does_not(train: dict[str, Any], name: str, advice: str) -> None:
    try:
        validate_config(given("pretrain", train))
    except ConfigError as error:
        assert advice not in str(error)
