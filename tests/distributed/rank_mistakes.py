"""Megatron over ranks held against transformers: healthy layouts, and mistakes that only these gates see.

    torchrun --nproc-per-node 2 rank_mistakes.py JOBS.json OUTPUT.json

JOBS.json is a list of {"name", "model", "checkpoint", "config", "mistakes"}, the last being names of
MISTAKES. Each is made in Megatron's model after it was built, in its options or in its loss; the weights
are those of the checkpoint, so that the gates on one rank in evaluation pass. Written are the gates
of each job without a mistake and with each.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

Change = Callable[[Any], None]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One of them."""

    name: str
    gates: tuple[str, ...]
    """Those that fail, and no others but what is in `also`."""
    also: tuple[str, ...] = ("losses",)
    """May fail: what follows from the others, where it is large enough to be seen."""
    worst: str = ""
    """In what the first of these gates says."""
    model: Change | None = None
    """Changes a `RankedModel`."""
    options: dict[str, Any] | None = None
    """Megatron's options that differ."""
    loss: Callable[[Any], Any] | None = None
    """Changes the loss of a micro batch."""
    milder: str = ""
    """Another that is harder to see; this one is then made only where there is time for all."""


def parameters(ranked: Any, ending: str) -> Iterator[Any]:
    """This rank's parameters of the second layer with this end of their names; or of any place."""
    for chunk in ranked.model:
        for name, parameter in chunk.named_parameters():
            if name.endswith(f"layers.1.{ending}") or name.endswith(f"module.{ending}"):
                yield parameter


def hook(ending: str, change: Callable[[Any], Any]) -> Change:
    """Change the gradient of one parameter on its way back."""

    def make(ranked: Any) -> None:
        for parameter in parameters(ranked, ending):
            parameter.register_hook(change)

    return make


def forget_sequence_parallel_sum(ranked: Any) -> None:
    for parameter in parameters(ranked, "input_layernorm.weight"):
        parameter.sequence_parallel = False


def decay_norms(ranked: Any) -> None:
    decay = max(group["weight_decay"] for group in ranked.optimizer.param_groups)
    for group in ranked.optimizer.param_groups:
        group["wd_mult"], group["weight_decay"] = 1.0, decay


def one_step_ahead(ranked: Any) -> None:
    from megatron.training import get_args

    ranked.schedule.step(increment=get_args().global_batch_size)


def wrong_split_on_second_rank(ranked: Any) -> None:
    import torch
    from megatron.core import mpu

    if mpu.get_tensor_model_parallel_rank() == 1:
        with torch.no_grad():
            for parameter in parameters(ranked, "self_attention.linear_qkv.bias"):
                parameter.copy_(parameter.roll(1, 0))


def in_bfloat16(change: Change) -> Change:
    """Make a change where training's dtype is measured, and leave float32 alone."""

    def make(ranked: Any) -> None:
        import torch

        if next(ranked.model[0].parameters()).dtype is torch.bfloat16:
            for chunk in ranked.model:
                for module in chunk.modules():
                    change(module)

    return make


def round_norm(module: Any) -> None:
    """What a norm puts out, in 8 bits."""
    import torch

    if isinstance(module, torch.nn.RMSNorm):
        module.register_forward_hook(
            lambda module, args, output: output.to(torch.float8_e4m3fn).to(output.dtype)
        )


def round_residual(module: Any) -> None:
    """What a layer puts out, as with five bits less."""
    if type(module).__name__ == "TransformerLayer":

        def rounded(module: Any, args: Any, output: Any) -> Any:
            import torch

            states, rest = output[0], output[1:]
            return ((states.to(torch.float8_e5m2).to(states.dtype)), *rest)

        module.register_forward_hook(rounded)


MISTAKES = [
    Mistake(
        name="a gradient that is cut off",
        gates=("gradients", "trajectory"),
        worst="layers.1.mlp.down_proj.weight",
        milder="a gradient 0.1% too large",
        model=hook("mlp.linear_fc2.weight", lambda gradient: gradient * 0),
    ),
    Mistake(
        name="a gradient 0.1% too large",
        gates=("gradients",),
        worst="layers.1.mlp.down_proj.weight",
        model=hook("mlp.linear_fc2.weight", lambda gradient: gradient * 1.001),
    ),
    Mistake(
        name="a loss 0.1% too large on its way back",
        gates=("gradients",),
        loss=lambda loss: loss * 1.001,
    ),
    Mistake(
        name="a norm's gradient that is not summed over the sequence",
        gates=("gradients", "trajectory", "copies"),
        worst="layers.1.input_layernorm.weight",
        model=forget_sequence_parallel_sum,
    ),
    Mistake(
        name="dropout of 1% left on in training alone",
        gates=("gradients", "trajectory"),
        options={"hidden_dropout": 0.01},
    ),
    Mistake(
        name="norms and biases that decay",
        gates=("trajectory",),
        worst="norm",
        model=decay_norms,
    ),
    Mistake(
        name="another beta2",
        gates=("trajectory",),
        milder="another epsilon of Adam",
        options={"adam_beta2": 0.95},
    ),
    Mistake(
        name="a learning rate that is one step ahead",
        gates=("trajectory",),
        model=one_step_ahead,
    ),
    Mistake(
        name="another epsilon of Adam",
        gates=("trajectory",),
        options={"adam_eps": 1e-6},
    ),
    Mistake(
        name="biases of queries shifted on the second rank",
        gates=("layout", "gradients", "trajectory"),
        worst="first beyond it: layer 1 out",
        model=wrong_split_on_second_rank,
    ),
    Mistake(
        name="norms in 8 bits",
        gates=("dtype",),
        worst="the first beyond it: layer 0",
        model=in_bfloat16(round_norm),
    ),
    Mistake(
        name="residuals in 8 bits",
        gates=("dtype",),
        milder="norms in 8 bits",
        worst="the first beyond it: layer 0",
        model=in_bfloat16(round_residual),
    ),
]


@contextmanager
def made(mistake: Mistake) -> Iterator[None]:
    """Within it, the ranks' model has the mistake."""
    from megaqwen.parity import on_all_ranks, ranked_model

    real, step = ranked_model.RankedModel, ranked_model.forward_step
    options, reasons = on_all_ranks.model_options, on_all_ranks.reasons_not_to
    # For time's sake: a mistake in one dtype is none in the other.
    left_out = ("gradients", "trajectory") if mistake.gates == ("dtype",) else ("dtype",)

    class Changed(real):  # type: ignore[misc,valid-type]
        def __init__(self, *values: Any, **named: Any):
            super().__init__(*values, **named)
            if mistake.model:
                mistake.model(self)

    def changed_options(*values: Any) -> dict[str, Any]:
        return {**options(*values), **(mistake.options or {})}

    def fewer_gates(*values: Any, **named: Any) -> dict[str, str]:
        others = dict.fromkeys(left_out if mistake.gates else (), "another gate's mistake")
        return reasons(*values, **named) | others

    def changed_step(iterator: Any, model: Any) -> Any:
        output, loss = step(iterator, model)

        def changed_loss(losses: Any) -> Any:
            total, targets, report = loss(losses)
            return mistake.loss(total) if mistake.loss else total, targets, report

        return output, changed_loss

    ranked_model.RankedModel = Changed  # type: ignore[misc]
    on_all_ranks.model_options = changed_options
    on_all_ranks.reasons_not_to = fewer_gates
    ranked_model.forward_step = changed_step
    try:
        yield
    finally:
        ranked_model.RankedModel = real  # type: ignore[misc]
        on_all_ranks.model_options = options
        on_all_ranks.reasons_not_to = reasons
        ranked_model.forward_step = step


def main() -> None:
    """All jobs, each mistake held against the same reference."""
    from megaqwen.training import cpu_emulation

    cpu_emulation.install()  # before anything imports Megatron

    import torch

    jobs, output = map(Path, sys.argv[1:])
    torch.distributed.init_process_group("gloo")
    by_name = {mistake.name: mistake for mistake in MISTAKES}
    rows = []
    for job in json.loads(jobs.read_text()):
        remember_reference()
        for name in ["", *job["mistakes"]]:
            mistake = by_name.get(name, Mistake(name="healthy", gates=()))
            with made(mistake):
                found = measured(Path(job["model"]), Path(job["checkpoint"]), Path(job["config"]))
            if found:
                row = {"job": job["name"], "mistake": mistake.name, "gates": found}
                print(*row.values(), sep="\n  ", flush=True)
                rows.append(row)
    if rows:
        output.write_text(json.dumps(rows))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def remember_reference() -> None:
    """Compute transformers' side once for all mistakes of a job: their batches are the same."""
    from megaqwen.parity import rank_gates, reference

    def once(function: Any) -> Any:
        remembered: dict[Any, Any] = {}

        def found(*values: Any) -> Any:
            _, dtype, tokens, *_ = values
            key = dtype, len(tokens)
            if key not in remembered:
                remembered[key] = function(*values)
            return remembered[key]

        return found

    for name in ("outputs_of", "gradients_of", "train_plainly"):
        setattr(rank_gates, name, once(getattr(reference, name)))


def measured(model: Path, checkpoint: Path, config: Path) -> list[dict[str, Any]] | None:
    """The gates' facts on the last rank; elsewhere None."""
    import torch

    from megaqwen.architecture import megatron_options
    from megaqwen.config import load_config
    from megaqwen.parity.megatron import recorded_options
    from megaqwen.parity.on_all_ranks import measure_on_ranks
    from megaqwen.parity.rank_gates import hold_against
    from megaqwen.weights.bridge import checked_model

    weights, transfers = checked_model(model)
    vocabulary = weights.config["vocab_size"]
    texts = torch.randint(vocabulary, (8, 400), generator=torch.Generator().manual_seed(1))
    found = measure_on_ranks(
        config=load_config(config),
        checkpoint=checkpoint,
        architecture=recorded_options(checkpoint, megatron_options(weights.config)),
        vocabulary=vocabulary,
        parameters=10**6,
        texts=texts.tolist,
        positions=64,
        rounded_to=None,
        with_steps=True,
    )
    if found is None:
        return None
    return [gate.facts() for gate in hold_against(found, model, weights, transfers).gates]


if __name__ == "__main__":
    main()
