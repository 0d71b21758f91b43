"""Mean losses over held-out samples: of the two models, and of the training that logged its own.

Call `cpu_emulation.install` before this is imported.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqwen.config import Config
from megaqwen.config.rank_options import number_format
from megaqwen.parity.comparing import POSITIONS_AT_ONCE
from megaqwen.parity.gates import LOSS_THRESHOLD, Gate
from megaqwen.parity.heldout import (
    Evaluated,
    Sample,
    heldout_samples,
    last_evaluation,
    planned_evaluation,
    sequence_length,
)
from megaqwen.parity.huggingface import HuggingFaceLayers
from megaqwen.parity.megatron import MegatronLayers
from megaqwen.parity.texts import memory_for, positions_in_memory
from megaqwen.parity.walk import OTHER, REFERENCE, FollowingLayers, Layers, through_layer
from megaqwen.weights import HuggingFaceWeights

PASSES = 4
"""What it costs in passes of float32: two models, and one in training's dtype, which is slower."""
LOGGED_THRESHOLD = 2e-5
"""Nats per token: Megatron sums an evaluation in float32."""
TRAINED_LOSS = "trained loss"
SHIFTS, STANDARD_ERRORS = 2.0, 4.0
"""How many times what rounding does to the mean loss in a narrower dtype, by its mean and its spread."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What was measured over held-out samples."""

    kind: str
    """Of which set: validation or test."""
    samples: int
    targets: int
    reference_loss: float
    """Of the Hugging Face model, in nats per token."""
    loss: float
    """Of the Megatron model."""
    logged: float | None = None
    """What training found over the same samples; None where it is not known."""
    iteration: int | None = None
    """After which training found it."""
    evaluated_loss: float | None = None
    """To be held against it: in float32, of the weights as training had them."""
    trained_dtype: str | None = None
    shift: float = 0.0
    """What computing in training's dtype does to the Hugging Face model's mean loss."""
    standard_error: float = 0.0
    """Of that shift, by its spread over the tokens."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """The two models of a crossing, and the run that they belong to."""

    weights: HuggingFaceWeights
    checkpoint: Path
    recorded: dict[str, Any]
    """The options that the checkpoint records of its model."""
    rounded_to: torch.dtype
    """The dtype of the Hugging Face weights, where an export may have narrowed them."""
    tie: float
    """Two logits of a router that differ by no more are equal but for rounding."""
    config: Config
    data: Path
    """Preprocess's directory."""
    made: Mapping[str, Any]
    """The results in its manifest."""
    trained: Mapping[str, Any]
    """Those in training's; nothing before it, and where nobody gave them."""
    after_training: bool
    """The Hugging Face model is an export."""

    @property
    def trained_dtype(self) -> torch.dtype:
        """Training's."""
        options = self.config.train
        narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return next((dtype for name, dtype in narrow.items() if options.get(name)), torch.float32)

    def megatron(self, length: int, rounded_to: torch.dtype) -> MegatronLayers:
        """The checkpoint's model, for texts of that many tokens at most."""
        vocabulary = self.weights.config["vocab_size"]
        return MegatronLayers(self.checkpoint, self.recorded, vocabulary, length, rounded_to)


def measure_perplexity(
    crossing: Crossing, budget: float
) -> tuple[Perplexity | None, dict[str, str]]:
    """The models' losses over held-out samples: after an export, those that training evaluated last.

    Args:
        crossing: What is compared.
        budget: Tokens that a float32 model takes in the time that there is.

    Returns:
        What was measured, and by gate why it was not.
    """
    config, weights = crossing.config, crossing.weights
    evaluated = last_evaluation(crossing.trained) or planned_evaluation(config)
    length = sequence_length(config)
    if evaluated is None:
        return None, {"perplexity": "all documents are trained on"}
    if length > (most := weights.config["max_position_embeddings"]):
        return None, {"perplexity": f"train.seq_length {length} is more than the model's {most}"}
    samples = heldout_samples(
        evaluated,
        config,
        crossing.data,
        crossing.made,
        weights.config["vocab_size"],
        budget / PASSES,
        positions_in_memory(weights.config["num_attention_heads"]),
    )
    expected, found = both_losses(
        HuggingFaceLayers(weights, torch.float32),
        crossing.megatron(length, crossing.rounded_to),
        samples,
        crossing.tie,
    )
    logged, reason = logged_loss(evaluated, samples, crossing, budget / PASSES)
    facts: dict[str, Any] = {
        "kind": evaluated.kind,
        "samples": len(samples),
        "targets": len(expected),
        "reference_loss": float(expected.mean()),
        "loss": float(found.mean()),
    }
    if logged is None:
        return Perplexity(**facts), {TRAINED_LOSS: reason} if reason else {}
    dtype = crossing.trained_dtype
    if crossing.rounded_to not in (torch.float32, dtype):
        # The export rounded what training had: its own weights gave the loss that it logged.
        expected = token_losses(crossing.megatron(length, torch.float32), samples)
    facts |= {
        "iteration": evaluated.iteration,
        "logged": logged,
        "evaluated_loss": float(expected.mean()),
        "trained_dtype": str(dtype).removeprefix("torch."),
    }
    if dtype != torch.float32:
        shifts = token_losses(HuggingFaceLayers(weights, dtype), samples) - expected
        facts["shift"] = float(shifts.mean())
        facts["standard_error"] = float(shifts.std() / math.sqrt(len(shifts)))
    return Perplexity(**facts), {}


def logged_loss(
    evaluated: Evaluated, samples: Sequence[Sample], crossing: Crossing, affordable: float
) -> tuple[float | None, str]:
    """What training logged over these samples, or why it is not known; no word before training."""
    if not crossing.after_training:
        return None, ""
    dtype, length = number_format(crossing.config.train), sequence_length(crossing.config)
    if dtype in ("fp8", "fp4"):
        return None, f"how far the loss in {dtype} may be from that in float32 is not known here"
    if (compared := len(samples[-1].tokens)) < length:
        limit = "parity.minutes" if affordable < length else "this job's memory"
        memory = memory_for(length, crossing.weights.config["num_attention_heads"]) / 1e9
        return None, (
            f"{limit} is enough for {compared:,} of a sample's {length:,} tokens, and training told the"
            f" losses of whole ones ({memory:.0f} GB hold one)"
        )
    logged = evaluated.logged(samples)
    told = evaluated.iteration is not None
    return logged, f"training told no losses of {'these samples' if told else 'its last iteration'}"


@torch.no_grad()
def token_losses(model: Layers, samples: Sequence[Sample]) -> Tensor:
    """[targets] cross entropy in nats, in float64, of the targets of all samples in their order."""
    texts = [text for sample in samples for text in sample.texts()]
    hidden = model.embed([text.tokens for text in texts])
    for index in range(model.layers):
        hidden, _ = model.layer(index, hidden)
    return head_losses(model, texts, hidden)


@torch.no_grad()
def both_losses(
    reference: FollowingLayers, other: Layers, samples: Sequence[Sample], tie: float
) -> tuple[Tensor, Tensor]:
    """The same of two models side by side, of which the first follows the second's experts at ties."""
    texts = [text for sample in samples for text in sample.texts()]
    models: dict[str, Layers] = {REFERENCE: reference, OTHER: other}
    tokens = [text.tokens for text in texts]
    hidden = {name: model.embed(tokens) for name, model in models.items()}
    for index in range(other.layers):
        through_layer({REFERENCE: reference}, other, index, hidden, tie)
    first, second = (head_losses(models[name], texts, hidden[name]) for name in models)
    return first, second


def head_losses(model: Layers, texts: Sequence[Sample], hidden: Sequence[Tensor]) -> Tensor:
    """[targets] losses from what the last layer put out."""
    found = []
    with model.head() as (norm, logits):
        for text, states in zip(texts, hidden, strict=True):
            normed = norm(states)
            for start in range(0, len(normed), POSITIONS_AT_ONCE):
                run = slice(start, start + POSITIONS_AT_ONCE)
                rows = logits(normed[run]).double()
                labels = text.labels[run, None]
                losses = rows.logsumexp(dim=-1) - rows.gather(1, labels)[:, 0]
                found.append(losses[text.mask[run] > 0])
    return torch.cat(found)


def perplexity_gates(found: Perplexity | None) -> list[Gate]:
    """The gate on the two models' mean losses, and that on the loss which training logged.

    The second is left out where `measure_perplexity` says why, and before training.
    """
    if found is None:
        return []
    between = Gate(
        name="perplexity",
        statistic=f"difference of the mean losses of {found.targets:,} held-out tokens",
        value=abs(found.loss - found.reference_loss),
        threshold=LOSS_THRESHOLD,
        detail=f"Megatron {found.loss:.6f}, transformers {found.reference_loss:.6f} nats per token",
    )
    if found.logged is None or found.evaluated_loss is None:
        return [between]
    rounding = SHIFTS * abs(found.shift) + STANDARD_ERRORS * found.standard_error
    with_training = Gate(
        name=TRAINED_LOSS,
        statistic=f"{found.kind} loss against what training logged, in nats per token",
        value=abs(found.evaluated_loss - found.logged),
        threshold=max(LOGGED_THRESHOLD, rounding),
        detail=f"training logged {found.logged:.6f} after iteration {found.iteration},"
        f" the model has {found.evaluated_loss:.6f} over the same {found.targets:,} tokens",
    )
    return [between, with_training]
