"""Model FLOP held against what torch counts in transformers' own forward; devices by torch's names."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megaqwen.training.flops import flops_per_token, peak_of
from small_models import MODELS

POSITIONS = 64
QWEN25_1_5B = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("model", MODELS)
def test_what_transformers_multiplies(model: str) -> None:
    """Its eager attention computes every score, masked or not: twice what a causal one needs."""
    facts = MODELS[model]
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**facts), attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.arange(POSITIONS)[None], use_cache=False)
    head = facts.get("head_dim", facts["hidden_size"] // facts["num_attention_heads"])
    width = facts["num_attention_heads"] * head
    masked = 2 * facts["num_hidden_layers"] * POSITIONS * width * POSITIONS
    forward = counter.get_total_flops() - masked
    assert 3 * forward == flops_per_token(facts, POSITIONS) * POSITIONS


def test_a_published_shape() -> None:
    """Qwen2.5-1.5B: 1.544e9 weights, the tied head among them, and attention at 4096 positions."""
    weights = 28 * (1536 * (1536 + 2 * 256) + 1536 * 1536 + 3 * 1536 * 8960) + 151936 * 1536
    assert flops_per_token(QWEN25_1_5B, 4096) == 6 * (weights + 28 * 4096 * 1536)


@pytest.mark.parametrize(
    ("name", "device", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756),
        ("NVIDIA H100 NVL", "H100 NVL", 835.5),
        ("NVIDIA H200", "H200 SXM", 989.4),
        ("NVIDIA A100-SXM4-80GB", "A100", 312),
        ("NVIDIA L4", "L4", 121),
        ("NVIDIA L40S", "L40S", 362),
        ("NVIDIA A10G", "A10G", 70),
    ],
)
def test_the_peak_of_a_device(name: str, device: str, bf16: float) -> None:
    peak = peak_of(name)
    assert peak is not None
    assert (peak.device, peak.of(fp8=False)) == (device, bf16)


def test_fp8_has_a_peak_of_its_own_where_the_device_has_it() -> None:
    hopper, ampere = peak_of("NVIDIA H100 80GB HBM3"), peak_of("NVIDIA A100-SXM4-40GB")
    assert hopper and ampere
    assert (hopper.of(fp8=True), ampere.of(fp8=True)) == (1978.9, 312)


@pytest.mark.parametrize("name", ["CPU", "NVIDIA H1000", "AMD Instinct MI300X"])
def test_no_peak_is_guessed(name: str) -> None:
    assert peak_of(name) is None
