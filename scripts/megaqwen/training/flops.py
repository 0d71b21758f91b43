"""Model FLOP of a training and the peaks of named devices: what TFLOP/s and MFU are counted by.

The FLOP that the model needs, whatever the layout, recomputation or padding make of it (PaLM,
https://arxiv.org/abs/2204.02311, appendix B, with causal attention counted once):

    FLOP a token = 6 W + 6 L s a

W are the weights that a token is multiplied with: attention, MLP or the experts chosen for it, router,
shared expert and the vocabulary projection, tied or not; not the embedding's look-up. Forward takes 2
FLOP a weight (multiply, add), backward twice that. L layers of attention over s positions, a = heads x
head size wide: the scores and the values take 2 x 2 s a FLOP a token forward, half of that under a causal
mask, three times that with backward. Softmax, norms and activations are left out, as is usual.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaqwen.architecture.qwen import Architecture, read_architecture

MATRICES = 3  # of an MLP: gate_proj, up_proj, down_proj


def multiplied_weights(qwen: Architecture) -> int:
    """The weights that each token is multiplied with, experts as far as they are chosen for it."""
    queries, keys = qwen.heads * qwen.head_dim, qwen.query_groups * qwen.head_dim
    attention = qwen.hidden_size * (queries + 2 * keys) + queries * qwen.hidden_size
    layers = sum(attention + feed_forward(qwen, layer) for layer in range(qwen.layers))
    return layers + qwen.vocab_size * qwen.hidden_size


def feed_forward(qwen: Architecture, layer: int) -> int:
    """`multiplied_weights` of a layer without its attention."""
    if qwen.experts is None or not qwen.has_experts(layer):
        return MATRICES * qwen.hidden_size * qwen.ffn_size
    experts = qwen.experts
    rows = experts.per_token * experts.ffn_size + (experts.shared_ffn_size or 0)
    routed = experts.count + (experts.shared_ffn_size is not None)  # its gate is one row
    return MATRICES * qwen.hidden_size * rows + routed * qwen.hidden_size


def flops_per_token(hf_config: Mapping[str, Any], sequence_length: int) -> float:
    """FLOP of forward and backward for one token, by the formula above.

    Args:
        hf_config: The model's config.json.
        sequence_length: Tokens of a sample; documents within it are not told apart.
    """
    qwen = read_architecture(hf_config)
    attention = qwen.layers * sequence_length * qwen.heads * qwen.head_dim
    return 6.0 * (multiplied_weights(qwen) + attention)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a device's data sheet promises of dense matrix products, in TFLOP/s."""

    device: str
    """The name under which it is known."""
    bf16: float
    """bfloat16 with float32 sums, without sparsity."""
    fp8: float | None = None
    """The same of FP8; None: the device has none."""

    def of(self, *, fp8: bool) -> float:
        """The peak of the matrix products of a training."""
        return self.fp8 if fp8 and self.fp8 else self.bf16


# By parts of torch.cuda.get_device_name(), all of which it has; the first that fits counts.
# NVIDIA's data sheets; where they give figures with sparsity, half of those.
PEAKS: tuple[tuple[tuple[str, ...], Peak], ...] = (
    (("GB200",), Peak(device="GB200", bf16=2500, fp8=5000)),
    (("B200",), Peak(device="B200", bf16=2250, fp8=4500)),
    (("GH200",), Peak(device="GH200", bf16=989.4, fp8=1978.9)),
    (("H200", "NVL"), Peak(device="H200 NVL", bf16=835.5, fp8=1670.5)),
    (("H200",), Peak(device="H200 SXM", bf16=989.4, fp8=1978.9)),
    (("H100", "NVL"), Peak(device="H100 NVL", bf16=835.5, fp8=1670.5)),
    (("H100", "PCIe"), Peak(device="H100 PCIe", bf16=756, fp8=1513)),
    (("H100",), Peak(device="H100 SXM", bf16=989.4, fp8=1978.9)),
    (("H800", "PCIe"), Peak(device="H800 PCIe", bf16=756, fp8=1513)),
    (("H800",), Peak(device="H800 SXM", bf16=989.4, fp8=1978.9)),
    (("H20",), Peak(device="H20", bf16=148, fp8=296)),
    (("A100",), Peak(device="A100", bf16=312)),
    (("A800",), Peak(device="A800", bf16=312)),
    (("A40",), Peak(device="A40", bf16=149.7)),
    (("A30",), Peak(device="A30", bf16=165)),
    (("A10G",), Peak(device="A10G", bf16=70)),
    (("A10",), Peak(device="A10", bf16=125)),
    (("L40S",), Peak(device="L40S", bf16=362, fp8=733)),
    (("L40",), Peak(device="L40", bf16=181, fp8=362)),
    (("L4",), Peak(device="L4", bf16=121, fp8=242)),
    (("RTX", "4090"), Peak(device="RTX 4090", bf16=165.2, fp8=330.3)),
    (("RTX", "3090"), Peak(device="RTX 3090", bf16=71)),
)


def peak_of(device_name: str) -> Peak | None:
    """The peak of the device that torch names so; None where none is known, as for a CPU."""
    words = device_name.replace("-", " ").split()
    for parts, peak in PEAKS:
        if all(part in words for part in parts):
            return peak
    return None
