"""The verification card: what was held against what, by which gates, with which result."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megaqwen.report.pages import Manifest, by_stage

CROSSINGS = ("parity_convert", "parity_export")
KEPT = ("model_type", "source", "repo_id", "revision", "commit", "path", "architecture", "seed")
SIGNIFICANT = 4
"""Digits of a measured value."""


def verification(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """A card of the crossings that the manifests tell of.

    Args:
        manifests: Of download and of the parity after convert, after export or after both.
    """
    stages = by_stage(manifests)
    source = stages["download"]["results"]
    crossings = [stages[name] for name in CROSSINGS if name in stages]
    passed = all(each["results"]["verdict"] == "passed" for each in crossings)
    return {
        "verdict": "passed" if passed else "failed",
        "model": {name: source[name] for name in KEPT if name in source},
        "crossings": {each["results"]["crossing"]: crossing_card(each) for each in crossings},
    }


def crossing_card(manifest: Manifest) -> dict[str, Any]:
    """What one parity stage found, and how to find it again."""
    results = manifest["results"]
    commit = (manifest["git"] or {}).get("commit")
    return {
        "verdict": results["verdict"],
        "date": manifest["finished"],
        "command": command_again(manifest),
        "commit": commit,
        "versions": dict(manifest["versions"]),
        "seconds": manifest["seconds"],
        "peak_memory_gib": round(manifest["peak_memory_bytes"] / 2**30, 2),
        "positions": results["positions"],
        "gates": {gate["name"]: gate_card(gate) for gate in results["gates"]},
        **({"ranks": results["ranks"]["ranks"]} if "ranks" in results else {}),
        "not_measured": results.get("unmeasured", {}),
    }


def command_again(manifest: Manifest) -> str:
    """What measures it again, on the same number of ranks, into files of its own."""
    script, *words = manifest["command"]
    given, kept = iter(words), []
    for word in given:
        if word in ("--gate", "--log", "--output"):
            next(given)
        else:
            kept.append(word)
    results = manifest["results"]
    ranks = results.get("ranks", {}).get("ranks", 1)
    launch = ("python scripts/launch.py --ranks-per-node", str(ranks), "--log parity.log")
    output = ("--output", f"parity-{results['crossing']}.json")
    return " ".join((*launch, f"scripts/{script}", *kept, *output))


def gate_card(gate: Mapping[str, Any]) -> dict[str, Any]:
    """A gate's statistic, value and threshold."""
    return {
        "statistic": gate["statistic"],
        "value": float(f"{gate['value']:.{SIGNIFICANT}g}"),
        "at_most": gate["threshold"],
        "verdict": "passed" if gate["passed"] else "failed",
    }


def as_yaml(card: Mapping[str, Any]) -> str:
    """A card as text."""
    return yaml.safe_dump(dict(card), sort_keys=False, allow_unicode=True, width=106)
