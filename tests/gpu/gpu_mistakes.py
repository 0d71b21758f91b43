"""The gate on what a GPU computes, tried: a healthy model, and mistakes that only the GPU's model has.

    python tests/gpu/gpu_mistakes.py MODEL DIRECTORY RECIPE OUTPUT.json [MISTAKE ...]

MODEL is a Hugging Face directory, which is compared; Megatron computes in RECIPE what was converted of it
and, for each MISTAKE of tests/sabotage.py, of a copy with the mistake. Where the machine has no GPU, its
CPU computes with Megatron's local layers, which know bfloat16 alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[0:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from megaqwen.environment import prepare_gpu  # noqa: E402

RECIPES: dict[str, dict[str, Any]] = {
    "bfloat16": {"bf16": True},
    **{
        f"fp8 {recipe}": {"bf16": True, "fp8": "hybrid", "fp8_recipe": recipe}
        for recipe in ("tensorwise", "blockwise", "delayed")
    },
}
SEQUENCES, POSITIONS = 16, 64


def main() -> None:
    """The command."""
    prepare_gpu()
    import torch

    from megaqwen.parity import gpu_process
    from megaqwen.training.arguments import CPU_OPTIONS, GPU_OPTIONS

    model, directory, output = (Path(sys.argv[number]) for number in (1, 2, 4))
    recipe, names = sys.argv[3], sys.argv[5:]
    device = None if torch.cuda.is_available() else CPU_OPTIONS
    gpu_process.join({"options": device or GPU_OPTIONS})

    from transformers import AutoTokenizer

    from megaqwen.architecture import megatron_options
    from megaqwen.data.builtin import builtin_documents
    from megaqwen.parity.batches import make_batches
    from megaqwen.parity.dtype_gates import hold_dtype, mean_and_least
    from megaqwen.parity.gpu import THRESHOLDS, forward_options
    from megaqwen.parity.megatron import recorded_options
    from megaqwen.parity.reference import outputs_of
    from megaqwen.weights import HuggingFaceWeights, convert_to_megatron
    from sabotage import SABOTAGES, sabotaged

    weights = HuggingFaceWeights(model)
    vocabulary = weights.config["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [
        tokenizer.encode(text) for _, text in zip(range(40), builtin_documents(), strict=False)
    ]
    (batch,) = make_batches(texts, 1, SEQUENCES, POSITIONS, vocabulary)
    exact, own = (outputs_of(weights, each, batch) for each in (torch.float32, torch.bfloat16))
    rows = []
    for name in ["healthy", *names]:
        wrong, checkpoint = model, directory / name.replace(" ", "-") / "megatron"
        checkpoint.mkdir(parents=True)
        if name != "healthy":
            (mistake,) = (each for each in SABOTAGES if each.name == name)
            wrong = sabotaged(model, checkpoint.with_name("hf"), mistake)
        convert_to_megatron(wrong, checkpoint)
        recorded = recorded_options(checkpoint, megatron_options(HuggingFaceWeights(wrong).config))
        options = forward_options(RECIPES[recipe], recorded, checkpoint, vocabulary, batch, device)
        request = {"options": options, "batch": batch, "vocabulary": vocabulary}
        outputs = gpu_process.forward({**request, "rounded_to": None})
        # Of what has no threshold yet, the figures alone are of interest.
        threshold = THRESHOLDS.get(recipe, float("inf"))
        gate, ratios = hold_dtype("gpu", recipe, threshold, exact, own, outputs)
        mean, _ = mean_and_least(ratios)
        rows.append({"mistake": name, "mean": mean, "least": gate.value, "passed": gate.passed})
    output.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
