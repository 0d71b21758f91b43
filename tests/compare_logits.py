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
    from megaqwen.parity.models import HuggingFaceModel, MegatronModel
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training import global_vars

    from megaqwen.architecture import megatron_options
    from megaqwen.weights import HuggingFaceWeights

    config = HuggingFaceWeights(Path(model)).config
    vocabulary, positions = config["vocab_size"], config["max_position_embeddings"]
    options = {**megatron_options(config), **change}
    tokens = torch.randint(vocabulary, (positions,), generator=torch.manual_seed(1))
    reference = HuggingFaceModel(Path(model)).logits(tokens)
    megatron = MegatronModel(Path(checkpoint), options, vocabulary, positions)
    difference = (reference - megatron.logits(tokens)).abs().amax(dim=-1)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    destroy_num_microbatches_calculator()
    global_vars.destroy_global_vars()
    global_vars.unset_global_variables()
    return {"difference": difference.tolist(), "largest": reference.abs().max().item()}


def main() -> None:
    """All jobs; the last line is the result."""
    from megaqwen.training import cpu_emulation

    cpu_emulation.install()  # before anything imports Megatron
    results = [compare(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
