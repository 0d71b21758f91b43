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


def likely_cause(gates: Sequence[Gate], points: Sequence[PointError]) -> str:
    """What to look at first, by the gates that failed and where the models part."""
    causes = [BY_GATE[gate.name] for gate in gates if not gate.passed and gate.name in BY_GATE]
    if causes:
        return "; ".join(causes)
    first = first_divergence(points)
    return BY_POINT[first.point] if first else HEAD


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
