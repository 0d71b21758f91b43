"""Compares transformers' float32 logits with Megatron's, for several models in one process.

    python compare_logits.py JOBS.json

JOBS.json is a list of {"model", "checkpoint", "change"}, the last being Megatron options that differ from
what config.json comes to. Prints a JSON list of {"difference", "largest"}: the largest |difference| of
two logits at each position, and the largest |logit|.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))


def compare(model: str, checkpoint: str, change: dict[str, Any]) -> dict[str, Any]:
    """One model, at all positions that its config.json allows."""
    import torch

    from megaqwen.architecture import megatron_options
    from megaqwen.parity.huggingface import HuggingFaceLayers
    from megaqwen.parity.megatron import MegatronLayers
    from megaqwen.parity.walk import Layers
    from megaqwen.weights import HuggingFaceWeights

    weights = HuggingFaceWeights(Path(model))
    vocabulary = weights.config["vocab_size"]
    positions = weights.config["max_position_embeddings"]
    options = {**megatron_options(weights.config), **change}
    tokens = torch.randint(vocabulary, (positions,), generator=torch.manual_seed(1))

    def logits(layers: Layers) -> torch.Tensor:
        hidden = layers.embed([tokens])
        for index in range(layers.layers):
            hidden, _ = layers.layer(index, hidden)
        with layers.head() as (norm, head):
            found: torch.Tensor = head(norm(hidden[0]))
            return found

    reference = logits(HuggingFaceLayers(weights, torch.float32))
    megatron = MegatronLayers(Path(checkpoint), options, vocabulary, positions)
    difference = (reference - logits(megatron)).abs().amax(dim=-1)
    return {"difference": difference.tolist(), "largest": reference.abs().max().item()}


def main() -> None:
    """All jobs; the last line is the result."""
    from megaqwen.training import cpu_emulation

    cpu_emulation.install()  # before anything imports Megatron
    results = [compare(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
