"""The cases of benchmark_training.py: shapes of published Qwens, and how they are trained."""

from dataclasses import dataclass, field, replace
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "silu",
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        **COMMON,
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **COMMON,
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        **COMMON,
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        **COMMON,
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
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

    def hf_config(self) -> dict[str, Any]:
        """The model's config.json."""
        shape = SHAPES[self.shape]
        return {**shape, "num_hidden_layers": self.layers or shape["num_hidden_layers"]}


def small(case: Case) -> Case:
    """The case with a shape that a CPU can train, and no option that it can not."""
    name = f"small-{case.shape}"
    SHAPES.setdefault(
        name,
        {
            **SHAPES[case.shape],
            "hidden_size": 64,
            "intermediate_size": 96,
            **(
                {"moe_intermediate_size": 32, "num_experts": 8}
                if "num_experts" in SHAPES[case.shape]
                else {}
            ),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    )
    return replace(
        case,
        shape=name,
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
    "use_transformer_engine_op_fuser": True,
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


def qwen_8b(options: dict[str, Any]) -> Case:
    """As many of its 36 layers as fit."""
    return Case(
        shape="qwen3-8b",
        layers=14,
        micro=2,
        accumulate=32,
        iterations=5,
        options={**LEAN, **options},
    )


SMALL_ONE = {"shape": "qwen2.5-1.5b", "micro": 4}
CASES: dict[str, Case] = {
    "1.5b": Case(**SMALL_ONE, accumulate=16, profiled=True),
    "1.5b-plain": Case(  # as it was without the kernels of ours and Transformer Engine's sequences
        shape="qwen2.5-1.5b",
        micro=2,
        accumulate=32,
        options={
            "gradient_accumulation_fusion": False,
            "cross_entropy_loss_fusion": True,
            "use_transformer_engine_op_fuser": False,
        },
    ),
    "1.5b-transformers": Case(
        shape="qwen2.5-1.5b", micro=2, accumulate=32, iterations=4, library="transformers"
    ),
    "1.5b-save": Case(**SMALL_ONE, accumulate=2, iterations=6, saves=True, options=TWICE),
    "1.5b-save-async": Case(
        **SMALL_ONE, accumulate=2, iterations=70, saves=True, options={**ASYNC, "save_interval": 35}
    ),
    "8b": qwen_8b({}),
    "8b-fp8": qwen_8b(TENSORWISE),
    "8b-fp8-delayed": qwen_8b(DELAYED),
    "30b-a3b": Case(
        shape="qwen3-30b-a3b",
        layers=6,
        micro=4,
        accumulate=16,
        iterations=6,
        options={**LEAN, **EXPERTS},
        profiled=True,
    ),
    "7b-whole": Case(  # the largest that trains on 80 GB without offloading
        shape="qwen2.5-7b",
        micro=1,
        accumulate=16,
        iterations=4,
        options={**LEAN, **FULL, "main_grads_dtype": "bf16"},
    ),
}
