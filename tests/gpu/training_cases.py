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
    """Measure the checkpoint after the last iteration."""
    profiled: bool = False
    """Measure the kernels of the third iteration."""
    library: str = "megatron"
    """Or transformers: with torch.compile, as the yardstick."""

    def hf_config(self) -> dict[str, Any]:
        """The model's config.json."""
        shape = SHAPES[self.shape]
        return {**shape, "num_hidden_layers": self.layers or shape["num_hidden_layers"]}


def SMALL(case: Case) -> Case:
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


CASES: dict[str, Case] = {
    "1.5b": Case(shape="qwen2.5-1.5b", micro=4, accumulate=16),
}
