"""Compare a Hugging Face model with a Megatron checkpoint; fail when they are not the same model.

    python scripts/parity.py --config config/config.yaml --crossing convert \\
        --model HF_DIRECTORY --checkpoint CHECKPOINTS --data DATA_DIRECTORY --output parity.json

Every tensor is compared by its bits, the options that the checkpoint records of its model with what
config.json says, and the float32 logits at every position of the config's texts
and of documents that were held out from training. The gates and their thresholds stand in
scripts/megaqwen/parity/gates.py. When one fails, what was measured is kept as failed.json beside
the output, which is not written, nor is an earlier one kept; the exit status is then 2.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaqwen.config import Config, load_config
from megaqwen.config.blends import corpus_split
from megaqwen.console import run_command, stage_parser
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import StageRecord, existing, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from megaqwen.parity.gates import Comparison, Gate

logger = logging.getLogger("megaqwen.parity")

CAUSES = {
    "tensors": "the weight mapping (QKV interleaving, gate and up, a tied head) or a stale checkpoint",
    "architecture": "config.json was changed after the checkpoint was made",
    "logits": "rope base, norm epsilon, a dropped bias, or the attention scale",
}


def parity(arguments: argparse.Namespace) -> None:
    """Run the gates, and write the verdict where all of them passed."""
    config = load_config(arguments.config)
    record = StageRecord(
        f"parity_{arguments.crossing}", Layout(config=config).stage_config("parity")
    )
    existing(arguments.model / "config.json", "download")
    arguments.output.unlink(missing_ok=True)  # no earlier verdict stands for this one
    inputs = {"model": arguments.model.parent / "manifest.json"}
    if arguments.checkpoint_manifest:
        inputs["checkpoint"] = arguments.checkpoint_manifest
    if arguments.gate and (verdict := same_verdict(arguments.gate, record, inputs)):
        write_json(arguments.output, verdict)
        logger.info("parity after %s: passed at the gate already", arguments.crossing)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Float32 on the CPU is the same arithmetic everywhere: a GPU of the machine is not asked.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gates, comparisons = run_gates(arguments, config)
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
        names = [gate.name for gate in failed]
        raise InputError(
            f"parity after {arguments.crossing} failed at {', '.join(names)}. {failed[0]}. "
            f"Likely: {likely_cause(names)}. All figures: {failure}"
        )
    failure.unlink(missing_ok=True)
    record.write(arguments.output, inputs=inputs, results=results)
    logger.info("parity after %s: passed at %d positions", arguments.crossing, results["positions"])


def same_verdict(
    gate: Path, record: StageRecord, inputs: Mapping[str, Path]
) -> dict[str, Any] | None:
    """The gate's manifest, where it was made with this config of these inputs; else None."""
    verdict: dict[str, Any] = read_json(gate)
    digests = {name: input_["sha256"] for name, input_ in verdict["inputs"].items()}
    same = digests == {name: sha256_file(path) for name, path in inputs.items()}
    return verdict if same and verdict["config"] == record.config else None


def run_gates(
    arguments: argparse.Namespace, config: Config
) -> tuple[list["Gate"], list["Comparison"]]:
    """What was measured at every gate, and for every text."""
    import torch

    from megaqwen.training import cpu_emulation

    cpu_emulation.install()  # before anything imports Megatron

    from megaqwen.architecture import megatron_options
    from megaqwen.parity import gates
    from megaqwen.parity.models import HuggingFaceModel, MegatronModel, recorded_options
    from megaqwen.weights import read_hf_tensors
    from megaqwen.weights.bridge import checked_model

    weights, _ = checked_model(arguments.model)
    streamed = read_hf_tensors(
        arguments.checkpoint,
        weights.config,
        dtypes=weights.dtypes if arguments.crossing == "export" else None,
    )
    measured = [gates.tensors_gate(weights.read, streamed)]
    described = megatron_options(weights.config)
    del described["padded_vocab_size"]  # it depends on the layout, and pad rows are no tokens
    recorded = recorded_options(arguments.checkpoint, described)
    measured.append(gates.architecture_gate(recorded, described))

    limit = min(config.parity.max_tokens, weights.config["max_position_embeddings"])
    texts = tokenized_texts(arguments, config, limit)
    reference = HuggingFaceModel(arguments.model)
    stored = set(weights.dtypes.values()) if arguments.crossing == "export" else set()
    megatron = MegatronModel(
        arguments.checkpoint,
        recorded,
        weights.config["vocab_size"],
        limit,
        # With several dtypes the weights stay as they are, and the gate decides.
        rounded_to=stored.pop() if len(stored) == 1 else torch.float32,
    )
    comparisons = []
    for name, ids in texts.items():
        tokens = torch.tensor(ids)
        comparisons.append(
            gates.compare_logits(name, tokens, reference.logits(tokens), megatron.logits(tokens))
        )
    measured += gates.forward_gates(comparisons, config.parity.max_logit_difference)
    for gate in measured:
        logger.info("%s %s", "passed" if gate.passed else "FAILED", gate)
    return measured, comparisons


def tokenized_texts(
    arguments: argparse.Namespace, config: Config, limit: int
) -> dict[str, list[int]]:
    """Token ids of the config's texts and of each corpus's held-out documents, by name.

    Raises:
        InputError: None of them has two tokens.
    """
    from transformers import AutoTokenizer

    from megaqwen.data.splits import heldout_documents

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {
        f"text {number}": tokenizer.encode(text)
        for number, text in enumerate(config.parity.texts, 1)
    }
    for corpus in config.data.corpora:
        split = corpus_split(config.data, corpus)
        prefix = arguments.data / corpus.name
        documents = heldout_documents(prefix, split, config.parity.held_out_documents)
        texts |= {
            f"{corpus.name} {number}": document for number, document in enumerate(documents, 1)
        }
    texts = {name: tokens[:limit] for name, tokens in texts.items() if len(tokens) > 1}
    if not texts:
        raise InputError("parity.texts and the held-out documents have no text of two tokens")
    return texts


def likely_cause(failed: list[str]) -> str:
    """What to look at first, by the names of the gates that failed; logits follow from the others."""
    first = [name for name in failed if name in ("tensors", "architecture")] or ["logits"]
    return " or ".join(CAUSES[name] for name in first)


def main() -> int:
    """The command."""
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--crossing", choices=("convert", "export"), required=True, help="after which stage"
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--checkpoint", type=Path, required=True, help="Megatron's checkpoints")
    parser.add_argument("--checkpoint-manifest", type=Path, help="its manifest, to be recorded")
    parser.add_argument(
        "--gate",
        type=Path,
        help="an earlier verdict: taken over where all that decides it is the same",
    )
    parser.add_argument("--data", type=Path, required=True, help="preprocess's directory")
    parser.add_argument("--output", type=Path, required=True, help="parity.json to write")
    return run_command(parity, parser)


if __name__ == "__main__":
    sys.exit(main())
