"""The yardstick of benchmark_training.py: the same shape trained with transformers and torch.compile."""

import statistics
import time
from pathlib import Path
from typing import Any

from training_cases import Case


def train(case: Case, directory: Path) -> dict[str, Any]:
    """bfloat16 throughout, torch's scaled dot product attention, fused AdamW; its record."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megaqwen.training.flops import flops_per_token

    device = "cuda" if torch.cuda.is_available() else "cpu"
    length = case.options.get("seq_length", 4096)
    config = AutoConfig.for_model(**case.hf_config())
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    compiled = torch.compile(model)
    generator = torch.Generator(device).manual_seed(1234)
    seconds, losses = [], []
    for _ in range(case.iterations):
        began = time.monotonic()
        for _ in range(case.accumulate):
            tokens = torch.randint(
                config.vocab_size, (case.micro, length), generator=generator, device=device
            )
            loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
            (loss / case.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the GPU
        seconds.append(time.monotonic() - began)
    tokens_per_second = case.micro * case.accumulate * length / statistics.median(seconds[2:])
    return {
        "tokens_per_second": tokens_per_second,
        "tflops": tokens_per_second * flops_per_token(case.hf_config(), length) / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
        "loss": losses[-1],
        "seconds": seconds,
    }
