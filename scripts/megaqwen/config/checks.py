"""Whether a config fits its model and the number of ranks, in arithmetic that needs no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from megaqwen.config.combinations import Found, Train, nearest_multiples
from megaqwen.config.mistakes import Mistake, listed
from megaqwen.config.rank_options import ranks_of_copies
from megaqwen.config.sections import Config

UNEVEN = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
OF_EXPERTS = {"moe", "moe_act", "shared_experts"}  # modules that are recomputed
FEED_FORWARD = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


def check_model_fits(
    config: Config, hf_config: Mapping[str, Any] | None, world_size: int | None
) -> list[str]:
    """What of a config does not fit the model or the number of ranks, one message a mistake.

    Args:
        config: A config whose own checks passed.
        hf_config: The facts of the model's config.json; None leaves out what depends on them.
        world_size: How many ranks there are; None leaves out what depends on it.
    """
    return [str(mistake) for mistake in model_mistakes(config, hf_config, world_size)]


def model_mistakes(
    config: Config, hf_config: Mapping[str, Any] | None, world_size: int | None
) -> list[Mistake]:
    """`check_model_fits` with the paths apart from the texts."""
    train = config.train
    found: list[tuple[str, str]] = []
    if hf_config is not None:
        found += sequence_mistakes(train, hf_config)
        found += width_mistakes(train, hf_config)
        found += layer_mistakes(train, hf_config)
        found += expert_mistakes(train, hf_config)
    if world_size is not None:
        found += rank_mistakes(train, world_size)
    return [Mistake(("train", name), text) for name, text in found]


def sequence_mistakes(train: Train, hf_config: Mapping[str, Any]) -> Found:
    """A sequence is no longer than the positions that the model knows."""
    longest = hf_config.get("max_position_embeddings")
    if longest and train["seq_length"] > longest:
        text = f"{train['seq_length']} is more than the model's max_position_embeddings {longest}"
        yield "seq_length", f"{text}: at most {longest} is allowed"


def width_mistakes(train: Train, hf_config: Mapping[str, Any]) -> Found:
    """Tensor parallel ranks share heads, query groups and feed-forward widths evenly."""
    name = "tensor_model_parallel_size"
    tensor = train.get(name, 1)
    heads: int = hf_config.get("num_attention_heads") or 0
    groups: int = hf_config.get("num_key_value_heads") or heads
    if not heads:
        return

    def group_fits(size: int) -> bool:
        return heads % size == 0 and (groups % size == 0 or size % groups == 0)

    if not group_fits(tensor):
        sizes = listed([size for size in range(1, heads + 1) if group_fits(size)])
        if heads % tensor:
            text = f"the model's {heads} attention heads are not a multiple of {tensor}"
        else:
            text = f"{tensor} neither divides the model's {groups} query groups nor is a multiple"
        yield name, f"{text}: {sizes} is allowed"
    expert_tensor = train.get("expert_tensor_parallel_size", tensor)
    for key in FEED_FORWARD:
        width = hf_config.get(key)
        option, size = name, tensor
        if key == "moe_intermediate_size" and "expert_tensor_parallel_size" in train:
            option, size = "expert_tensor_parallel_size", expert_tensor
        if width and width % size:
            yield option, f"the model's {key} {width} is not a multiple of {size}"


def layer_mistakes(train: Train, hf_config: Mapping[str, Any]) -> Found:
    """Layers are shared out evenly among pipeline stages, but for those that are placed by hand."""
    layers = hf_config.get("num_hidden_layers")
    stages = train.get("pipeline_model_parallel_size", 1)
    if not layers or "pipeline_model_parallel_layout" in train:
        return
    name, what = "pipeline_model_parallel_size", f"the model's {layers} layers"
    placed = [train[option] for option in UNEVEN if option in train]
    extra = sum(
        bool(train.get(f"account_for_{part}_in_pipeline_split")) for part in ("embedding", "loss")
    )
    if placed:
        what += f" less the {sum(placed)} of the first and last stage"
    if extra:
        what += f" and {extra} for embedding and loss"
    left, middle = layers - sum(placed) + extra, stages - len(placed)
    if left < 0 or middle < 0 or (middle == 0) != (left == 0):
        yield name, f"{what} cannot be shared out among {max(middle, 0)} more stages"
    elif middle and left % middle:
        sizes = [size + len(placed) for size in range(1, left + 1) if left % size == 0]
        yield name, f"{what} are not a multiple of {middle}: {listed(sizes)} is allowed"
    elif middle:
        yield from virtual_mistakes(train, left // middle)


def virtual_mistakes(train: Train, layers: int) -> Found:
    """A stage's layers are shared out evenly among its virtual stages."""
    for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        size = train.get(name)
        if size and layers % size:
            sizes = listed([each for each in range(1, layers + 1) if layers % each == 0])
            yield (
                name,
                f"a stage's {layers} layers are not a multiple of {size}: {sizes} is allowed",
            )


def expert_mistakes(train: Train, hf_config: Mapping[str, Any]) -> Found:
    """Experts are shared out evenly among expert parallel ranks."""
    name = "expert_model_parallel_size"
    size = train.get(name, 1)
    experts = hf_config.get("num_experts") or hf_config.get("num_local_experts") or 0
    if not experts:
        for option in (name, "expert_tensor_parallel_size"):
            if train.get(option, 1) > 1:
                text = f"{train[option]} is given, but the model has no experts: leave it out"
                yield option, text
        for module in sorted(OF_EXPERTS & set(train.get("recompute_modules") or [])):
            text = f"{module} is given, but the model has no experts: leave it out"
            yield "recompute_modules", text
    elif experts % size:
        sizes = listed([each for each in range(1, experts + 1) if experts % each == 0])
        yield (
            name,
            f"the model's {experts} experts are not a multiple of {size}: {sizes} is allowed",
        )
    tensor = train.get("tensor_model_parallel_size", 1)
    if experts and tensor > 1 and not train.get("sequence_parallel"):
        yield "sequence_parallel", "has to be true: experts with tensor parallelism need it"


def rank_mistakes(train: Train, world_size: int) -> Iterator[tuple[str, str]]:
    """The ranks are a whole number of model copies, which share out the global batch evenly."""
    sizes = {
        "tensor": train.get("tensor_model_parallel_size", 1),
        "pipeline": train.get("pipeline_model_parallel_size", 1),
        "context": train.get("context_parallel_size", 1),
    }
    tensor, pipeline, context = sizes.values()
    copy, expert_copy = ranks_of_copies(train)
    name = max(sizes, key=lambda kind: sizes[kind])
    option = f"{name}_model_parallel_size".replace("context_model", "context")
    product = f"tensor {tensor} x pipeline {pipeline} x context {context} = {copy}"
    if world_size % copy:
        text = f"{product} ranks hold one copy of the model, and {world_size} is not a multiple"
        near = nearest_multiples(world_size, copy)
        yield option, f"{text}: start {near} ranks, or set it to less"
        return
    if world_size % expert_copy:
        expert = train.get("expert_model_parallel_size", 1)
        expert_tensor = train.get("expert_tensor_parallel_size") or tensor
        text = (
            f"expert {expert} x expert tensor {expert_tensor} x pipeline {pipeline} = {expert_copy}"
        )
        text = f"{text} ranks hold all experts once, and {world_size} is not a multiple"
        near = nearest_multiples(world_size, expert_copy)
        yield "expert_model_parallel_size", f"{text}: start {near} ranks"
    micro, whole = train["micro_batch_size"], train["global_batch_size"]
    step = micro * (world_size // copy)
    if whole % step:
        text = f"{whole} is not a multiple of micro_batch_size {micro} x {world_size // copy} data"
        text = f"{text} parallel ranks ({world_size} ranks / {product})"
        yield "global_batch_size", f"{text}: {nearest_multiples(whole, step)} would be"
    elif is_interleaved(train) and whole // step % pipeline:
        text = f"{whole} makes {whole // step} micro batches, not a multiple of {pipeline} stages"
        near = nearest_multiples(whole, step * pipeline)
        yield "global_batch_size", f"{text}, which virtual stages need: {near} would be"


def is_interleaved(train: Train) -> bool:
    """Whether stages are cut into virtual ones, with micro batch groups of the default size."""
    virtual = train.get("num_virtual_stages_per_pipeline_rank", 1) > 1
    by_layers = "num_layers_per_virtual_pipeline_stage" in train
    return (virtual or by_layers) and "microbatch_group_size_per_vp_stage" not in train
