"""SFT on a GPU: Transformer Engine's packed attention is that of each conversation alone.

Skipped without a GPU: run `uv sync --extra gpu` and `uv run pytest tests/gpu` on a machine that has one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import ROOT
from conversation_files import random_conversations
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
    conversations = random_conversations(7, longest=60, vocabulary=250, seed=4)
    if change is not None:
        ids, targets = conversations[change]
        conversations[change] = ([(each + 1) % 250 for each in ids], targets)
    given = {
        "facts": FACTS,
        "conversations": [ids for ids, _ in conversations],
        "targets": [targets for _, targets in conversations],
        "packs": [[3, 1, 2, 5], [6, 0, 4]],
        "length": LENGTH,
        "bf16": True,
    }
    source, output = directory / "given.json", directory / f"{change}.json"
    source.write_text(json.dumps(given))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "packed_model.py", source, output],
        capture_output=True,
        text=True,
        timeout=600,
        # One algorithm in every run, so that what must be equal can be.
        env={**os.environ, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_packed_is_as_one_by_one(tmp_path: Path) -> None:
    found = run_model(tmp_path)
    pairs = list(zip(found["alone"]["losses"], found["packed"]["losses"], strict=True))
    print("largest relative difference:", max(abs(a - b) / a for a, b in pairs))
    assert all(abs(a - b) < LOSS_BOUND * a for a, b in pairs)


def test_a_conversation_reaches_no_neighbour(tmp_path: Path) -> None:
    before = run_model(tmp_path)["packed"]["losses"]
    after = run_model(tmp_path, change=1)["packed"]["losses"]
    assert [number for number in range(7) if before[number] != after[number]] == [1]
