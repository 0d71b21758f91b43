"""What a finished run says of itself: its config as one file, and where its results lie."""

import yaml

from megaqwen.config import Config
from megaqwen.layout import Layout
from megaqwen.provenance import read_json


def resolved_yaml(config: Config) -> str:
    """The whole config after merging and checking, as YAML that `load_config` reads again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def ended_lines(layout: Layout) -> list[str]:
    """The parity verdict and the places of the results, as far as they were made."""
    lines = []
    for crossing in ("convert", "export"):
        verdict = layout.run / "parity" / crossing / "parity.json"
        if verdict.is_file():
            results = read_json(verdict)["results"]
            worst = next(gate for gate in results["gates"] if gate["name"] == "logits")
            lines.append(
                f"parity after {crossing}: {results['verdict']}"
                f" (logits within {worst['value']:.1e} at {results['positions']} positions)"
            )
    places = {
        "report": layout.run / "report" / "report.html",
        "exported model": layout.run / "export" / "hf",
        "checkpoint": layout.checkpoints,
    }
    lines += [f"{name + ':':15} {path}" for name, path in places.items() if path.exists()]
    return lines
