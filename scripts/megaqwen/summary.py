"""What a run says of itself: its config as one file, where its results lie, or why it failed."""

import re
from itertools import takewhile
from pathlib import Path

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


LOGGED = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ ([A-Z]+) ", re.MULTILINE)


def failed_lines(logs: Path, since: float) -> list[str]:
    """The last error of each stage, from the logs written to after `since` (seconds since the epoch).

    Of ranks that failed with the same words, one is named.
    """
    errors: dict[str, str] = {}
    for log in sorted(logs.glob("*.log")):
        if log.stat().st_mtime < since:
            continue
        # Level and text by turns, behind what was printed before the first record.
        _, *records = LOGGED.split(log.read_text(encoding="utf-8", errors="replace"))
        if records and records[-2] == "ERROR":
            first, *rest = records[-1].splitlines()
            # A message goes on over indented lines; what libraries print at exit is not indented.
            text = "\n".join([first, *takewhile(lambda line: line.startswith(" "), rest)])
            text = text.removeprefix("error: ")
            errors.setdefault(text, f"{log.name.split('.')[0]} failed: {text}")
    return list(errors.values())
