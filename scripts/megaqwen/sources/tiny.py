"""Writes a tiny Qwen: random weights, a real tokenizer, a normal Hugging Face directory."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megaqwen.config.tiny_shapes import END_OF_TEXT, tiny_hf_config
from megaqwen.sources.tokenizer import train_tokenizer


def write_tiny_model(directory: Path, architecture: str, seed: int) -> None:
    """Write config, weights (float32 safetensors), tokenizer, chat template, generation config.

    The same seed gives the same bytes of model.safetensors.

    Args:
        directory: An existing directory to write to.
        architecture: qwen3, qwen2, qwen3_moe or qwen2_moe, see `tiny_hf_config`.
        seed: Of the random weights.
    """
    facts = tiny_hf_config(architecture)
    config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        vary_norms_and_biases(model)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        do_sample=False,
    )
    model.save_pretrained(directory)
    train_tokenizer(config.max_position_embeddings).save_pretrained(directory)


@torch.no_grad()
def vary_norms_and_biases(model: PreTrainedModel) -> None:
    """Move norm weights off 1 and biases off 0, so that a dropped or swapped one changes logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif name.endswith(".bias"):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
