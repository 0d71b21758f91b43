"""Compare a Hugging Face model with a Megatron checkpoint; fail when they are not the same model.

    python scripts/parity.py --config config/config.yaml --crossing convert \\
        --model HF_DIRECTORY --checkpoint CHECKPOINTS --data DATA_DIRECTORY --output parity.json

Every tensor is compared by its bits, and the float32 logits at every position of the config's texts
and of documents that were held out from training. The gates and their thresholds stand in
scripts/megaqwen/parity/gates.py. When one fails, what was measured is kept as failed.json beside
the output, and the exit status is not zero.
"""

import argparse
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path

from megaqwen.config import load_config
from megaqwen.console import run_command, stage_parser
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import StageRecord, write_json

logger = logging.getLogger("megaqwen.parity")

CAUSES = {
    "tensors": "the weight mapping (QKV interleaving, gate and up, a tied head) or a stale checkpoint",
    "logits": "rope base, norm epsilon, a dropped bias, or the attention scale",
}


def parity(arguments: argparse.Namespace) -> None:
    """Run the gates."""
    config = load_config(arguments.config)
    record = StageRecord(
        f"parity_{arguments.crossing}", Layout(config=config).stage_config("parity")
    )
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Float32 on the CPU is the same arithmetic everywhere: a GPU of the machine is not asked.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch
    from transformers import AutoTokenizer

    from megaqwen.data.splits import heldout_documents
    from megaqwen.parity.gates import compare_logits, forward_gates, tensors_gate
    from megaqwen.parity.models import HuggingFaceModel, MegatronModel
    from megaqwen.weights import HuggingFaceWeights, read_hf_tensors

    weights = HuggingFaceWeights(arguments.model)
    streamed = read_hf_tensors(
        arguments.checkpoint,
        weights.config,
        dtypes=weights.dtypes if arguments.crossing == "export" else None,
    )
    tensors = tensors_gate(weights.read, streamed)
    logger.info("%s", tensors)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {
        f"text {number}": tokenizer.encode(text)
        for number, text in enumerate(config.parity.texts, 1)
    }
    for corpus in config.data.corpora:
        documents = heldout_documents(
            arguments.data / corpus.name, config.data.split, config.parity.held_out_documents
        )
        texts |= {
            f"{corpus.name} {number}": document for number, document in enumerate(documents, 1)
        }
    limit = min(config.parity.max_tokens, weights.config["max_position_embeddings"])
    texts = {name: tokens[:limit] for name, tokens in texts.items() if len(tokens) > 1}
    if not texts:
        raise InputError("parity.texts and the held-out documents have no text of two tokens")

    reference = HuggingFaceModel(arguments.model)
    megatron = MegatronModel(arguments.checkpoint, weights.config, limit)
    comparisons = []
    for name, ids in texts.items():
        tokens = torch.tensor(ids)
        comparisons.append(
            compare_logits(name, tokens, reference.logits(tokens), megatron.logits(tokens))
        )
    gates = [tensors, *forward_gates(comparisons, config.parity.max_logit_difference)]
    for gate in gates[1:]:
        logger.info("%s", gate)
    failed = [gate for gate in gates if not gate.passed]
    results = {
        "crossing": arguments.crossing,
        "verdict": "failed" if failed else "passed",
        "gates": [gate.facts() for gate in gates],
        "texts": [asdict(comparison) for comparison in comparisons],
        "positions": sum(comparison.positions for comparison in comparisons),
    }
    failure = arguments.output.with_name("failed.json")
    if failed:
        write_json(failure, results)
        causes = {CAUSES["tensors" if gate.name == "tensors" else "logits"] for gate in failed}
        raise InputError(
            f"the parity gate after {arguments.crossing} failed: "
            + "; ".join(str(gate) for gate in failed)
            + f". Likely: {' or '.join(sorted(causes))}. All figures: {failure}"
        )
    inputs = {"model": arguments.model.parent / "manifest.json"}
    if arguments.checkpoint_manifest:
        inputs["checkpoint"] = arguments.checkpoint_manifest
    failure.unlink(missing_ok=True)
    record.write(arguments.output, inputs=inputs, results=results)
    logger.info("parity after %s: passed at %d positions", arguments.crossing, results["positions"])


def main() -> int:
    """The command."""
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--crossing", choices=("convert", "export"), required=True, help="after which stage"
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--checkpoint", type=Path, required=True, help="Megatron's checkpoints")
    parser.add_argument("--checkpoint-manifest", type=Path, help="its manifest, to be recorded")
    parser.add_argument("--data", type=Path, required=True, help="preprocess's directory")
    parser.add_argument("--output", type=Path, required=True, help="parity.json to write")
    return run_command(parity, parser)


if __name__ == "__main__":
    sys.exit(main())
