"""A model on one rank that is given the same conversations one by one and packed.

`python packed_model.py FILE OUTPUT`: FILE is JSON with `facts` (a config.json), `conversations` (lists of
ids), `targets` (as many 0 and 1), `packs` (lists of conversations' numbers, one pack a row of the micro
batch), `length` (positions of a row) and `bf16`. OUTPUT is JSON: `alone` and `packed`, each with the
summed `losses` of each conversation and the `gradients` of their sum by parameter.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from megaqwen.training import cpu_emulation

GPU = not cpu_emulation.available()
if not GPU:
    cpu_emulation.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.models.gpt import GPTModelBuilder  # noqa: E402

from megaqwen.architecture import megatron_options  # noqa: E402
from megaqwen.config.megatron_options import to_arguments  # noqa: E402
from megaqwen.training import fused_kernels  # noqa: E402
from megaqwen.training.arguments import CPU_OPTIONS, gpu_options  # noqa: E402
from megaqwen.training.model import model_config  # noqa: E402
from megaqwen.training.packed_forward import conversation_bounds  # noqa: E402

Sample = dict[str, torch.Tensor]


def build(given: dict[str, Any]) -> Any:
    """The model, with random weights that no two of are alike, wrapped as training wraps it.

    On a GPU the matrix products add weights' gradients to the buffers that the wrapper makes.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    store = torch.distributed.HashStore()
    backend = "nccl" if GPU else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if GPU:
        fused_kernels.install()
    model_parallel_cuda_manual_seed(1)
    architecture = megatron_options(given["facts"], 1)
    fused = (
        {"apply_rope_fusion": False} if architecture["position_embedding_type"] == "yarn" else {}
    )
    options = {
        **architecture,
        **(gpu_options({}, architecture) if GPU else CPU_OPTIONS),
        **(fused if GPU else {}),
        "vocab_size": given["facts"]["vocab_size"],
        "tokenizer_type": "NullTokenizer",
        "seq_length": given["length"],
        "micro_batch_size": len(given["packs"]),
        "train_iters": 1,
        "lr": 1.0,
        "bf16": given["bf16"],
    }
    sys.argv = [sys.argv[0], *to_arguments(options)]
    config = model_config(parse_and_validate_args())
    (model,) = GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        data_parallel_random_init=False,
    )
    return model


def row(given: dict[str, Any], members: list[int], length: int) -> Sample:
    """Conversations one after the other, padded to a length, as a sample of the dataset is."""
    names = ("tokens", "labels", "loss_mask", "position_ids", "conversation")
    columns: dict[str, list[int]] = {name: [] for name in names}
    for number in members:
        ids, targets = given["conversations"][number], given["targets"][number]
        columns["tokens"] += ids[:-1]
        columns["labels"] += ids[1:]
        columns["loss_mask"] += targets[1:]
        columns["position_ids"] += range(len(ids) - 1)
        columns["conversation"] += [number] * (len(ids) - 1)
    padding = length - len(columns["tokens"])
    for name, values in columns.items():
        values += range(padding) if name == "position_ids" else [0] * padding
    return {name: torch.tensor(values)[None] for name, values in columns.items()}


def losses_and_gradients(model: Any, batches: list[Sample], *, packed: bool) -> dict[str, Any]:
    """Losses by conversation, and the gradients of their sum."""
    model.zero_grad_buffer()
    losses: dict[int, float] = {}
    device = torch.cuda.current_device()
    for batch in batches:
        flat = {name: each.reshape(1, -1).to(device) for name, each in batch.items()}
        bounds = conversation_bounds(batch["position_ids"]) if packed else None
        scored = flat["loss_mask"] * model(
            flat["tokens"],
            flat["position_ids"],
            None,
            labels=flat["labels"],
            packed_seq_params=bounds,
        )
        scored.sum().backward()
        for number in flat["conversation"].unique().tolist():
            losses[number] = scored[flat["conversation"] == number].double().sum().item()
    gradients = {
        name: parameter.main_grad.double().flatten().tolist()
        for name, parameter in model.named_parameters()
    }
    return {"losses": [losses[number] for number in sorted(losses)], "gradients": gradients}


def main() -> None:
    """Both ways."""
    source, output = (Path(word) for word in sys.argv[1:])
    given = json.loads(source.read_text(encoding="utf-8"))
    model = build(given)
    conversations = range(len(given["conversations"]))
    alone = [row(given, [n], len(given["conversations"][n]) - 1) for n in conversations]
    rows = [row(given, members, given["length"]) for members in given["packs"]]
    together = {name: torch.cat([each[name] for each in rows]) for name in rows[0]}
    results = {
        "alone": losses_and_gradients(model, alone, packed=False),
        "packed": losses_and_gradients(model, [together], packed=True),
    }
    output.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
