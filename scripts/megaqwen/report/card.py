"""The model card of the export: what it is made of, and what was proved of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from megaqwen.config import Config
from megaqwen.report.pages import Manifest, by_stage, nats, trained_tokens


def model_card(config: Config, manifests: Sequence[Manifest]) -> str:
    """README.md of a Hugging Face model directory, with the metadata that the Hub reads.

    Args:
        config: The run's.
        manifests: Of its stages.
    """
    stages = {name: manifest["results"] for name, manifest in by_stage(manifests).items()}
    source, train, export = stages["download"], stages["train"], stages["export"]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if source["source"] == "hub":
        metadata |= {"base_model": source["repo_id"], "base_model_relation": "finetune"}
    metadata["tags"] = ["megatron-core", source["model_type"]]
    tokens = stages["preprocess"]["corpora"]
    corpora = [
        (
            corpus.name,
            f"{tokens[corpus.name]['documents']:,}",
            f"{tokens[corpus.name]['tokens']:,}",
            f"{train['data'][corpus.name].get('train', {}).get('epochs', 0):.3g}",
        )
        for corpus in config.data.corpora
    ]
    gates = [
        (
            crossing,
            gate["name"],
            gate["statistic"],
            f"{gate['value']:.3g}",
            f"{gate['threshold']:g}",
        )
        for crossing in ("convert", "export")
        for gate in stages[f"parity_{crossing}"]["gates"]
    ]
    versions = by_stage(manifests)["train"]["versions"]
    commit = (by_stage(manifests)["train"]["git"] or {}).get("commit", "not in git")
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {config.run}",
        f"{base_model(source)}, trained further with Megatron-Core on {trained_tokens(train)}"
        f" ({train['iteration']:,} iterations). The weights are those of {export['checkpoint']}.",
        "## Data",
        table(("corpus", "documents", "tokens", "epochs"), corpora),
        "## Training",
        f"Loss {train['first_loss']:.4f} at the first iteration, {train['last_loss']:.4f} at the"
        f" last; validation {nats(train['validation_loss'])}, test"
        f" {nats(train['test_loss'])}. World size {train['world_size']}.",
        "Megatron's options:",
        f"```yaml\n{yaml.safe_dump(dict(config.train), sort_keys=False)}```",
        "## Parity",
        f"After conversion: {stages['parity_convert']['verdict']}. After export:"
        f" {stages['parity_export']['verdict']}, over {stages['parity_export']['positions']:,}"
        " positions. Each gate compares this model with Megatron's own tensors and logits.",
        table(("after", "gate", "statistic", "value", "at most"), gates),
        "## Made with",
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; commit {commit}.",
    ]
    return "\n\n".join(sections) + "\n"


def base_model(source: Mapping[str, Any]) -> str:
    """Where the training started, in words."""
    match source["source"]:
        case "hub":
            link = f"[{source['repo_id']}](https://huggingface.co/{source['repo_id']})"
            return f"{link} at commit {source['commit']} ({source['revision']})"
        case "tiny":
            return f"A tiny {source['architecture']} with random weights (seed {source['seed']})"
        case _:
            return f"The model in {source['path']}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
