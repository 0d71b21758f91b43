"""The gate on what a GPU computes, tried: a healthy model, and mistakes that only the GPU's model has.

    python tests/gpu/gpu_mistakes.py MODEL DIRECTORY RECIPE OUTPUT.json [MISTAKE ...]

MODEL is a Hugging Face directory, which is compared; Megatron computes in RECIPE what was converted of it
and, for each MISTAKE of tests/sabotage.py, of a copy with the mistake. Where the machine has no GPU, its
CPU computes with Megatron's local layers, which know bfloat16 alone.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
SEQUENCES, POSITIONS, LONG = 16, 64, 1024
KERNEL = "attention's kernel is wrong beyond 700 positions"
"""No mistake of the weights, and in no sequence but the long one."""


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
    from megaqwen.parity.batches import compared_at, long_batch, make_batches
    from megaqwen.parity.dtype_gates import hold_dtype, mean_and_least, part_ratios
    from megaqwen.parity.fp8 import fp8_of
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
    long = long_batch(texts, LONG)
    kinds, at = (
        [(torch.float32, None), (torch.bfloat16, fp8_of(RECIPES[recipe]))],
        compared_at(long),
    )
    exact, own = (outputs_of(weights, dtype, batch, fp8=fp8) for dtype, fp8 in kinds)
    long_exact, long_own = (
        outputs_of(weights, dtype, long, at=at, fp8=fp8) for dtype, fp8 in kinds
    )
    rows = []
    for name in ["healthy", *names]:
        wrong, checkpoint = model, directory / name.replace(" ", "-") / "megatron"
        checkpoint.mkdir(parents=True)
        if name not in ("healthy", KERNEL):
            (mistake,) = (each for each in SABOTAGES if each.name == name)
            wrong = sabotaged(model, checkpoint.with_name("hf"), mistake)
        convert_to_megatron(wrong, checkpoint)
        recorded = recorded_options(checkpoint, megatron_options(HuggingFaceWeights(wrong).config))
        shape = (SEQUENCES, LONG)
        options = forward_options(RECIPES[recipe], recorded, checkpoint, vocabulary, shape, device)
        request = {"options": options, "batch": batch, "long": long, "vocabulary": vocabulary}
        with wrong_kernel(options["transformer_impl"], name == KERNEL):
            found = gpu_process.forward({**request, "rounded_to": None})
        outputs, parts = found["outputs"], part_ratios(long_exact, long_own, found["long"])
        # Of what has no threshold yet, the figures alone are of interest.
        threshold = THRESHOLDS.get(recipe, float("inf"))
        gate, ratios = hold_dtype("gpu", recipe, threshold, exact, own, outputs, parts)
        mean, _ = mean_and_least(ratios)
        row = {"mistake": name, "mean": mean, "least": gate.value, "passed": gate.passed}
        rows.append({**row, "parts": parts[-1], "detail": gate.detail})
    output.write_text(json.dumps(rows))


@contextmanager
def wrong_kernel(implementation: str, wrong: bool) -> Iterator[None]:
    """Within it attention puts out zeros from position 700 on, if that is asked for."""
    if not wrong:
        yield
        return
    if implementation == "local":
        from megaqwen.training.packed_attention import PackedDotProductAttention as Core
    else:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention as Core
    right = Core.forward

    def forward(self: Any, *states: Any, **named: Any) -> Any:
        output = right(self, *states, **named)
        output[700:] = 0
        return output

    with patch.object(Core, "forward", forward):
        yield


if __name__ == "__main__":
    main()
