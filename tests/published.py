"""What the config.json of each public size says, as far as it decides weights or arithmetic.

Sources, by the last word of a row:
- litgpt: litgpt/config.py of github.com/Lightning-AI/litgpt, which cites each config.json on the Hub
- report: the Qwen2 technical report's table of sizes, and the model's page on the Hub
- trtllm: QWEN2_57B_A14B_CONFIG in the tests of github.com/NVIDIA/TensorRT-LLM
- defaults: transformers' Qwen2MoeConfig, documented as this model's; its positions from its page

Parameters are those that the Hub shows, or for tied models whose files hold the output head a second
time, those without it.
"""

from dataclasses import dataclass
from typing import Any

SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
EXPERTS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


@dataclass(frozen=True)
class Published:
    """One public size."""

    name: str
    model_type: str
    shape: tuple[int, ...]
    tied: bool
    epsilon: float
    parameters: int
    source: str
    experts: tuple[int, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The facts under config.json's names."""
        facts: dict[str, Any] = {
            "model_type": self.model_type,
            "hidden_act": "silu",
            **dict(zip(SHAPE, self.shape, strict=True)),
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": self.epsilon,
            "rope_theta": 1_000_000.0,
            "use_sliding_window": False,
            "sliding_window": self.shape[-1],
        }
        if self.model_type.startswith("qwen3"):
            facts |= {"head_dim": 128, "attention_bias": False, "rope_scaling": None}
        if self.experts:
            facts |= dict(zip(EXPERTS, self.experts, strict=False))
            facts |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
            facts["norm_topk_prob"] = self.model_type == "qwen3_moe"
        return facts


def dense(name: str, *facts: Any) -> Published:
    """A row without experts."""
    return Published(name, "qwen3" if name.startswith("Qwen3") else "qwen2", *facts)


# layers, hidden, ffn, heads, groups, vocabulary, positions; tied; epsilon; parameters; source
# fmt: off
PUBLISHED = [
    dense("Qwen2-0.5B", (24, 896, 4864, 14, 2, 151936, 131072), True, 1e-6, 494_032_768, "report"),
    dense("Qwen2-1.5B", (28, 1536, 8960, 12, 2, 151936, 131072), True, 1e-6, 1_543_714_304, "report"),
    dense("Qwen2-7B", (28, 3584, 18944, 28, 4, 152064, 131072), False, 1e-6, 7_615_616_512, "report"),
    dense("Qwen2-72B", (80, 8192, 29568, 64, 8, 152064, 131072), False, 1e-5, 72_706_203_648, "report"),
    dense("Qwen2.5-0.5B", (24, 896, 4864, 14, 2, 151936, 32768), True, 1e-6, 494_032_768, "litgpt"),
    dense("Qwen2.5-1.5B", (28, 1536, 8960, 12, 2, 151936, 131072), True, 1e-6, 1_543_714_304, "litgpt"),
    dense("Qwen2.5-3B", (36, 2048, 11008, 16, 2, 151936, 32768), True, 1e-6, 3_085_938_688, "litgpt"),
    dense("Qwen2.5-7B", (28, 3584, 18944, 28, 4, 152064, 131072), False, 1e-6, 7_615_616_512, "litgpt"),
    dense("Qwen2.5-14B", (48, 5120, 13824, 40, 8, 152064, 131072), False, 1e-5, 14_770_033_664, "litgpt"),
    dense("Qwen2.5-32B", (64, 5120, 27648, 40, 8, 152064, 131072), False, 1e-5, 32_763_876_352, "litgpt"),
    dense("Qwen2.5-72B", (80, 8192, 29568, 64, 8, 152064, 131072), False, 1e-5, 72_706_203_648, "litgpt"),
    dense("Qwen3-0.6B", (28, 1024, 3072, 16, 8, 151936, 40960), True, 1e-6, 596_049_920, "litgpt"),
    dense("Qwen3-1.7B", (28, 2048, 6144, 16, 8, 151936, 40960), True, 1e-6, 1_720_574_976, "litgpt"),
    dense("Qwen3-4B", (36, 2560, 9728, 32, 8, 151936, 40960), True, 1e-6, 4_022_468_096, "litgpt"),
    dense("Qwen3-8B", (36, 4096, 12288, 32, 8, 151936, 40960), False, 1e-6, 8_190_735_360, "litgpt"),
    dense("Qwen3-14B", (40, 5120, 17408, 40, 8, 151936, 40960), False, 1e-6, 14_768_307_200, "litgpt"),
    dense("Qwen3-32B", (64, 5120, 25600, 64, 8, 151936, 40960), False, 1e-6, 32_762_123_264, "litgpt"),
    Published("Qwen1.5-MoE-A2.7B", "qwen2_moe", (24, 2048, 5632, 16, 16, 151936, 8192), False, 1e-6,
              14_315_784_192, "defaults", (60, 4, 1408, 5632)),
    Published("Qwen2-57B-A14B", "qwen2_moe", (28, 3584, 18944, 28, 4, 151936, 131072), False, 1e-6,
              57_408_658_944, "trtllm", (64, 8, 2560, 20480)),
    Published("Qwen3-30B-A3B", "qwen3_moe", (48, 2048, 6144, 32, 4, 151936, 40960), False, 1e-6,
              30_532_122_624, "litgpt", (128, 8, 768)),
    Published("Qwen3-235B-A22B", "qwen3_moe", (94, 4096, 12288, 64, 4, 151936, 40960), False, 1e-6,
              235_093_634_560, "litgpt", (128, 8, 1536)),
]
# fmt: on


def published_config(name: str) -> dict[str, Any]:
    """config.json of a public size, as far as it is here."""
    (found,) = (each for each in PUBLISHED if each.name == name)
    return found.config
