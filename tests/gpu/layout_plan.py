"""Which trainings layouts.py measures on a number of GPUs, chosen by arithmetic alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shapes import shape_config

DENSE, EXPERTS = "Qwen3-8B", "Qwen3-30B-A3B"
LAYERS = {
    DENSE: 8,
    EXPERTS: 4,
}  # of 36 and 48: on one GPU of 80 GB with all of the optimizer's state
VIRTUAL = 2  # stages of each pipeline rank
MOST_STAGES = {shape: layers // VIRTUAL for shape, layers in LAYERS.items()}
SEQUENCE, LONG_SEQUENCE = 4096, 32768
TOKENS_A_GPU = 8 * SEQUENCE  # in an iteration, however the ranks share them
SIZES = (2, 4, 8)

COMMON: dict[str, Any] = {
    "bf16": True,
    "lr": 1.0e-5,
    "min_lr": 1.0e-5,
    "lr_decay_style": "constant",
    "lr_warmup_iters": 10,  # all of them: without, gradients grow tenfold and any noise with them
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "seed": 1234,
    "eval_iters": 0,
    "log_interval": 1,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
MOE: dict[str, Any] = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "moe_router_dtype": "fp32",
}
FP8: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
# What only Transformer Engine on a GPU does; the rest of a layout runs over gloo as well.
ON_GPU_ALONE = ("bf16", "moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion", *FP8)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training under one layout."""

    name: str
    shape: str
    """A name in LAYERS."""
    ranks: int
    micro: int
    """Samples of a micro batch."""
    sequence: int = SEQUENCE
    """Tokens of a sample."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """The layout, in Megatron's options."""
    precision: str = "bf16"

    @property
    def needs_gpu(self) -> bool:
        """Whether a CPU cannot run it: context parallelism and FP8 are Transformer Engine's."""
        return self.precision == "fp8" or self.sizes.get("context_parallel_size", 1) > 1

    def samples(self, gpus: int) -> int:
        """The global batch: the same tokens under every layout of this many GPUs."""
        return TOKENS_A_GPU * gpus // self.sequence

    def options(self, gpus: int) -> dict[str, Any]:
        """Megatron's options, all but what a smaller copy of it changes."""
        return {
            **COMMON,
            **(MOE if self.shape == EXPERTS else {}),
            **(FP8 if self.precision == "fp8" else {}),
            **self.sizes,
            "seq_length": self.sequence,
            "micro_batch_size": self.micro,
            "global_batch_size": self.samples(gpus),
        }

    def in_fp8(self) -> "Experiment":
        """The same layout in FP8."""
        return replace(self, name=f"{self.name}-fp8", precision="fp8")


def hf_config(shape: str) -> dict[str, Any]:
    """config.json of the published model with fewer layers."""
    return shape_config(shape, LAYERS[shape])


def tensor(size: int) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size, "sequence_parallel": True}


def pipeline(shape: str, gpus: int) -> dict[str, Any]:
    """As many stages as the ranks and layers allow, each with VIRTUAL virtual ones."""
    return {
        "pipeline_model_parallel_size": min(gpus, MOST_STAGES[shape]),
        "num_virtual_stages_per_pipeline_rank": VIRTUAL,
    }


def plan(gpus: int) -> list[Experiment]:
    """The experiments on this many GPUs, the most telling first.

    One rank alone is what the others are compared with. Of several, FP8 is not here: it is tried on
    the best.
    """
    singles = [
        Experiment(name="dense-1", shape=DENSE, ranks=1, micro=2),
        Experiment(name="moe-1", shape=EXPERTS, ranks=1, micro=2),
    ]
    singles += [each.in_fp8() for each in singles]
    return singles if gpus == 1 else [*singles, *several(gpus)]


def several(gpus: int) -> Iterator[Experiment]:
    """Layouts of all the GPUs: first each kind at its largest, then what is between."""
    inner = [size for size in SIZES if size < gpus]

    def dense(name: str, micro: int, **settings: Any) -> Experiment:
        return Experiment(name=f"dense-{name}", shape=DENSE, ranks=gpus, micro=micro, **settings)

    def experts(name: str, micro: int, **settings: Any) -> Experiment:
        return Experiment(name=f"moe-{name}", shape=EXPERTS, ranks=gpus, micro=micro, **settings)

    def expert(size: int) -> dict[str, Any]:
        return {"expert_model_parallel_size": size}

    stages, moe_stages = pipeline(DENSE, gpus), pipeline(EXPERTS, gpus)
    yield dense(f"dp{gpus}", 2)
    # What the fused MLP gains, and what the gathering of parameters behind it.
    yield dense(f"dp{gpus}-unfused", 2, sizes={"use_transformer_engine_op_fuser": False})
    yield dense(f"dp{gpus}-gather-first", 2, sizes={"overlap_param_gather": False})
    yield experts(f"ep{gpus}", 2, sizes=expert(gpus))
    yield dense(f"tp{gpus}", 2, sizes=tensor(gpus))
    yield dense(f"pp{stages['pipeline_model_parallel_size']}-vpp{VIRTUAL}", 1, sizes=stages)
    for size in (each for each in SIZES if each <= min(gpus, 4)):
        context = {"context_parallel_size": size}
        yield dense(f"cp{size}-32k", 1, sizes=context, sequence=LONG_SEQUENCE)
    yield dense(f"tp{gpus}-32k", 1, sizes=tensor(gpus), sequence=LONG_SEQUENCE)
    yield experts(f"dp{gpus}", 2)
    for size in inner:
        yield dense(f"tp{size}", 2, sizes=tensor(size))
        yield experts(f"ep{size}", 2, sizes=expert(size))
    # Attention and embeddings shared by tensor, whole experts by expert parallelism.
    whole = {**tensor(2), **expert(gpus), "expert_tensor_parallel_size": 1}
    yield experts(f"tp2-ep{gpus}", 2, sizes=whole)
    count = moe_stages["pipeline_model_parallel_size"]
    yield experts(f"pp{count}-vpp{VIRTUAL}", 1, sizes=moe_stages)
    yield dense(f"dp{gpus}-mbs4", 4)
    yield experts(f"ep{gpus}-mbs4", 4, sizes=expert(gpus))


SMALL_VOCABULARY = 2560  # no smaller than the tokenizer's
SMALLER = SEQUENCE // 64  # times shorter samples


def small_config(shape: str) -> dict[str, Any]:
    """`hf_config` of a size that a CPU can train."""
    return {**shape_config(shape, LAYERS[shape], small=True), "vocab_size": SMALL_VOCABULARY}


def small_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's options on a CPU."""
    kept = {key: value for key, value in options.items() if key not in ON_GPU_ALONE}
    return {**kept, "seq_length": options["seq_length"] // SMALLER}
