"""A training that goes on under another expert parallelism, where Megatron would fail or be wrong."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megaqwen.errors import InputError
from megaqwen.training import saving

DELAYED: dict[str, Any] = {
    "num_experts": 8,
    "expert_model_parallel_size": 4,
    "moe_grouped_gemm": True,
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
    "no_load_optim": None,
}
NO_FP8 = {"fp8": None}


def check(monkeypatch: pytest.MonkeyPatch, saved: dict[str, Any], now: dict[str, Any]) -> None:
    monkeypatch.setattr(saving, "saved_arguments", lambda checkpoints: Namespace(**DELAYED | saved))
    saving.check_experts(Path("run"), Namespace(**DELAYED | now), 2)


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({}, {}),
        (NO_FP8, {**NO_FP8, "expert_model_parallel_size": 2}),
        ({}, {"expert_model_parallel_size": 2, "moe_grouped_gemm": False}),
        ({}, {"expert_model_parallel_size": 2, "fp8_recipe": "tensorwise"}),
        ({**NO_FP8}, {**NO_FP8, "expert_model_parallel_size": 1, "no_load_optim": True}),
        ({}, {"expert_model_parallel_size": 1, "num_experts": None}),
    ],
)
def test_others_go_on(
    monkeypatch: pytest.MonkeyPatch, saved: dict[str, Any], now: dict[str, Any]
) -> None:
    check(monkeypatch, saved, now)


@pytest.mark.parametrize(
    ("saved", "now", "lost"),
    [
        ({}, {"expert_model_parallel_size": 2}, "scales of delayed FP8"),
        (NO_FP8, {**NO_FP8, "expert_model_parallel_size": 1}, "optimizer's states"),
        ({**NO_FP8, "expert_model_parallel_size": 1}, NO_FP8, "optimizer's states"),
    ],
)
def test_what_would_be_lost_is_told(
    monkeypatch: pytest.MonkeyPatch, saved: dict[str, Any], now: dict[str, Any], lost: str
) -> None:
    with pytest.raises(InputError, match=rf"was \d when .* and is \d: .*{lost}.*\. Keep \d"):
        check(monkeypatch, saved, now)


def test_a_training_from_the_start_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "saved_arguments", lambda checkpoints: pytest.fail("none is there"))
    saving.check_experts(Path("run"), Namespace(**DELAYED), 0)
