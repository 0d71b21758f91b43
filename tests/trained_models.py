"""Models of a tiny or of a public size, random and then trained a little, so that no weight is noise."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megaqwen.config.tiny_shapes import TINY, tiny_hf_config
from megaqwen.data.builtin import builtin_documents
from megaqwen.sources.tiny import vary_norms_and_biases
from megaqwen.sources.tokenizer import train_tokenizer
from published import PUBLISHED

WARMUP_STEPS = 5
POSITIONS = 1024
PUBLIC = {model.name: model for model in PUBLISHED}


def make_trained(directory: Path, name: str, steps: int, *, batch: int, length: int) -> list[float]:
    """Write a model of float32 weights with the tiny models' tokenizer; its losses, step by step.

    Args:
        directory: To be made.
        name: qwen3 and the other tiny ones, or a public size such as Qwen2.5-0.5B.
        steps: Of plain AdamW over transformers' model, on the built-in text.
        batch: Sequences in a step.
        length: Tokens in a sequence.
    """
    facts = tiny_hf_config(name) if name in TINY else PUBLIC[name].config
    torch.manual_seed(1234)
    config = AutoConfig.for_model(**facts)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    vary_norms_and_biases(model)
    tokenizer = train_tokenizer(POSITIONS)
    losses = train(model, batches(tokenizer, batch, length), steps, 2e-3 if name in TINY else 1e-3)
    model.save_pretrained(directory, max_shard_size="20GB")
    tokenizer.save_pretrained(directory)
    return losses


def batches(tokenizer: object, batch: int, length: int) -> Iterator[Tensor]:
    """[batch, length + 1] token ids without end, of the built-in text over and over."""
    ids: list[int] = []
    while True:
        for document in builtin_documents():
            ids += tokenizer.encode(document)  # type: ignore[attr-defined]
            while len(ids) > batch * length:
                yield torch.tensor(ids[: batch * length]).view(batch, length)
                del ids[: batch * length]


def train(
    model: PreTrainedModel, data: Iterator[Tensor], steps: int, learning_rate: float
) -> list[float]:
    """Losses in nats per token."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), foreach=False
    )
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
        tokens = next(data)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"  step {step + 1} of {steps}: loss {losses[-1]:.3f}", flush=True)
    return losses
