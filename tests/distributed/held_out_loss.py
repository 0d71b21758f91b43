"""The gates on the loss of held-out samples, measured several ways in one process.

    python held_out_loss.py --config FILE --model DIR --checkpoint DIR --data DIR --train-manifest FILE \\
        CASE...

A case is NAME:SEED:SAMPLES:POSITIONS: the seed of the run's data, how many samples are affordable, and
how long a text fits the memory. Prints a JSON object: by the cases' names, what was measured and the
gates.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("config", "model", "checkpoint", "data", "train-manifest"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("cases", nargs="+")
    arguments = parser.parse_args()

    from megaqwen.training import cpu_emulation

    cpu_emulation.install()  # before anything imports Megatron
    import torch

    from megaqwen.architecture import megatron_options
    from megaqwen.config import load_config
    from megaqwen.parity import perplexity
    from megaqwen.parity.heldout import sequence_length
    from megaqwen.parity.megatron import recorded_options
    from megaqwen.parity.perplexity import PASSES, Crossing, perplexity_gates
    from megaqwen.provenance import read_json
    from megaqwen.weights.bridge import checked_model

    weights, _ = checked_model(arguments.model)
    described = megatron_options(weights.config)
    del described["padded_vocab_size"]
    found = {}
    for case in arguments.cases:
        name, seed, samples, positions = case.split(":")
        config = load_config(arguments.config, {"data": {"seed": int(seed)}})
        crossing = Crossing(
            weights=weights,
            checkpoint=arguments.checkpoint,
            recorded=recorded_options(arguments.checkpoint, described),
            rounded_to=torch.float32,
            tie=2e-4,
            config=config,
            data=arguments.data,
            made=read_json(arguments.data / "manifest.json")["results"],
            trained=read_json(arguments.train_manifest)["results"],
            after_training=True,
        )
        budget = float(samples) * sequence_length(config) * PASSES
        perplexity.positions_in_memory = lambda heads, most=int(positions): most
        measured, unmeasured = perplexity.measure_perplexity(crossing, budget)
        assert measured is not None
        found[name] = {
            "measured": asdict(measured),
            "unmeasured": unmeasured,
            "gates": {gate.name: gate.facts() for gate in perplexity_gates(measured)},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
