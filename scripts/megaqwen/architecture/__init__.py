"""What a Hugging Face config.json says about a Qwen, and how Megatron says it. Light: no torch."""

from megaqwen.architecture.megatron import megatron_options, padded_vocabulary
from megaqwen.architecture.qwen import FAMILIES, Architecture, read_architecture
from megaqwen.architecture.tensors import count_parameters, tensor_shapes

__all__ = [
    "FAMILIES",
    "Architecture",
    "count_parameters",
    "megatron_options",
    "padded_vocabulary",
    "read_architecture",
    "tensor_shapes",
]
