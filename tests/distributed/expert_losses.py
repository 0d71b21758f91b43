"""What the experts' auxiliary loss adds to the gradients of a packed micro batch.

`python expert_losses.py FILE OUTPUT`: FILE as packed_model.py takes it. OUTPUT is JSON: by case (`as
given`, `all targets`, `more padding`), the number of `targets`, and of the routers' `gradient` the part
that is the auxiliary loss's, through Megatron's own schedule.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from packed_model import build, row  # first: it imports Megatron as it has to be

import torch  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.timers import Timers  # isort: skip
from megatron.training import get_args, global_vars  # isort: skip

from megaqwen.training.packed_forward import PackedForwardStep  # isort: skip

WEIGHTS = (1.0, 3.0)  # of the auxiliary loss: what it adds is in proportion to them


def batch_of(given: dict[str, Any], length: int) -> dict[str, torch.Tensor]:
    """The packs as the dataset gives them."""
    rows = []
    for members in given["packs"]:
        sample = row(given, members, length)
        filled = sum(len(given["conversations"][number]) - 1 for number in members)
        sample["padding_mask"] = torch.arange(length)[None] >= filled
        rows.append(sample)
    return {name: torch.cat([each[name] for each in rows]) for name in rows[0]}


def gradients(model: Any, step: PackedForwardStep, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every router's weights, after one micro batch."""
    model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=[model],
        num_microbatches=1,
        seq_length=batch["tokens"].shape[1],
        micro_batch_size=len(batch["tokens"]),
        forward_only=False,
    )
    routers = [each for name, each in model.named_parameters() if "router" in name]
    return torch.cat([each.main_grad.double().flatten() for each in routers])


def main() -> None:
    """Every case."""
    source, output = (Path(word) for word in sys.argv[1:])
    given = json.loads(source.read_text(encoding="utf-8"))
    model = build(given)
    global_vars._GLOBAL_TIMERS = Timers(0, "minmax")
    model.config.calculate_per_token_loss = True
    step = PackedForwardStep(model.config, get_args())
    batch = batch_of(given, given["length"])
    everything = (~batch["padding_mask"]).long()
    cases = {
        "as given": batch,
        "all targets": {**batch, "loss_mask": everything},
        "more padding": batch_of(given, given["length"] + 32),
    }
    found = {}
    for name, case in cases.items():
        parts = []
        for weight in WEIGHTS:
            model.config.moe_aux_loss_coeff = weight
            parts.append(gradients(model, step, case))
        added = (parts[1] - parts[0]) / (WEIGHTS[1] - WEIGHTS[0])
        found[name] = {"targets": int(case["loss_mask"].sum()), "gradient": added.tolist()}
    output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
