"""What Megatron's error in bfloat16 and FP8 is, in units of transformers': figures to set a gate by.

    uv run python tests/gpu/parity_dtypes.py --directory DIR [--sizes qwen3 Qwen2.5-0.5B] [--steps 30]

Each model is made and trained that many steps by plain AdamW on the CPU, then converted. Megatron
computes 16 sequences with Transformer Engine on one GPU, in bfloat16 and in each recipe of FP8; its error
against transformers' float32 is held against that of transformers in the same, both on the CPU, as the
parity stage's gate on a GPU does it. Printed and written to DIR/dtypes.json are, of the logits, the mean
ratio, what is left of it less two standard errors, and the range over sequences; the mean ratio of the
worst layer; and what the error of FP8 is in units of transformers' in bfloat16.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[0:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from gpu_mistakes import POSITIONS, RECIPES, SEQUENCES  # noqa: E402

from megaqwen.environment import prepare_gpu  # noqa: E402


def measure(model: Path, checkpoint: Path) -> dict[str, dict[str, float]]:
    """The ratios of each recipe."""
    import torch
    from transformers import AutoTokenizer

    from megaqwen.architecture import megatron_options
    from megaqwen.data.builtin import builtin_documents
    from megaqwen.parity.batches import make_batches
    from megaqwen.parity.dtype_gates import mean_and_least, ratios_at_points
    from megaqwen.parity.fp8 import fp8_of
    from megaqwen.parity.gpu import forward_options
    from megaqwen.parity.gpu_process import forward
    from megaqwen.parity.megatron import recorded_options
    from megaqwen.parity.reference import outputs_of
    from megaqwen.weights import HuggingFaceWeights

    weights = HuggingFaceWeights(model)
    vocabulary = weights.config["vocab_size"]
    recorded = recorded_options(checkpoint, megatron_options(weights.config))
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.encode(text) for text in islice(builtin_documents(), 40)]
    (batch,) = make_batches(texts, 1, SEQUENCES, POSITIONS, vocabulary)
    exact, in_bf16 = (outputs_of(weights, each, batch) for each in (torch.float32, torch.bfloat16))
    shape = (SEQUENCES, batch.shape[1] - 1)
    found = {}
    for name, options in RECIPES.items():
        fp8 = fp8_of(options)
        own = outputs_of(weights, torch.bfloat16, batch, fp8=fp8) if fp8 else in_bf16
        asked = forward_options(options, recorded, checkpoint, vocabulary, shape)
        request = {"options": asked, "batch": batch, "long": None, "vocabulary": vocabulary}
        outputs = forward({**request, "rounded_to": None})["outputs"]
        *layers, ratios = ratios_at_points(exact, own, outputs)
        mean, least = mean_and_least(ratios)
        found[name] = {
            "mean": mean,
            "least": least,
            "from": min(ratios),
            "to": max(ratios),
            "worst layer": max(mean_and_least(each)[0] for each in layers),
            "of bfloat16": mean_and_least(ratios_at_points(exact, in_bf16, outputs)[-1])[0],
        }
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
    prepare_gpu()  # before torch is imported
    from megaqwen.parity import gpu_process
    from megaqwen.training.arguments import GPU_OPTIONS
    from megaqwen.weights import convert_to_megatron
    from trained_models import make_trained

    gpu_process.join({"options": GPU_OPTIONS})
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
