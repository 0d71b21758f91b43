"""Scales of delayed FP8, which Megatron shares out wrongly among another number of grouped experts."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megaqwen.errors import InputError
from megaqwen.training import saving

TWO: dict[str, Any] = {
    "expert_model_parallel_size": 2,
    "moe_grouped_gemm": True,
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
}


@pytest.mark.parametrize(
    ("resumed", "saved", "now"),
    [
        (0, {}, {"expert_model_parallel_size": 1}),
        (2, {}, {}),
        (2, {}, {"expert_model_parallel_size": 1, "moe_grouped_gemm": False}),
        (2, {}, {"expert_model_parallel_size": 1, "fp8_recipe": "tensorwise"}),
        (2, {"fp8": None}, {"expert_model_parallel_size": 1}),
    ],
)
def test_other_trainings_go_on(
    monkeypatch: pytest.MonkeyPatch, resumed: int, saved: dict[str, Any], now: dict[str, Any]
) -> None:
    monkeypatch.setattr(saving, "saved_arguments", lambda checkpoints: Namespace(**TWO | saved))
    saving.check_scales(Path("run"), Namespace(**TWO | now), resumed)


def test_other_experts_on_a_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "saved_arguments", lambda checkpoints: Namespace(**TWO))
    one = Namespace(**TWO | {"expert_model_parallel_size": 1})
    with pytest.raises(InputError, match=r"was 2 when .* and is 1: .* Keep 2"):
        saving.check_scales(Path("run"), one, 2)
