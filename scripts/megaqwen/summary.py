"""What a run says of itself: its config as one file, where its results lie, or why it failed."""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from megaqwen.config import Config
from megaqwen.config.reading import ConfigDumper
from megaqwen.errors import STOPPED
from megaqwen.layout import Layout
from megaqwen.provenance import read_json, stands, write_text
from megaqwen.runs import Runs
from megaqwen.sweep_table import sweep_lines
from megaqwen.training.logs import MORE_MEMORY, NO_MEMORY, SLURM, rank_of


def resolved_yaml(config: Config) -> str:
    """The whole config after merging and checking, as YAML that `load_config` reads again."""
    return as_yaml(config.model_dump(mode="json"))


def as_yaml(values: Any) -> str:
    """Values as the text of a config file."""
    return yaml.dump(values, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)


def store_configs(runs: Runs) -> None:
    """Keep the config that each run is made with beside its results, where its stages read it."""
    if runs.is_sweep:
        whole = {**runs.values, "sweep": runs.sweep}
        store(runs.directory / "config.yaml", as_yaml(whole))
    for layout in map(runs.layout, runs.names):
        store(layout.run / "config.yaml", resolved_yaml(layout.config))
    for layout in runs.each("data"):
        layout.store_shard_count(layout.shard_count(planning=True))


def store(path: Path, text: str) -> None:
    """Write a file where it is not there as it should be."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def ended_lines(runs: Runs) -> list[str]:
    """The last words of a run or a sweep that made its report."""
    return sweep_lines(runs) if runs.is_sweep else run_lines(runs.layout(runs.name))


def run_lines(layout: Layout) -> list[str]:
    """The parity verdict and the places of the results, as far as they were made."""
    lines = []
    train, export = (layout.run / name / "manifest.json" for name in ("train", "export"))
    exported = stands(train, layout.stage_digest("train")) and stands(
        export, layout.stage_digest("export"), train=train
    )
    made_of = {"convert": {"checkpoint": layout.megatron / "manifest.json"}}
    if exported:
        made_of["export"] = {"checkpoint": train, "model": export}
    for crossing, inputs in made_of.items():
        verdict = layout.run / "parity" / crossing / "parity.json"
        if stands(verdict, layout.stage_digest("parity"), **inputs):
            results = read_json(verdict)["results"]
            worst = next(gate for gate in results["gates"] if gate["name"] == "logits")
            lines.append(
                f"parity after {crossing}: {results['verdict']}"
                f" (logits within {worst['value']:.1e} at {results['positions']} positions)"
            )
    places = {"checkpoint": layout.checkpoints}
    if exported:  # else these are of another config
        report, model = layout.run / "report" / "report.html", layout.run / "export" / "hf"
        places = {"report": report, "exported model": model, **places}
    lines += [f"{name + ':':15} {path}" for name, path in places.items() if path.exists()]
    return lines


KILLED_LINES = 40  # of the launcher's log, at most
RANK_LINES = 5
SHOWN_RANKS = 4
SRUN_TASK = re.compile(r"tasks? (\d+): (?!Terminated)")
LOGGED = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ ([A-Z]+) ", re.MULTILINE)


def failed_lines_of_all(runs: Runs, since: float) -> list[str]:
    """`failed_lines` of all runs; those of a sweep say which of them it was."""
    return [
        f"{logs.parent.name}: {line}" if runs.is_sweep else line
        for logs in runs.log_directories
        for line in failed_lines(logs, since)
    ]


def failed_lines(logs: Path, since: float) -> list[str]:
    """The last error of each stage, from the logs written to after `since` (seconds since the epoch).

    Of ranks that failed with the same words, one is named. Of ranks that were killed, and so left no
    words, the launcher's and the last lines of their own logs are said.
    """
    errors: dict[str, str] = {}
    written = [log for log in sorted(logs.glob("*.log")) if log.stat().st_mtime >= since]
    for log in written:
        if text := last_error(log):
            stage = log.name.split(".")[0]
            errors.setdefault(
                text, f"{stage} {text if text.startswith(STOPPED) else f'failed: {text}'}"
            )
    lines = list(errors.values())
    for launcher in written:
        ranks = [log for log in written if log.name.startswith(f"{launcher.name}.rank")]
        ranks.sort(key=rank_of)
        if ranks and not any(map(ends_in_error, ranks)):
            lines += killed_lines(launcher, ranks)
    return lines


def last_error(log: Path) -> str | None:
    """The message that a log's last record has where that is an error; None elsewhere."""
    # Level and text by turns, behind what was printed before the first record.
    _, *records = LOGGED.split(log.read_text(encoding="utf-8", errors="replace"))
    if not records or records[-2] != "ERROR":
        return None
    first, *rest = records[-1].splitlines()
    # A message goes on over indented lines; what libraries print at exit is not indented.
    text = "\n".join([first, *takewhile(lambda line: line.startswith(" "), rest)])
    return text.removeprefix("error: ")


def ends_in_error(log: Path) -> bool:
    """Whether the last that a stage logged is its failure."""
    return last_error(log) is not None


def killed_lines(launcher: Path, ranks: list[Path]) -> list[str]:
    """What is known of ranks that were killed: srun's words on them, and the ends of their logs.

    Those that were only terminated because another one failed are left out where srun tells.
    """
    said = launcher.read_text(encoding="utf-8", errors="replace").splitlines()[-KILLED_LINES:]
    words = [line for line in said if SLURM.match(line)]
    lost = [int(number) for line in words for number in SRUN_TASK.findall(line)]
    named = [log for log in ranks if rank_of(log) in lost]
    if not words:
        return []
    lines = [f"{launcher.stem} failed: a rank was killed or its node was lost", *words]
    if any(map(NO_MEMORY.search, words)):
        lines.append(MORE_MEMORY)
    for log in (named or ranks)[:SHOWN_RANKS]:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-RANK_LINES:]
        lines += [f"the last lines of {log}:", *(f"  {line}" for line in last)]
    return lines
