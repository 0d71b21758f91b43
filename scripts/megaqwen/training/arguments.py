"""Megatron's command line for a run: the config's options, the model's, and what we manage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaqwen.architecture import megatron_options
from megaqwen.config import Config
from megaqwen.config.combinations import fp8_recipe
from megaqwen.config.cpu import cpu_mistakes
from megaqwen.config.megatron_options import to_arguments
from megaqwen.errors import InputError

# Without a GPU: Megatron's own settings for the local implementation over gloo.
CPU_OPTIONS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
}
# Megatron's local implementation would pass over the first two; the third's worker is CUDA's.
NEED_GPU = ("use_transformer_engine_op_fuser", "use_te_activation_func", "async_save")
# With a GPU: Transformer Engine over NCCL.
GPU_OPTIONS: dict[str, Any] = {
    "distributed_backend": "nccl",
    "transformer_impl": "transformer_engine",
}


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """The directories of one training."""

    pretrained: Path
    """Convert's torch_dist checkpoint: where the weights come from at the first start."""
    checkpoints: Path
    """Where training saves, and resumes from."""
    tensorboard: Path


def training_options(
    config: Config, hf_config: Mapping[str, Any], paths: RunPaths, *, gpu: bool
) -> dict[str, Any]:
    """All options by their argparse dests.

    Raises:
        InputError: The config asks for something that a machine without a GPU cannot do.
    """
    chosen: dict[str, Any] = dict(config.train)
    managed = {
        "save": str(paths.checkpoints),
        "load": str(paths.checkpoints),
        "pretrained_checkpoint": str(paths.pretrained),
        "tensorboard_dir": str(paths.tensorboard),
        "ckpt_format": "torch_dist",
        "dist_ckpt_optim_fully_reshardable": True,
        # The text is tokenized already: Megatron's own tokenizer is never asked.
        "tokenizer_type": "NullTokenizer",
        "vocab_size": hf_config["vocab_size"],
        "create_attention_mask_in_dataloader": False,
        "exit_signal_handler": True,
        # Else Megatron would compute a NaN again, save what was before, and wait for another GPU.
        "rerun_mode": "disabled",
    }
    if config.data.kind == "sft":
        # Gradients are averaged over target tokens, of which micro batches and ranks have unlike numbers.
        managed["calculate_per_token_loss"] = True
    architecture = megatron_options(hf_config, chosen.get("tensor_model_parallel_size", 1))
    options = {
        # Megatron divides by it, whether or not it evaluates.
        "eval_interval": chosen["train_iters"],
        **architecture,
        **(gpu_options(chosen, architecture) if gpu else cpu_options(chosen)),
        **chosen,
        **managed,
    }
    return options


def gpu_options(chosen: Mapping[str, Any], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """What a machine with a GPU needs, and what is faster there.

    Transformer Engine runs a dense MLP as one sequence of fused operations: of a Qwen2.5-1.5B on an H100
    its SwiGLU takes 172 ms an iteration where Megatron's compiled one takes 211 of 2,690. Not where that
    was not tried or is not whole: with tensor parallelism, experts, CUDA graphs, parameters in FP8, or
    the delayed recipe, whose scales such a sequence does not save.
    """
    options = dict(GPU_OPTIONS)
    if chosen.get("async_save"):
        # Without a worker Megatron would save in step; its other strategy is a package of its own.
        options |= {"use_persistent_ckpt_worker": True, "async_strategy": "mcore"}
    if architecture.get("position_embedding_type") == "yarn":
        # Transformer Engine's fused kernel knows nothing of YaRN's attention factor.
        options["apply_rope_fusion"] = False
    delayed = fp8_recipe(chosen) == "delayed"
    if delayed and chosen.get("fp8_param_gather"):
        # Megatron would round them by the scales of a new model, before it loads theirs.
        options["stream_ckpt_dequant"] = False
    if not (
        chosen.get("tensor_model_parallel_size", 1) > 1
        or "num_experts" in architecture
        or chosen.get("cuda_graph_impl", "none") != "none"
        or chosen.get("fp8_param_gather")
        or delayed
    ):
        options["use_transformer_engine_op_fuser"] = True
    return options


def cpu_options(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What a machine without a GPU needs; InputError where the config contradicts it."""
    for name, value in CPU_OPTIONS.items():
        if name in chosen and chosen[name] != value:
            raise InputError(
                f"train.{name} is {chosen[name]!r}, but this machine has no GPU and Megatron then "
                f"needs {value!r}: leave the option out, it is set to what the machine can do"
            )
    for name in NEED_GPU:
        if chosen.get(name):
            raise InputError(f"train.{name} needs a GPU, and this machine has none: leave it out")
    if mistakes := cpu_mistakes(chosen):
        raise InputError("\n  ".join(["this machine cannot train so:", *map(str, mistakes)]))
    options = dict(CPU_OPTIONS)
    if chosen.get("pipeline_model_parallel_size", 1) > 1:
        # Over gloo, virtual stages with batched sends run and are silently wrong.
        options |= {"overlap_p2p_comm": True}
    return options


def training_arguments(
    config: Config, hf_config: Mapping[str, Any], paths: RunPaths, *, gpu: bool
) -> list[str]:
    """`training_options` as the words of a command line."""
    return to_arguments(training_options(config, hf_config, paths, gpu=gpu))
