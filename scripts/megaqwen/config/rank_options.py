"""Which of training's options the parity gates take over, and how many ranks they need for it.

What is left out changes how fast a training is, where it saves or how long it goes on, but neither its
model nor a step of its optimizer.
"""

import math
from collections.abc import Mapping
from typing import Any

from megaqwen.errors import InputError

# How Megatron shares out a model among ranks: its checkpoints load under any of it.
PARALLEL = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
LAYOUT = (*PARALLEL, "moe_token_dispatcher_type", "use_distributed_optimizer")
DTYPE = ("bf16", "fp16", "fp8", "fp8_recipe", "fp4")
# How a GPU computes a forward pass, beside the dtype; the local layers of a CPU know none of it.
ON_GPU = (
    "attention_backend",
    "attention_softmax_in_fp32",
    "apply_rope_fusion",
    "bias_swiglu_fusion",
    "first_last_layers_bf16",
    "fp32_residual_connection",
    "fp8_amax_compute_algo",
    "fp8_amax_history_len",
    "fp8_margin",
    "fp8_output_proj",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_dtype",
    "moe_router_fusion",
    "moe_router_padding_for_fp8",
    "moe_router_padding_for_quantization",
    "num_layers_at_end_in_bf16",
    "num_layers_at_start_in_bf16",
    "te_precision_config_file",
    "use_te_activation_func",
    "use_transformer_engine_op_fuser",
)
# How long a text the models are compared over.
LENGTH = ("seq_length",)
OPTIMIZER = (
    "optimizer",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "weight_decay",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr_style",
    "apply_wd_to_qk_layernorm",
    "clip_grad",
)
SCHEDULE = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_warmup_iters",
    "lr_warmup_fraction",
    "lr_warmup_init",
    "train_iters",
)
OF_ONE_RUN = ("lr_decay_style", "context_parallel_size")
"""What changes a verdict before training and is no reason to train again."""


def taken(train: Mapping[str, Any], *names: tuple[str, ...]) -> dict[str, Any]:
    """The options of some of the groups above that a config sets."""
    return {name: train[name] for group in names for name in group if name in train}


def deciding(train: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide the verdict before training: another learning rate asks for no other."""
    return taken(train, LENGTH, LAYOUT, DTYPE, ON_GPU, OPTIMIZER)


def ranks_of_copies(train: Mapping[str, Any]) -> tuple[int, int]:
    """The ranks that hold one copy of the model outside its experts, and those that hold all experts."""
    pipeline: int = train.get("pipeline_model_parallel_size", 1)
    tensor: int = train.get("tensor_model_parallel_size", 1)
    context: int = train.get("context_parallel_size", 1)
    expert: int = train.get("expert_model_parallel_size", 1)
    expert_tensor: int = train.get("expert_tensor_parallel_size") or tensor
    return pipeline * tensor * context, pipeline * expert * expert_tensor


def ranks_of_replica(train: Mapping[str, Any]) -> int:
    """The fewest ranks that can train a model: whole copies of it, and of its experts."""
    return math.lcm(*ranks_of_copies(train))


def ranks_of_layout(train: Mapping[str, Any]) -> int:
    """The fewest ranks over which Megatron lays out the model as in training.

    Context parallelism, which needs a GPU, and copies of the model count for nothing here.
    """
    return ranks_of_replica({**train, "context_parallel_size": 1})


def nodes_for(ranks: int, most: int) -> int:
    """The fewest nodes that share ranks evenly, at most `most` on each; 0: any number on one."""
    if not most:
        return 1
    return next(n for n in range(1, ranks + 1) if ranks % n == 0 and ranks // n <= most)


def number_format(train: Mapping[str, Any]) -> str:
    """The dtype that training computes in, by torch's name, or Megatron's for what torch has no name."""
    for name in ("fp8", "fp4"):
        if train.get(name):
            return name
    return "bfloat16" if train.get("bf16") else "float16" if train.get("fp16") else "float32"


def check_ranks(train: Mapping[str, Any], ranks: int) -> None:
    """InputError where the ranks of a job are not as many as training's layout takes."""
    needed = ranks_of_layout(train)
    if ranks % needed:
        raise InputError(
            f"the layout under train takes {needed} ranks, and parity runs on {ranks}: start it as"
            f" python scripts/launch.py --ranks-per-node {needed} --log LOG scripts/parity.py ..."
        )
