"""SFT on a GPU: Transformer Engine's packed attention is that of each conversation alone.

Skipped without a GPU: run `uv sync --extra gpu` and `uv run pytest tests/gpu` on a machine that has one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from conversation_files import run_packed_model
from small_models import MODELS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: run `uv sync --extra gpu && uv run pytest tests/gpu` on a machine that has one",
)
# Heads of a size that flash and fused attention take.
LENGTH = 256
"""Positions of a pack."""
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
FACTS = {**MODELS["qwen3"], **SIZES, "max_position_embeddings": LENGTH}
LOSS_BOUND = 2e-2  # of a conversation's loss, in bfloat16


def run_model(directory: Path, change: int | None = None) -> dict[str, Any]:
    """Losses of seven conversations, alone and packed; of `change` the ids become others."""
    # One algorithm in every run, so that what must be equal can be.
    environment = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    given = {"facts": FACTS, "length": 256, "bf16": True}
    return run_packed_model(directory, change, longest=60, environment=environment, **given)


def test_packed_is_as_one_by_one(tmp_path: Path) -> None:
    found = run_model(tmp_path)
    pairs = list(zip(found["alone"]["losses"], found["packed"]["losses"], strict=True))
    print("largest relative difference:", max(abs(a - b) / a for a, b in pairs))
    assert all(abs(a - b) < LOSS_BOUND * a for a, b in pairs)


def test_a_conversation_reaches_no_neighbour(tmp_path: Path) -> None:
    before = run_model(tmp_path)["packed"]["losses"]
    after = run_model(tmp_path, change=1)["packed"]["losses"]
    assert [number for number in range(7) if before[number] != after[number]] == [1]
