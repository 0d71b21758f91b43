"""The cases of benchmark_training.py: shapes of published Qwens, and how they are trained."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from shapes import shape_config

EXPERIMENTS = Path(__file__).parents[2] / "config" / "experiments"

TRAIN: dict[str, Any] = {
    "seq_length": 4096,
    "lr": 1e-5,
    "lr_warmup_iters": 0,
    "lr_decay_style": "constant",
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "bf16": True,
    "eval_iters": 0,
    "log_interval": 1,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training."""

    shape: str
    layers: int | None = None
    """None: as many as the model has."""
    micro: int
    """Samples of a micro batch."""
    accumulate: int
    """Micro batches of an iteration."""
    options: dict[str, Any] = field(default_factory=dict)
    """Megatron's, over TRAIN."""
    environment: dict[str, str] = field(default_factory=dict)
    iterations: int = 7
    saves: bool = False
    """Measure the checkpoints: how long training stands still for each."""
    profiled: bool = False
    """Measure the kernels of the third iteration."""
    library: str = "megatron"
    """Or transformers: with torch.compile, as the yardstick."""
    narrow: bool = False
    """Of a size for a CPU."""

    def hf_config(self) -> dict[str, Any]:
        """The model's config.json."""
        return shape_config(self.shape, self.layers, small=self.narrow)


def small(case: Case) -> Case:
    """The case with a shape that a CPU can train, and no option that it can not."""
    return replace(
        case,
        narrow=True,
        layers=2,
        micro=1,
        accumulate=2,
        iterations=4,
        options={"seq_length": 64, "bf16": False},
    )


# Less optimizer state a weight, so that more layers of a large model fit: their speed is measured.
LEAN = {
    "use_distributed_optimizer": True,
    "use_precision_aware_optimizer": True,
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TENSORWISE = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
DELAYED = {
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
    "fp8_amax_history_len": 16,
    "fp8_amax_compute_algo": "max",
}
EXPERTS = {
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "moe_router_dtype": "fp32",
}
TWICE = {"save_interval": 3}
ASYNC = {"async_save": True}
# Captured after one iteration in place of three, so that a case stays short.
GRAPHS = {"cuda_graph_impl": "transformer_engine", "cuda_graph_warmup_steps": 1}
# How many tokens an expert gets is known on the GPU alone: what comes before can be captured.
BEFORE_EXPERTS = {"cuda_graph_modules": ["attn", "moe_router", "moe_preprocess"]}
# On the GPU 4 bytes a weight, and 16 for each that stays there; in the host's memory 18 for the others.
OFFLOAD = {
    "use_distributed_optimizer": True,
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": "bf16",
    "optimizer_cpu_offload": True,
    "overlap_cpu_optimizer_d2h_h2d": True,
}


def qwen_8b(options: dict[str, Any], iterations: int = 4) -> Case:
    """As many of its 36 layers as fit."""
    return Case(
        shape="Qwen3-8B",
        layers=14,
        micro=2,
        accumulate=32,
        iterations=iterations,
        options={**LEAN, **options},
    )


def qwen_30b(options: dict[str, Any], iterations: int = 6) -> Case:
    """Few of its 48 layers, all of their experts."""
    return Case(
        shape="Qwen3-30B-A3B",
        layers=6,
        micro=4,
        accumulate=16,
        iterations=iterations,
        options={**LEAN, **EXPERTS, **options},
        profiled=True,
    )


def shipped(experiment: str, shape: str, layers: int) -> Case:
    """What config/experiments trains, on one GPU, with as many layers as fit it."""
    train = yaml.safe_load((EXPERIMENTS / f"{experiment}.yaml").read_text())["train"]
    one_gpu = {name: value for name, value in train.items() if name not in NOT_ON_ONE_GPU}
    micro = one_gpu.pop("micro_batch_size")
    options = {**one_gpu, "eval_iters": 0}
    return Case(
        shape=shape, layers=layers, micro=micro, accumulate=16, iterations=5, options=options
    )


NOT_ON_ONE_GPU = {
    *("tensor_model_parallel_size", "sequence_parallel", "expert_model_parallel_size"),
    *("global_batch_size", "train_iters", "save_interval", "eval_interval", "lr_warmup_iters"),
}
SMALL_ONE = {"shape": "Qwen2.5-1.5B", "micro": 4}
CASES: dict[str, Case] = {
    "1.5b": Case(**SMALL_ONE, accumulate=16, iterations=6, profiled=True),
    "1.5b-plain": Case(  # as it was without the kernels of ours and Transformer Engine's sequences
        shape="Qwen2.5-1.5B",
        micro=2,
        accumulate=32,
        options={
            "gradient_accumulation_fusion": False,
            "cross_entropy_loss_fusion": True,
            "use_transformer_engine_op_fuser": False,
        },
    ),
    "1.5b-transformers": Case(
        shape="Qwen2.5-1.5B", micro=2, accumulate=32, iterations=4, library="transformers"
    ),
    "1.5b-save": Case(**SMALL_ONE, accumulate=2, iterations=6, saves=True, options=TWICE),
    "1.5b-save-async": Case(  # the first is on the disk before the second begins
        **SMALL_ONE, accumulate=3, iterations=40, saves=True, options={**ASYNC, "save_interval": 20}
    ),
    "1.5b-long": Case(**SMALL_ONE, accumulate=32, iterations=5),
    "1.5b-mbs6": Case(**{**SMALL_ONE, "micro": 6}, accumulate=21, iterations=5),
    "1.5b-flash": Case(  # by FlashAttention, which is no dependency of ours
        **SMALL_ONE, accumulate=32, iterations=5, options={"attention_backend": "flash"}
    ),
    "1.5b-te-norms": Case(  # Transformer Engine's own kernels
        **SMALL_ONE,
        accumulate=32,
        iterations=5,
        environment={"NVTE_NORM_FWD_USE_CUDNN": "0", "NVTE_NORM_BWD_USE_CUDNN": "0"},
    ),
    "1.5b-graphs": Case(**SMALL_ONE, accumulate=16, iterations=5, options=GRAPHS),
    "1.5b-graphs-fused": Case(
        **SMALL_ONE,
        accumulate=16,
        iterations=5,
        options={**GRAPHS, "use_transformer_engine_op_fuser": True},
    ),
    "8b": qwen_8b({}),
    "8b-long": replace(qwen_8b({}), accumulate=64),
    "8b-mbs4": replace(qwen_8b({}), layers=12, micro=4),
    "8b-fp8": qwen_8b(TENSORWISE),
    "8b-fp8-delayed": qwen_8b(DELAYED),
    "8b-graphs": qwen_8b(GRAPHS, iterations=5),
    "8b-fp8-graphs": qwen_8b({**TENSORWISE, **GRAPHS}, iterations=5),
    "30b-a3b": qwen_30b({}),
    "30b-a3b-gc": qwen_30b({"manual_gc": True}),  # Python collects no garbage by itself
    "30b-a3b-graphs": qwen_30b({**GRAPHS, **BEFORE_EXPERTS}, iterations=7),
    "8b-shipped": shipped("qwen3-8b", "Qwen3-8B", layers=8),
    "30b-a3b-shipped": shipped("qwen3-30b-a3b", "Qwen3-30B-A3B", layers=4),
    "7b-whole": Case(  # the largest that trains on 80 GB without offloading
        shape="Qwen2.5-7B",
        micro=1,
        accumulate=16,
        iterations=4,
        options={**LEAN, **FULL, "main_grads_dtype": "bf16"},
    ),
    "8b-whole": Case(  # takes 130 GB of the host's memory
        shape="Qwen3-8B",
        micro=2,
        accumulate=16,
        iterations=3,
        options={**OFFLOAD, **FULL, "optimizer_offload_fraction": 0.75},
    ),
    "14b-whole": Case(  # takes 300 GB of the host's memory
        shape="Qwen3-14B",
        micro=2,
        accumulate=16,
        iterations=3,
        options={**OFFLOAD, **FULL, "optimizer_offload_fraction": 1.0},
    ),
}
