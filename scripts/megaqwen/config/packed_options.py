"""Megatron's options that packed conversations (data.kind sft) do not go together with.

Most of them would run, and be wrong without a word.
"""

from megaqwen.config.combinations import Found, Train
from megaqwen.config.mistakes import Mistake, shown


def packed_mistakes(train: Train) -> list[Mistake]:
    """What of `train`, in canonical form, is not for packed conversations."""
    return [Mistake(("train", name), text) for name, text in found_mistakes(train)]


def found_mistakes(train: Train) -> Found:
    """The options, each with the reason and what would be right."""
    context = train.get("context_parallel_size", 1)
    if context > 1:
        text = (
            f"{context} is given, but with data.kind sft a sequence holds whole conversations of any"
            " length, which cannot be cut evenly among context parallel ranks: 1 is allowed; for"
            " memory, set tensor_model_parallel_size with sequence_parallel, or recompute_granularity"
        )
        yield "context_parallel_size", text
    graphs = train.get("cuda_graph_impl", "none")
    if graphs != "none":
        text = (
            f"{shown(graphs)} is given, but with data.kind sft each micro batch has other bounds of"
            ' conversations, and a graph would replay the first ones: "none" is allowed'
        )
        yield "cuda_graph_impl", text
    if train.get("calculate_per_token_loss") is False:
        text = (
            "false is given, but with data.kind sft micro batches have unlike numbers of targets, and"
            " their means would be averaged as if they had not: leave it out, it is set to true"
        )
        yield "calculate_per_token_loss", text
    if train.get("ddp_average_in_collective"):
        text = (
            "true is given, but with data.kind sft gradients are averaged over tokens: leave it out"
        )
        yield "ddp_average_in_collective", text
    if train.get("iterations_to_skip") and train.get("tensor_model_parallel_size", 1) > 1:
        text = (
            "needs train.tensor_model_parallel_size 1 with data.kind sft: Megatron has the first rank"
            " alone read what is skipped, and the others would train on other conversations"
        )
        yield "iterations_to_skip", text
    if train.get("pipeline_model_parallel_size", 1) > 1:
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
            given = train.get(name)
            if any(given) if isinstance(given, list) else given:
                text = (
                    f"{shown(given)} is given, but with data.kind sft it is weighed with a micro batch's"
                    " targets, and pipeline stages would take those of a later one: 0, or"
                    " train.pipeline_model_parallel_size 1"
                )
                yield name, text
    balancing = train.get("moe_router_load_balancing_type", ())
    if "seq_aux_loss" in balancing:
        text = (
            '"seq_aux_loss" is given, but with data.kind sft a sequence is a pack of conversations,'
            " and all of a micro batch is one sequence to the router: aux_loss and global_aux_loss are"
            " allowed"
        )
        yield "moe_router_load_balancing_type", text
