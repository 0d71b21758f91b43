"""What transformers' model and plain PyTorch make of the same batches: gradients, and steps of AdamW.

Everything is done in float64, which stands for the exact result, and in float32, which shows what
rounding alone does to it. (In both, transformers computes norms, softmax and routers in float32.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megaqwen.parity.fp8 import Fp8
from megaqwen.parity.huggingface import HuggingFaceLayers
from megaqwen.parity.routing import OtherChoices, Routes, following
from megaqwen.weights import HuggingFaceWeights

Tensors = dict[str, Tensor]
Sequences = list[Tensor]
MICRO_BATCH = 2


@torch.no_grad()
def outputs_of(
    weights: HuggingFaceWeights,
    dtype: torch.dtype,
    batch: Tensor,
    choices: Routes | None = None,
    tie: float = 0.0,
    at: Tensor | slice = slice(None),
    fp8: Fp8 | None = None,
) -> list[Sequences]:
    """What each layer makes of [sequences, positions + 1] tokens, and then the logits.

    [positions, hidden] of each sequence, and [positions, vocabulary], at the positions that are asked
    for. One layer is in memory at a time, as when both models walk through the texts. Of Megatron's
    choices of experts those are followed that are ties, see routing.py. With `fp8` the layers' products
    are in it.
    """
    model = HuggingFaceLayers(weights, dtype, fp8)
    hidden = model.embed(list(batch[:, :-1]))
    points = []
    for index in range(model.layers):
        by_sequence = (choices or {}).get(index)
        other = None if by_sequence is None else OtherChoices(choices=list(by_sequence), tie=tie)
        hidden, _ = model.layer(index, hidden, other)
        points.append([states[at] for states in hidden])
    with model.head() as (norm, logits):
        return [*points, [logits(norm(states)) for states in points[-1]]]


def trainable(directory: Path, dtype: torch.dtype) -> nn.Module:
    """transformers' whole model, with its plainest attention and experts."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model


@contextmanager
def following_in(model: Any, choices: Routes, tie: float) -> Iterator[None]:
    """Within it, `backward` of one batch follows these choices of experts at ties, see routing.py."""
    with ExitStack() as stack:
        for index, by_sequence in choices.items():
            each = [part.flatten(0, 1) for part in by_sequence.split(MICRO_BATCH)]
            router = model.model.layers[index].mlp.gate
            stack.enter_context(following(router, OtherChoices(choices=each, tie=tie)))
        yield


def backward(model: nn.Module, batch: Tensor) -> float:
    """Add the gradients of the mean loss over [sequences, positions + 1] tokens; the loss in nats."""
    targets = batch[:, 1:].numel()
    total = 0.0
    for tokens in batch.split(MICRO_BATCH):
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )
        (loss / targets).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) / targets
    return total


def gradients_of(
    directory: Path, dtype: torch.dtype, batch: Tensor, choices: Routes, tie: float
) -> Tensors:
    """The gradient of each published tensor; `choices` are followed as in `outputs_of`."""
    model = trainable(directory, dtype)
    with following_in(model, choices, tie):
        backward(model, batch)
    found = {
        name: torch.zeros_like(each) if each.grad is None else each.grad
        for name, each in model.named_parameters()
    }
    return published(found)


def published(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors by the names of the published files: transformers stacks the experts in memory."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if not path.endswith("mlp.experts"):
            found[name] = tensor.detach()
            continue
        for expert, matrix in enumerate(tensor.detach()):
            if kind == "gate_up_proj":
                gate, up = matrix.chunk(2)
                found[f"{path}.{expert}.gate_proj.weight"] = gate
                found[f"{path}.{expert}.up_proj.weight"] = up
            else:
                found[f"{path}.{expert}.down_proj.weight"] = matrix
    return found


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW and its schedule, as the options of training describe them."""

    rates: tuple[float, ...]
    """The learning rate of each step."""
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    """Of matrices; biases and norms have none."""
    clip: float
    """The largest norm of the gradient; 0 clips nothing."""


def learning_rates(train: Mapping[str, Any], steps: int) -> tuple[float, ...]:
    """The first learning rates of a schedule: up in a line, then down to min_lr over the decay.

    As Megatron-Core's `OptimizerParamScheduler.get_lr` has it, in iterations for samples.

    Args:
        train: Megatron's options; lr_decay_style is one of DECAYS.
        steps: How many.
    """
    highest, lowest = train["lr"], train.get("min_lr") or 0.0
    length = train.get("lr_decay_iters") or train["train_iters"]
    fraction = train.get("lr_warmup_fraction")
    warmup = fraction * length if fraction is not None else train.get("lr_warmup_iters", 0)
    first = train.get("lr_warmup_init", 0.0)

    def rate(step: int) -> float:
        if warmup > 0 and step <= warmup:
            return float(first + (highest - first) * step / warmup)
        share = min(1.0, (step - warmup) / (length - warmup))
        return float(
            lowest + (highest - lowest) * DECAYS[train.get("lr_decay_style", "linear")](share)
        )

    return tuple(rate(step) for step in range(steps))


DECAYS = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}


def recipe_of(train: Mapping[str, Any], steps: int) -> Recipe | str:
    """AdamW as training has it, or in words why there is none."""
    optimizer = train.get("optimizer", "adam")
    style = train.get("lr_decay_style", "linear")
    if optimizer != "adam":
        return f"train.optimizer is {optimizer}, and the plain loop has AdamW alone"
    if style not in DECAYS:
        return f"the plain loop has no learning rates of the style {style}"
    if "train_iters" not in train:
        return "the schedule counts samples, and the plain loop iterations"
    if train.get("weight_decay_incr_style", "constant") != "constant":
        return "the weight decay grows, and the plain loop's does not"
    if train.get("apply_wd_to_qk_layernorm"):
        return "the norms of queries and keys decay, and the plain loop's do not"
    return Recipe(
        rates=learning_rates(train, steps),
        betas=(train.get("adam_beta1", 0.9), train.get("adam_beta2", 0.999)),
        epsilon=train.get("adam_eps", 1e-8),
        weight_decay=train.get("weight_decay", 0.01),
        clip=train.get("clip_grad", 1.0),
    )


def train_plainly(
    directory: Path,
    dtype: torch.dtype,
    batches: Sequence[Tensor],
    recipe: Recipe,
    choices: Sequence[Routes],
    tie: float,
) -> tuple[list[float], Tensors]:
    """The loss before each step, and the published tensors after the last.

    Of each step `choices` are followed as in `outputs_of`.
    """
    model = trainable(directory, dtype)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [each for each in parameters if each.ndim > 1],
                "weight_decay": recipe.weight_decay,
            },
            {"params": [each for each in parameters if each.ndim == 1], "weight_decay": 0.0},
        ],
        betas=recipe.betas,
        eps=recipe.epsilon,
    )
    losses = []
    for batch, rate, chosen in zip(batches, recipe.rates, choices, strict=True):
        optimizer.zero_grad()
        with following_in(model, chosen, tie):
            losses.append(backward(model, batch))
        if recipe.clip:
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return losses, published(dict(model.named_parameters()))
