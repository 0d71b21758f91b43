"""Whether the values of a config go together, whatever the model and the number of ranks.

Each mistake states the arithmetic and the nearest choice that works. Megatron asserts most of this
too, but only after every rank has started.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megaqwen.config.mistakes import Mistake, listed, shown
from megaqwen.config.sections import LARGEST_SEED, Checkpoints

Train = Mapping[str, Any]
Found = Iterator[tuple[str, str]]

AT_LEAST_ONE = """
    seq_length micro_batch_size global_batch_size train_iters save_interval log_interval
    eval_interval eval_micro_batch_size eval_global_batch_size tensor_model_parallel_size
    context_parallel_size pipeline_model_parallel_size expert_model_parallel_size
    expert_tensor_parallel_size num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers recompute_num_layers tensorboard_log_interval lr_decay_iters"""
AT_LEAST_ZERO = """
    lr min_lr weight_decay clip_grad lr_warmup_iters eval_iters seed num_workers adam_beta1
    adam_beta2 adam_eps"""
VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
# What an option needs to be set as well.
NEEDS = (
    ("overlap_param_gather", "use_distributed_optimizer"),
    ("overlap_param_gather", "overlap_grad_reduce"),
    ("use_precision_aware_optimizer", "use_distributed_optimizer"),
    ("fp16_lm_cross_entropy", "fp16"),
    ("fp8_param_gather", "fp8"),
    ("fp4_param_gather", "fp4"),
    ("recompute_method", "recompute_granularity"),
    ("recompute_num_layers", "recompute_method"),
    ("recompute_modules", "recompute_granularity"),
    ("distribute_saved_activations", "recompute_method"),
    ("dist_ckpt_workers", "async_save"),
    ("dist_ckpt_workers", "ckpt_assume_constant_structure"),
)
EXCLUDE = (
    ("fp16", "bf16"),
    ("fp8", "fp4"),
    # Its count of steps becomes several, of which the optimizer saves one.
    ("optimizer_cuda_graph", "use_distributed_optimizer"),
    ("lr_warmup_fraction", "lr_warmup_iters"),
    ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
    ("num_layers_per_virtual_pipeline_stage", "pipeline_model_parallel_layout"),
    ("num_virtual_stages_per_pipeline_rank", "pipeline_model_parallel_layout"),
    ("distribute_saved_activations", "sequence_parallel"),
)
# What selective recomputation can recompute of a Qwen, and what that needs.
RECOMPUTED = {
    "core_attn": None,
    "layernorm": None,
    "mlp": None,
    "moe": None,
    "shared_experts": None,
    "moe_act": "moe_grouped_gemm",
}


def train_mistakes(train: Train) -> list[Mistake]:
    """What Megatron's options say against each other, whatever the model and the ranks.

    Args:
        train: Options in canonical form; those that are missing or wrong are reported elsewhere.
    """
    found = [
        *bound_mistakes(train),
        *combination_mistakes(train),
        *batch_mistakes(train),
        *schedule_mistakes(train),
        *parallel_mistakes(train),
        *resume_mistakes(train),
    ]
    return [Mistake(("train", name), text) for name, text in found]


def bound_mistakes(train: Train) -> Found:
    """Sizes below 1, amounts below 0, and a seed that is none of NumPy's."""
    for names, least in ((AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
        for name in names.split():
            if name in train and train[name] < least:
                yield name, f"{shown(train[name])} is given, at least {least} is allowed"
    # Megatron's _set_random_seed adds 100 for each pipeline stage, and gives the sum to NumPy.
    largest = LARGEST_SEED - 100 * (train.get("pipeline_model_parallel_size", 1) - 1)
    if train.get("seed", 1) > largest:
        yield "seed", f"{train['seed']} is given, at most {largest} is allowed"


def combination_mistakes(train: Train) -> Found:
    """Options that need or exclude one another."""
    for name, needed in NEEDS:
        if train.get(name) and not train.get(needed):
            yield name, f"needs train.{needed}: set that as well, or leave this out"
    for name, other in EXCLUDE:
        if train.get(name) and train.get(other):
            yield name, f"cannot be set together with train.{other}: choose one"
    if train.get("recompute_granularity") == "selective" and train.get("recompute_method"):
        text = "is for recompute_granularity: full: leave it out, or name recompute_modules instead"
        yield "recompute_method", text
    yield from recomputed_mistakes(train)
    how = [train.get("recompute_method"), train.get("recompute_num_layers")]
    if train.get("recompute_granularity") == "full" and not all(how):
        text = "full needs train.recompute_method (uniform or block) and train.recompute_num_layers"
        yield "recompute_granularity", text
    if "quantile_balancing" in train.get("moe_router_load_balancing_type", ()):
        text = (
            '"quantile_balancing" is given, but its router chooses experts by a bias that a Qwen does not'
            " have: aux_loss, seq_aux_loss and global_aux_loss are allowed"
        )
        yield "moe_router_load_balancing_type", text


def recomputed_mistakes(train: Train) -> Found:
    """The modules that are recomputed."""
    name, modules = "recompute_modules", train.get("recompute_modules") or []
    if modules and train.get("recompute_granularity") == "full":
        yield name, "is for recompute_granularity: selective: full recomputes whole layers"
    for module in modules:
        if module not in RECOMPUTED:
            yield name, f"{module!r} is no part of a Qwen: {listed(list(RECOMPUTED))} is allowed"
        elif (needed := RECOMPUTED[module]) and not train.get(needed):
            yield name, f"{module} needs train.{needed}: set that as well, or leave {module} out"


def batch_mistakes(train: Train) -> Found:
    """A global batch is a whole number of micro batches."""
    for prefix in ("", "eval_"):
        micro = train.get(prefix + "micro_batch_size")
        whole = train.get(prefix + "global_batch_size")
        if micro and whole and micro > 0 and whole > 0 and whole % micro:
            text = f"{whole} is not a multiple of {prefix}micro_batch_size {micro}"
            yield (
                prefix + "global_batch_size",
                f"{text}: {nearest_multiples(whole, micro)} would be",
            )


def schedule_mistakes(train: Train) -> Found:
    """The learning rate's schedule."""
    lr, least = train.get("lr"), train.get("min_lr", 0.0)
    if lr is not None and least > lr:
        yield "min_lr", f"{least:g} is more than lr {lr:g}"
    iterations, warmup = train.get("train_iters"), train.get("lr_warmup_iters", 0)
    decay = train.get("lr_decay_iters", iterations)
    if decay is not None and warmup >= decay > 0:
        until = "lr_decay_iters" if "lr_decay_iters" in train else "train_iters"
        yield "lr_warmup_iters", f"{warmup} is not less than {until} {decay}"
    fraction = train.get("lr_warmup_fraction", 0.0)
    if not 0 <= fraction < 1:
        yield "lr_warmup_fraction", f"{fraction:g} is given, at least 0 and less than 1 is allowed"
    if train.get("lr_decay_style") == "WSD" and "lr_wsd_decay_iters" not in train:
        yield "lr_decay_style", "WSD needs train.lr_wsd_decay_iters: the length of its last phase"


def fp8_recipe(train: Train) -> str | None:
    """How numbers in FP8 are scaled, as Megatron reads the options; None without FP8."""
    return train.get("fp8_recipe", "delayed") if train.get("fp8") else None


def resume_mistakes(train: Train) -> Found:
    """What Megatron-Core 0.19.2 does not save or not load, so that a training would go on as another."""
    recipe = fp8_recipe(train)
    if train.get("optimizer_cpu_offload") and train.get("optimizer_offload_fraction", 1.0) == 0:
        text = "0 leaves all on the GPU, whose count of steps is not saved: leave the offload out"
        yield "optimizer_offload_fraction", text
    if train.get("optimizer_cpu_offload") and not (train.get("bf16") or train.get("fp16")):
        text = "needs train.bf16: weights in float32 it takes from before the checkpoint is loaded"
        yield "optimizer_cpu_offload", text
    if train.get("optimizer") == "sgd":
        yield (
            "optimizer",
            "sgd is given, whose states Megatron does not load again: adam is allowed",
        )
    if recipe == "delayed" and train.get("use_transformer_engine_op_fuser"):
        text = "cannot be set with fp8_recipe delayed, whose scales it does not save: leave it out"
        yield "use_transformer_engine_op_fuser", text
    if recipe == "delayed" and train.get("fp8_param_gather"):
        if train.get("stream_ckpt_dequant"):
            text = "rounds weights before the scales of fp8_recipe delayed are loaded: leave it out"
            yield "stream_ckpt_dequant", text
        if train.get("moe_grouped_gemm"):
            text = (
                "is given with fp8_recipe delayed and moe_grouped_gemm, whose scales are not loaded"
            )
            yield "fp8_param_gather", f"{text}: fp8_recipe tensorwise and blockwise are allowed"
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if recipe not in (None, "delayed") and (kind := train.get(name)) in ("fp16", "fp8"):
            text = f"{kind} is given with fp8_recipe {recipe}, where its scales are not saved"
            yield name, f"{text}: fp32 and bf16 are allowed"
    if train.get("moe_router_force_biased", 0.0) < 0:
        yield (
            "moe_router_force_biased",
            "below 0 draws a bias that is not saved: 0 or more is allowed",
        )
    if (
        train.get("moe_router_force_load_balancing")
        and train.get("expert_model_parallel_size", 1) > 1
    ):
        text = (
            "draws numbers whose state is not saved with train.expert_model_parallel_size above 1"
        )
        yield "moe_router_force_load_balancing", f"{text}: leave it out"
    if train.get("qk_clip") and train.get("eval_iters", 1):
        text = "also goes by what evaluations see, which is not saved: set train.eval_iters 0"
        yield "qk_clip", text
    yield from iteration_mistakes(train)


def iteration_mistakes(train: Train) -> Found:
    """Iterations with which a training would not come to its end."""
    last, save, evaluate = (
        train.get(name) for name in ("train_iters", "save_interval", "eval_interval")
    )
    for skipped in train.get("iterations_to_skip") or ():
        if last and (skipped == last or (save and save > 0 and skipped % save == 0)):
            text = f"{skipped} is to be saved (train_iters {last}, save_interval {save}) and would not be"
            yield (
                "iterations_to_skip",
                f"{text}: another save_interval would do, or more iterations",
            )
    start = train.get("start_eval_at_iter")
    if start is None or not last or last < 1:
        return
    if start > last:
        text = f"{start} is more than train_iters {last}: for no evaluation set train.eval_iters 0"
        yield "start_eval_at_iter", text
    elif evaluate and evaluate > 0 and start > 0 and start % evaluate == 0:
        text = f"{start} is a multiple of eval_interval {evaluate}, whose samples Megatron does not count"
        yield "start_eval_at_iter", f"{text}: {start - 1} begins at the same iteration"


def checkpoint_mistakes(checkpoints: Checkpoints, train: Train) -> list[Mistake]:
    """Which checkpoints stay, against when they are saved."""
    every, saved = checkpoints.keep_every, train.get("save_interval")
    found = []
    if every and not checkpoints.keep_last:
        found.append(f"{every} is given, but keep_last 0 keeps all: give keep_last 1 or more")
    if every and saved and saved > 0 and every % saved:
        text = f"{every} is not a multiple of train.save_interval {saved}"
        found.append(f"{text}: {nearest_multiples(every, saved)} would be")
    return [Mistake(("checkpoints", "keep_every"), text) for text in found]


def parallel_mistakes(train: Train) -> Found:
    """How the model is cut, as far as no model is needed to know."""
    tensor = train.get("tensor_model_parallel_size", 1)
    pipeline = train.get("pipeline_model_parallel_size", 1)
    context, sequence = train.get("context_parallel_size", 1), train.get("seq_length", 0)
    if min(tensor, pipeline, context) < 1 or sequence < 0:
        return
    if train.get("iterations_to_skip") and pipeline > 1:
        text = "needs train.pipeline_model_parallel_size 1: Megatron has all stages read what is skipped"
        yield "iterations_to_skip", text
    if train.get("sequence_parallel") and tensor == 1:
        text = "true needs train.tensor_model_parallel_size of 2 or more: with 1, leave it out"
        yield "sequence_parallel", text
    if train.get("sequence_parallel") and sequence % (tensor * context):
        text = (
            f"{sequence} is not a multiple of tensor parallel {tensor} x context parallel {context}"
        )
        near = nearest_multiples(sequence, tensor * context)
        yield "seq_length", f"{text}, which sequence_parallel needs: {near} would be"
    if context > 1 and sequence % (2 * context):
        text = f"{sequence} is not a multiple of 2 x context_parallel_size {context}"
        yield "seq_length", f"{text}: {nearest_multiples(sequence, 2 * context)} would be"
    for name in VIRTUAL:
        if name in train and pipeline == 1:
            yield name, "needs train.pipeline_model_parallel_size of 2 or more"
        elif name in train and pipeline == 2 and not train.get("overlap_p2p_comm", True):
            text = "needs train.overlap_p2p_comm, or 3 or more pipeline stages"
            yield name, text


def nearest_multiples(number: int, of: int) -> str:
    """The multiples of `of` around `number`, in words."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)
