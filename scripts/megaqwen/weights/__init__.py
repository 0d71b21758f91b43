"""The bridge: Hugging Face safetensors <-> Megatron torch_dist, one tensor at a time."""

from megaqwen.weights.bridge import (
    convert_to_megatron,
    export_to_huggingface,
    read_hf_tensors,
)
from megaqwen.weights.huggingface import HuggingFaceWeights
from megaqwen.weights.mapping import Transfer, plan_transfers
from megaqwen.weights.reading import MegatronWeights, find_checkpoint
from megaqwen.weights.writing import write_checkpoint

__all__ = [
    "HuggingFaceWeights",
    "MegatronWeights",
    "Transfer",
    "convert_to_megatron",
    "export_to_huggingface",
    "find_checkpoint",
    "plan_transfers",
    "read_hf_tensors",
    "write_checkpoint",
]
