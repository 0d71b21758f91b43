"""Conversations without a tokenizer: on disk as preprocess writes them, and through a model."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from commands import ROOT

Conversation = tuple[list[int], list[int]]


def random_conversations(
    count: int, longest: int, vocabulary: int = 250, seed: int = 1
) -> list[Conversation]:
    """Ids and targets; how many of a conversation's tokens are targets varies from one to most."""
    random = numpy.random.RandomState(seed)
    conversations = []
    for _ in range(count):
        length = int(random.randint(3, longest + 1))
        ids = random.randint(0, vocabulary, length)
        targets = random.random_sample(length) < random.random_sample()
        targets[0], targets[-1] = False, True
        conversations.append((ids.tolist(), targets.astype(int).tolist()))
    return conversations


def write_conversations(prefix: Path, conversations: Sequence[Conversation]) -> None:
    """NAME.bin and .idx with the ids, NAME.targets.bin and .idx with the targets."""
    columns = ((str(prefix), numpy.int32), (f"{prefix}.targets", numpy.uint8))
    for column, (path, dtype) in enumerate(columns):
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
        for conversation in conversations:
            builder.add_item(torch.tensor(conversation[column]))
            builder.end_document()
        builder.finalize(f"{path}.idx")


def run_packed_model(
    directory: Path,
    change: int | None = None,
    longest: int = 30,
    program: str = "packed_model.py",
    **given: Any,
) -> dict[str, Any]:
    """What packed_model.py, or a program that takes the same, finds of seven conversations.

    Args:
        directory: For its files.
        change: A conversation whose ids become others.
        longest: Tokens of the longest conversation.
        given: `facts`, `length`, `bf16` of packed_model.py; `environment` is laid over the own one.
    """
    environment: Mapping[str, str] = given.pop("environment")
    conversations = random_conversations(7, longest=longest, vocabulary=250, seed=4)
    if change is not None:
        ids, targets = conversations[change]
        conversations[change] = ([(each + 1) % 250 for each in ids], targets)
    given |= {
        "conversations": [ids for ids, _ in conversations],
        "targets": [targets for _, targets in conversations],
        "packs": [[3, 1, 2, 5], [6, 0, 4]],
    }
    source, output = directory / "given.json", directory / f"{change}.json"
    source.write_text(json.dumps(given))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / program, source, output],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found
