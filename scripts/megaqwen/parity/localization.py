"""Where two models part: a table by layer, and what is likely wrong there."""

from collections.abc import Iterator, Sequence

from megaqwen.parity.comparing import PointError
from megaqwen.parity.gates import Gate, first_divergence

BY_GATE = {
    "tensors": "the weight mapping (QKV interleaving, gate and up, a tied head) or a stale checkpoint",
    "architecture": "config.json was changed after the checkpoint was made",
    "trained loss": "an earlier iteration that was exported, other data than training evaluated, or an"
    " evaluation that was not this model's (dropout left on)",
    "tokenizer": "files of another model or another revision were put into the directory",
}
BY_RANKS = {
    "layout": "how tensor or pipeline parallel ranks share out the weights, such as rows of QKV or its"
    " bias, or virtual stages in the wrong order: on one rank the models agree",
    "gradients": "what only the backward pass does: a tensor cut off from it, a scale of the loss, a sum"
    " over sequence or data parallel ranks that is missing, or dropout left on in training",
    "copies": "a gradient that is not summed over the ranks that have copies of the tensor",
    "dtype": "a step that transformers does in float32 and Megatron in training's dtype: softmax, a norm,"
    " rotary embeddings or the router",
    "gpu": "what Transformer Engine computes otherwise than Megatron's local layers: a fused kernel, the"
    " attention backend, or the FP8 recipe",
    "trajectory": "the optimizer: its betas or epsilon, what the weight decay leaves out, clipping, or"
    " the schedule of the learning rate",
    "losses": "the optimizer or the schedule of the learning rate",
}
BY_POINT = {
    "embedding": "rows of the embedding, or its padding",
    "attention in": "the weight or epsilon of the norm before attention",
    "attention out": "rope (base, scaling, interleaving), QKV interleaving by group, a dropped bias,"
    " swapped q and k norms, or the softmax scale",
    "mlp in": "the weight or epsilon of the norm before the MLP",
    "router": "the router's weight",
    "mlp out": "gate and up swapped, an expert in another's place, the shared expert,"
    " or how the router normalises",
    "out": "the residual sum, or dropout left on",
    "final norm": "the weight or epsilon of the final norm, or a layer that is missing",
}
HEAD = "the output head: tied or not, its rows, or its padding"
LONGER = "what shows in longer or packed text alone: positions, the mask, or the scaling of rope"


def likely_cause(gates: Sequence[Gate], points: Sequence[PointError]) -> str:
    """What to look at first, by the gates that failed and where the models part."""
    failed = [gate.name for gate in gates if not gate.passed]
    causes = [BY_GATE[name] for name in failed if name in BY_GATE]
    if causes:
        return "; ".join(causes)
    first = first_divergence(points)
    if first:
        return BY_POINT[first.point]
    on_one_rank = [name for name in failed if name not in BY_RANKS]
    if on_one_rank == ["perplexity"]:
        return LONGER
    # The first gate that failed: a mistake in a gradient spoils the steps as well.
    causes = [BY_RANKS[name] for name in failed if name in BY_RANKS]
    return HEAD if on_one_rank or not causes else causes[0]


def table(points: Sequence[PointError]) -> Iterator[str]:
    """Lines for a person: each point's error beside what rounding does, the first beyond it marked."""
    first = first_divergence(points)
    yield f"{'layer':>6}  {'point':14} {'error':>9} {'rounding':>9} {'ratio':>8}"
    for point in points:
        layer = "" if point.layer is None else point.layer
        mark = "  <- the first beyond rounding" if point is first else ""
        yield (
            f"{layer:>6}  {point.point:14} {point.error:9.2e} {point.null:9.2e}"
            f" {point.ratio:8.2f}{mark}"
        )
