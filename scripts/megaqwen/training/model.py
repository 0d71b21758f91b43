"""Megatron's GPTModel for Qwen, built one way for training and for parity.

megatron-core 0.19.2 prints that GPTModel is deprecated in favour of HybridModel: what that change will
touch is this file.
"""

from argparse import Namespace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from megaqwen.training import fused_sequences
from megaqwen.training.fused_attention import fuse_attention_input
from megaqwen.training.fused_kernels import use_fused_loss
from megaqwen.training.packed_attention import PackedDotProductAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with a weight that Megatron knows to be sequence parallel.

    Megatron's own wrapper of it refuses sequence parallelism. All that is missing is the mark by which
    `finalize_model_grads` sums the weight's gradient over the tensor parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def replace_norms(spec: Any, visited: set[int] | None = None) -> None:
    """Put `RMSNorm` wherever a spec names Megatron's torch norm, in place, at any depth."""
    visited = set() if visited is None else visited
    if id(spec) in visited or isinstance(spec, type) or not hasattr(spec, "__dict__"):
        return
    visited.add(id(spec))
    for name, value in vars(spec).items():
        if value is WrappedTorchNorm:
            setattr(spec, name, RMSNorm)
        elif isinstance(value, list | tuple):
            for item in value:
                replace_norms(item, visited)
        else:
            replace_norms(value, visited)


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> ModuleSpec:
    """The decoder's block spec: Transformer Engine's layers, or local ones with what they lack."""
    transformer = config.transformer
    spec = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        vp_stage=vp_stage,
    )
    if transformer.transformer_impl == "local":
        replace_norms(spec)
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
            keep_expert_norm_key(layer)
        return spec
    for layer in spec.layer_specs:
        fuse_attention_input(layer)
        if transformer.use_transformer_engine_op_fuser:
            fuse_dense_mlp(layer)
    return spec


def fuse_dense_mlp(layer: ModuleSpec) -> None:
    """Run a layer's MLP, if it has no experts, as one of Transformer Engine's fused sequences.

    Megatron's block spec leaves use_transformer_engine_op_fuser out: it would mean experts only.
    """
    if getattr(layer.submodules.mlp, "func", None) is not MoELayer:
        from megaqwen.training import swiglu_mlp  # which needs Transformer Engine

        fused_sequences.install()
        swiglu_mlp.install()
        layer.submodules.mlp = get_mlp_module_spec_for_backend(
            TESpecProvider(), use_te_op_fuser=True
        )


def keep_expert_norm_key(layer: ModuleSpec) -> None:
    """Save the norm before experts under Transformer Engine's key, so that either kind loads it.

    Megatron's local layers name it as if it were fused with a plain MLP, in layers with experts too.
    """
    if getattr(layer.submodules.mlp, "func", None) is MoELayer:
        keys = layer.submodules.sharded_state_dict_keys_map
        layer.submodules.sharded_state_dict_keys_map = {
            key: value for key, value in keys.items() if key != "pre_mlp_layernorm."
        }


def model_config(arguments: Namespace) -> GPTModelConfig:
    """The model that Megatron's validated arguments describe."""
    config = gpt_config_from_args(arguments)
    config.transformer_layer_spec = layer_spec
    on_gpu = config.transformer.transformer_impl == "transformer_engine"
    if on_gpu and not arguments.cross_entropy_loss_fusion and not arguments.fp16:
        config.pre_wrap_hooks.append(use_fused_loss)
    return config
