"""Compare a Hugging Face model with a Megatron checkpoint; fail when they are not the same model.

    python scripts/launch.py --ranks-per-node 2 --log LOG scripts/parity.py \\
        --config config/config.yaml --crossing convert --model HF_DIRECTORY --checkpoint CHECKPOINTS \\
        --data DATA_DIRECTORY --output parity.json

Every tensor is compared by its bits, the options that the checkpoint records of its model with what
config.json says, the tokenizer with the one that made the data; then both models walk through texts
and held-out documents layer by layer, in float32, and are compared at every point and every position;
and both tell their losses over held-out samples, after an export those whose loss training logged.
A layer at a time is in memory. Before that, Megatron computes logits, gradients and steps of the
optimizer over the ranks of training's layout, which scripts/launch.py starts; one rank needs no launcher.
All of it is on CPUs; where there is a GPU, it computes logits in training's bfloat16 or FP8 besides.
The gates and their thresholds: scripts/megaqwen/parity/README.md.

When one fails, the first point where the models part is named, a table by layer goes to the log
(--layers prints it always), and what was measured is kept as failed.json, a manifest as well, beside
the output, which is not written, nor is an earlier one kept; the exit status is then 2.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaqwen.config import load_config
from megaqwen.config.rank_options import check_ranks
from megaqwen.console import run_command, stage_parser
from megaqwen.environment import surroundings
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import StageRecord, existing, read_json, sha256_file, write_json
from megaqwen.sources.recorded import stage_manifest
from megaqwen.training.ranks import rank_from_environment

logger = logging.getLogger("megaqwen.parity")


def parity(arguments: argparse.Namespace) -> None:
    """Run the gates, and write the verdict where all of them passed."""
    outside = surroundings()
    config = load_config(arguments.config)
    record = StageRecord(
        f"parity_{arguments.crossing}", Layout(config=config).stage_config("parity")
    )
    existing(arguments.model / "config.json", "download")
    rank = rank_from_environment()
    inputs = {"model": arguments.model.parent / "manifest.json"}
    if arguments.checkpoint_manifest:
        inputs["checkpoint"] = arguments.checkpoint_manifest
    verdict = same_verdict(arguments.gate, record, inputs) if arguments.gate else None
    if not verdict:
        check_ranks(config.train, rank.world_size)
    if rank.speaks:
        arguments.output.unlink(missing_ok=True)  # no earlier verdict stands for this one
    if verdict:
        if rank.speaks:
            write_json(arguments.output, verdict)
            logger.info("parity after %s: passed at the gate already", arguments.crossing)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Float32 on the CPU is the same arithmetic everywhere: a GPU of the machine is asked for training's
    # dtype alone, by a process of its own.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megaqwen.training import cpu_emulation

    cpu_emulation.install()  # before anything imports Megatron

    from megaqwen.parity.gates import first_divergence
    from megaqwen.parity.localization import likely_cause
    from megaqwen.parity.measure import measure
    from megaqwen.parity.ranks import over_ranks
    from megaqwen.training.preflight import check_kind

    made = stage_results(arguments.data / "tokens", "preprocess")
    if made is not None:
        check_kind(made, config.data.kind)
    found = over_ranks(
        model=arguments.model,
        checkpoint=arguments.checkpoint,
        data=arguments.data,
        config=config,
        rounded=arguments.crossing == "export",
        outside=outside,
    )
    if found is None:
        return  # the last rank has what this one computed, and goes on alone
    trained = None
    if arguments.crossing == "export" and arguments.checkpoint_manifest:
        trained = read_json(arguments.checkpoint_manifest)["results"]
    measured = measure(
        ranks=found,
        model=arguments.model,
        checkpoint=arguments.checkpoint,
        data=arguments.data,
        config=config,
        rounded=arguments.crossing == "export",
        tokenizer=made["tokenizer"]["files"] if made else None,
        made=made,
        trained=trained,
    )
    for gate in measured.gates:
        logger.info("%s %s", "passed" if gate.passed else "FAILED", gate)
    for name, reason in measured.unmeasured.items():
        logger.info("not measured: %s: %s", name, reason)
    if arguments.layers or measured.failed:
        for line in measured.tables():
            logger.info("%s", line)
    results = {"crossing": arguments.crossing, **measured.facts()}
    failure = arguments.output.with_name("failed.json")
    if measured.failed:
        there = {name: path for name, path in inputs.items() if path.is_file()}
        record.write(failure, inputs=there, results=results)
        names = ", ".join(gate.name for gate in measured.failed)
        first = first_divergence(measured.walk.points)
        parted = f"The models part first at {first}. " if first else ""
        raise InputError(
            f"parity after {arguments.crossing} failed at {names}. {measured.failed[0]}. {parted}"
            f"Likely: {likely_cause(measured.gates, measured.walk.points)}. All figures: {failure}"
        )
    failure.unlink(missing_ok=True)
    record.write(arguments.output, inputs=inputs, results=results)
    logger.info("parity after %s: passed at %d positions", arguments.crossing, results["positions"])


def stage_results(directory: Path, stage: str) -> dict[str, Any] | None:
    """The results in the manifest of the stage that made a directory, if it has one."""
    manifest = stage_manifest(directory, stage)
    results: dict[str, Any] | None = read_json(manifest)["results"] if manifest else None
    return results


def same_verdict(
    gate: Path, record: StageRecord, inputs: Mapping[str, Path]
) -> dict[str, Any] | None:
    """The gate's manifest, where it was made with this config of these inputs; else None."""
    verdict: dict[str, Any] = read_json(gate)
    digests = {name: input_["sha256"] for name, input_ in verdict["inputs"].items()}
    same = digests == {name: sha256_file(path) for name, path in inputs.items()}
    return verdict if same and verdict["config"] == record.config else None


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
    parser.add_argument(
        "--layers", action="store_true", help="print the errors at each point of each layer"
    )
    parser.add_argument("--output", type=Path, required=True, help="parity.json to write")
    rank = rank_from_environment()
    # Where the launcher started it, LOG itself is the launcher's.
    suffix = f"rank{rank.rank}.log" if "RANK" in os.environ else ""
    return run_command(parity, parser, quiet=not rank.speaks, log_suffix=suffix)


if __name__ == "__main__":
    sys.exit(main())
