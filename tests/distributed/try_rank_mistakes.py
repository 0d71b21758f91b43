"""Megatron over ranks held against transformers: healthy layouts, and those with mistakes.

    torchrun --nproc-per-node 2 try_rank_mistakes.py JOBS.json OUTPUT.json

JOBS.json is a list of {"name", "model", "checkpoint", "config", "mistakes"}, the last being names of
MISTAKES in rank_mistakes.py. Written are the gates of each job without a mistake and with each.
"""

import json
import pickle
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0:0] = [str(Path(__file__).parents[2] / "scripts"), str(Path(__file__).parents[1])]

from rank_mistakes import MISTAKES, TIES, Mistake  # noqa: E402

EARLIER: list[weakref.ref[Any]] = []
"""Weights and gradients of the model before."""


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
            left = [each() for each in EARLIER]
            assert not any(each is not None and each.numel() for each in left), "two are in memory"
            super().__init__(*values, **named)
            EARLIER[:] = [weakref.ref(each) for each in self.model[0].parameters()]
            EARLIER.extend(weakref.ref(each.grad_data) for each in self.model[0].buffers)
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
    by_name = {mistake.name: mistake for mistake in (TIES, *MISTAKES)}
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
    from megaqwen.parity import dtype_gates, rank_gates, reference

    def once(function: Any) -> Any:
        remembered: dict[Any, Any] = {}

        def found(*values: Any, **named: Any) -> Any:
            _, dtype, tokens, *others = values
            # With the experts that are followed.
            key = dtype, len(tokens), pickle.dumps((others, named))
            if key not in remembered:
                remembered[key] = function(*values, **named)
            return remembered[key]

        return found

    for name in ("outputs_of", "gradients_of", "train_plainly"):
        remembered = once(getattr(reference, name))
        for module in (rank_gates, dtype_gates):
            if hasattr(module, name):
                setattr(module, name, remembered)


def measured(model: Path, checkpoint: Path, config: Path) -> list[dict[str, Any]] | None:
    """The gates' facts on the last rank; elsewhere None."""
    import torch

    from megaqwen.architecture import megatron_options
    from megaqwen.config import load_config
    from megaqwen.parity.affordable import Size
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
        size=Size(parameters=10**6),
        texts=texts.tolist,
        positions=64,
        rounded_to=None,
        with_steps=True,
    )
    if found is None:
        return None
    return [gate.facts() for gate in hold_against(found, model, weights, transfers, 2e-4).gates]


if __name__ == "__main__":
    main()
