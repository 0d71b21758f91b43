"""Measure the tiny model of each architecture, and write its verification card.

    uv run python tests/benchmarks/cards.py --directory cards

Each is made from its seed, converted, and held against its conversion by all gates of the parity stage
that need no corpus. tests/unit/test_cards.py measures them again.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from megaqwen.config import load_config  # noqa: E402
from megaqwen.config.tiny_shapes import TINY  # noqa: E402
from megaqwen.data.tokenization import tokenizer_digests  # noqa: E402
from megaqwen.provenance import StageRecord, read_json, write_text  # noqa: E402
from megaqwen.report.verification import as_yaml, verification  # noqa: E402
from megaqwen.sources.tiny import write_tiny_model  # noqa: E402
from megaqwen.training import cpu_emulation  # noqa: E402

COMMAND = "uv run python tests/benchmarks/cards.py --directory cards"
SEED = 1234


def measured_card(architecture: str, place: Path) -> dict[str, Any]:
    """The card of a tiny model, measured in an empty directory."""
    from megaqwen.parity.measure import measure
    from megaqwen.weights import convert_to_megatron

    config = load_config(ROOT / "config" / "config.yaml", {"parity": {"held_out_documents": 0}})
    model, checkpoint = place / "hf", place / "checkpoint"
    for directory in (model, checkpoint):
        directory.mkdir()
    record = StageRecord("parity_convert", {"parity": config.parity.model_dump(mode="json")})
    write_tiny_model(model, architecture, SEED)
    convert_to_megatron(model, checkpoint)
    measured = measure(
        model=model,
        checkpoint=checkpoint,
        data=place,
        config=config,
        rounded=False,
        tokenizer=tokenizer_digests(model),
    )
    manifest = place / "parity.json"
    record.write(manifest, inputs={}, results={"crossing": "convert", **measured.facts()})
    source = {"source": "tiny", "architecture": architecture, "seed": SEED}
    facts = {**source, "model_type": architecture}
    card = verification([{"stage": "download", "results": facts}, read_json(manifest)])
    crossing = card["crossings"]["convert"]
    crossing["command"] = COMMAND
    del crossing["commit"]  # a file cannot name the commit that it is in
    return card


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="where the cards go")
    arguments = parser.parse_args()
    cpu_emulation.install()  # before anything imports Megatron
    for architecture in TINY:
        with TemporaryDirectory() as place:
            card = measured_card(architecture, Path(place))
        write_text(arguments.directory / f"{architecture}.yaml", as_yaml(card))


if __name__ == "__main__":
    main()
