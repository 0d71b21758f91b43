"""On a GPU: Transformer Engine's kernels where Megatron 0.19.2 would take slower or larger ones.

- The loss. Megatron's `native` fusion makes float32 logits of a vocabulary of 151,936, which are the
  peak of memory; without fusion it makes several. Transformer Engine's kernel reads the bfloat16 logits
  once in forward, computes in float32, and turns them into their gradient where they lie. Megatron's
  argument check refuses it for "stability issues" of the versions that wrote the gradient in forward,
  and its own call leaves the logits as they are, which takes a copy; so the model's loss is replaced
  after the check. Nothing is summed by atomics: deterministic_mode may have it as well.
- The weights' gradients. Transformer Engine's layers add them to the float32 sum as part of the matrix
  product. Megatron's own linear layer, which is the vocabulary projection, asks for an extension of Apex
  to do the same: here it gets Transformer Engine's matrix product under that name.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def install() -> None:
    """Give Megatron's linear layers Transformer Engine's accumulation; call it on a GPU only."""
    from megatron.core import utils
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available:
        return  # Apex is there
    layers.fused_weight_gradient_mlp_cuda = utils.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def add_weight_gradient(
    inputs: torch.Tensor, output_gradients: torch.Tensor, total: torch.Tensor
) -> None:
    """Add a linear layer's weight gradient to `total`, in its precision.

    Args:
        inputs: [tokens, inputs].
        output_gradients: [tokens, outputs].
        total: [outputs, inputs], float32 or bfloat16.
    """
    if inputs.dtype is torch.float32:  # Transformer Engine would round it to TF32
        total.addmm_(output_gradients.T, inputs)
        return
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        inputs,
        output_gradients,
        out_dtype=total.dtype,
        layout="NT",
        out=total,
        accumulate=True,
        grad=True,
    )


def use_fused_loss(models: list[Any]) -> list[Any]:
    """A hook of Megatron's model builder: the chunks that compute a loss do it with the kernel."""
    for model in models:
        if model.post_process:
            model.compute_language_model_loss = fused_loss(model.pg_collection.tp)
    return models


def fused_loss(tensor_parallel: Any) -> Loss:
    """The cross entropy of logits whose vocabulary is spread over a group of ranks."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def loss(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Nats for each label, [batch, sequence], of logits [sequence, batch, vocabulary].

        Backward overwrites the logits.
        """
        labels = labels.transpose(0, 1).contiguous()
        nats = parallel_cross_entropy(
            logits, labels, dist_process_group=tensor_parallel, overwrite_input=True
        )
        return nats.transpose(0, 1).contiguous()

    return loss
