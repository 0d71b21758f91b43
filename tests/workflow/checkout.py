"""A copy of the repository to run Snakemake in, and stages that are done in no time."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from commands import ROOT

STATISTICS = re.compile(r"^Job stats:\n.*?^total", re.MULTILINE | re.DOTALL)
COUNTED = re.compile(r"^(\w+) +\d+$", re.MULTILINE)
NOTHING_TO_DO = "Nothing to be done"
STAGES = ("download", "convert", "preprocess", "parity", "launch", "export", "report")
# In place of a stage: it writes what its rule declares, and keeps its name in a list.
STUB = """
import json, pathlib, sys
words = dict(zip(sys.argv, sys.argv[1:]))
output = pathlib.Path(words["--output"])
name = pathlib.Path(sys.argv[0]).stem
if "--crossing" in words:
    name = "parity_gate" if "gates" in output.parts else "parity_" + words["--crossing"]
if "--shard" in words:
    name += "_shard_" + words["--shard"].split("-")[0]
with open("ran.txt", "a") as stream:
    stream.write(name.replace("launch", "train") + chr(10))
if name in json.loads(pathlib.Path("failing.json").read_text()):
    sys.exit("this stage was told to fail")
names = {"report": [name + ".html" for name in ("report", "parity", "versions")]}
names["report"] += ["loss.svg", "rates.svg", "parity_convert.svg", "parity_export.svg"]
names["report"] += ["config.yaml", "verification.yaml"]
paths = [output] if output.suffix else [output / each for each in names.get(name, ["manifest.json"])]
if "--card" in words:
    card = pathlib.Path(words["--card"])
    paths += [card, card.with_name("verification.yaml")]
gate = {"name": "logits", "value": 0.0}
results = {"verdict": "passed", "gates": [gate], "positions": 1, "files": {}}
verdict = {"stage": name, "results": results}
for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(verdict))
"""


@dataclass(frozen=True)
class Checkout:
    """A folder with the repository's files."""

    directory: Path

    def snakemake(
        self, *words: object, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the real Snakemake here; what it prints is in `stdout`."""
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *map(str, words)],
            cwd=self.directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    def plan(self, *words: object, profile: str = "local") -> set[str]:
        """The rules that a dry run says would run, without `all`."""
        process = self.snakemake("--profile", profile, "-n", *words)
        assert process.returncode == 0, process.stdout
        table = STATISTICS.search(process.stdout)
        assert table or NOTHING_TO_DO in process.stdout, process.stdout
        return set(COUNTED.findall(table[0])) - {"all"} if table else set()

    def run(self, *words: object) -> list[str]:
        """Run for real; the stages that ran, sorted."""
        ran = self.directory / "ran.txt"
        ran.write_text("")
        process = self.snakemake("--profile", "local", *words)
        assert process.returncode == 0, process.stdout
        return sorted(ran.read_text().split())

    def results(self, run: str, name: str) -> Any:
        """A JSON file of a run."""
        path = self.directory / "results" / "runs" / run / name
        return json.loads(path.read_text(encoding="utf-8"))

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace the only occurrence of `old` in a file."""
        file = self.directory / path
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
        file.write_text(text.replace(old, new), encoding="utf-8")


def copy_repository(directory: Path) -> Checkout:
    """Copy what git tracks or would; the environment is that of the tests."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists() and not name.startswith("tests/"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name, follow_symlinks=False)
    return Checkout(directory)


def run_tuning(directory: Path, model: Path, *words: str) -> Checkout:
    """A copy in which a shipped experiment ran that tunes what the default run exports.

    Args:
        directory: Where.
        model: The Hugging Face model that takes the default run's place.
        words: What Snakemake is asked for.
    """
    checkout = copy_repository(directory)
    shutil.copytree(model, directory / "results" / "runs" / "default" / "export" / "hf")
    done = checkout.snakemake("--profile", "local", *words)
    assert done.returncode == 0, done.stdout
    for crossing in ("convert", "export"):
        assert f"parity after {crossing}: passed" in done.stdout
    return checkout


def put_stubs(checkout: Checkout) -> None:
    """Replace the stages' scripts: Snakemake's rules, shell commands and metadata stay real."""
    for stage in STAGES:
        (checkout.directory / "scripts" / f"{stage}.py").write_text(STUB)
    (checkout.directory / "failing.json").write_text("[]")


def put_transformer_engine(directory: Path) -> dict[str, str]:
    """An environment in which such a package is found, for trainings on GPUs that do not begin."""
    (directory / "transformer_engine").mkdir(parents=True)
    (directory / "transformer_engine" / "__init__.py").touch()
    return {"PYTHONPATH": str(directory)}


def overlay(checkout: Checkout, name: str, **sections: object) -> Path:
    """Write a file for --configfile."""
    path = checkout.directory / name
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path
