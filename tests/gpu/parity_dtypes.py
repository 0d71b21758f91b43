"""What FP8 does to the logits, in units of what bfloat16 does to transformers': figures to set a gate by.

    uv run python tests/gpu/parity_dtypes.py --directory DIR [--sizes qwen3 Qwen2.5-0.5B] [--steps 30]

Each model is made and trained that many steps by plain AdamW on the CPU, then converted. Megatron
computes 16 sequences with Transformer Engine on one GPU, in bfloat16 and in the FP8 recipes that scale by
what it sees (delayed scaling has seen nothing yet); its error against transformers' float32 is held
against that of transformers' bfloat16, both on the CPU, as the parity stage's gate on the dtype does it.
Printed and written to DIR/dtypes.json are the mean ratio, what is left of it less two standard errors,
and the range over sequences: a gate on FP8 lies between the largest of these and what a mistake gives.
"""

import argparse
import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[0:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch  # noqa: E402

from megaqwen.architecture import megatron_options  # noqa: E402
from megaqwen.data.builtin import builtin_documents  # noqa: E402
from trained_models import make_trained  # noqa: E402

RECIPES: dict[str, dict[str, Any]] = {
    "bfloat16": {"bf16": True},
    **{
        f"fp8 {recipe}": {"bf16": True, "fp8": "hybrid", "fp8_recipe": recipe}
        for recipe in ("tensorwise", "blockwise")
    },
}
SEQUENCES, POSITIONS = 16, 64


def measure(model: Path, checkpoint: Path) -> dict[str, dict[str, float]]:
    """The ratios of each recipe."""
    from transformers import AutoTokenizer

    from megaqwen.parity.batches import make_batches
    from megaqwen.parity.dtype_gates import error_ratio, mean_and_least
    from megaqwen.parity.megatron import recorded_options
    from megaqwen.parity.ranked_model import model_options, ranked_model
    from megaqwen.parity.reference import outputs_of
    from megaqwen.training.arguments import GPU_OPTIONS
    from megaqwen.weights import HuggingFaceWeights

    weights = HuggingFaceWeights(model)
    vocabulary = weights.config["vocab_size"]
    recorded = recorded_options(checkpoint, megatron_options(weights.config))
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.encode(text) for text in islice(builtin_documents(), 40)]
    (batch,) = make_batches(texts, 1, SEQUENCES, POSITIONS, vocabulary)
    exact, own = (
        outputs_of(weights, dtype, batch)[-1] for dtype in (torch.float32, torch.bfloat16)
    )
    shape = (SEQUENCES, batch.shape[1] - 1)
    found = {}
    for name, options in RECIPES.items():
        asked = model_options(recorded, checkpoint, vocabulary, options, shape, GPU_OPTIONS)
        with ranked_model(asked) as ranked:
            outputs = ranked.forward(batch, vocabulary)
        assert outputs is not None
        ratios = [error_ratio(*each) for each in zip(exact, own, outputs[-1], strict=True)]
        mean, least = mean_and_least(ratios)
        found[name] = {"mean": mean, "least": least, "from": min(ratios), "to": max(ratios)}
        print(f"{model.parent.name}: {name}: {json.dumps(found[name])}", flush=True)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="for models and figures")
    parser.add_argument("--sizes", nargs="+", default=["qwen3", "qwen3_moe", "Qwen2.5-0.5B"])
    parser.add_argument("--steps", type=int, default=30, help="of training before (default: 30)")
    arguments = parser.parse_args()
    from megaqwen.training import cpu_checkpoints, fused_kernels
    from megaqwen.weights import convert_to_megatron

    fused_kernels.install()
    cpu_checkpoints.install()  # what convert writes has no states of Transformer Engine either
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("cuda:nccl,cpu:gloo", rank=0, world_size=1)
    found = {}
    for name in arguments.sizes:
        model, checkpoint = (arguments.directory / name / each for each in ("hf", "megatron"))
        checkpoint.mkdir(parents=True)
        make_trained(model, name, arguments.steps, batch=1, length=128)
        convert_to_megatron(model, checkpoint)
        found[name] = measure(model, checkpoint)
    (arguments.directory / "dtypes.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
