"""The runs that one Snakemake makes: the one that the config describes, or those of its sweep.

The runs of a sweep share download, convert, preprocess and the gate as any runs do, by the keys of their
directories. So each stage has one rule: in a sweep its paths have the wildcards `{run}` or `{model}`,
`{megatron}`, `{data}` and `{gate}` where a single run's have a name or a key.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megaqwen.config.loading import (
    examine,
    merge_overlay,
    merged_files,
    plain,
    validate_config,
    with_types,
)
from megaqwen.config.reading import ConfigError, scalar
from megaqwen.config.sections import PathModel
from megaqwen.config.sweeps import flattened, overlays, sweep_error, sweep_of
from megaqwen.layout import Layout
from megaqwen.provenance import digest

KEYS = {
    "download": "model",
    "convert": "megatron",
    "preprocess_shard": "data",
    "preprocess": "data",
    "parity_gate": "gate",
}
"""The kind of key under which each shared stage's directory lies, which is the Layout's name for it."""
RECIPE = 1  # raised where a sweep's table comes out differently for the same runs
NAMED_RUNS = 3  # in a message


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs, whose configs are read only when they are asked for: a job needs but its own."""

    name: str
    """Of the run, or of the sweep."""
    sweep: Mapping[str, Any]
    """The config's section, empty for one run."""
    values: Mapping[str, Any]
    """What the runs have in common: the merged config, not yet validated."""
    overlays: Mapping[str, Mapping[str, Any]]
    """By each run's name, what it lays over that."""
    layouts: dict[str, Layout] = field(default_factory=dict)
    """Those that were asked for."""

    @property
    def is_sweep(self) -> bool:
        """Whether the rules' paths have wildcards."""
        return bool(self.sweep)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The runs' names, in the order of the config."""
        return tuple(self.overlays)

    @cached_property
    def results(self) -> Path:
        """The top of everything that is written."""
        return Path(str(self.values.get("results", "results")))

    @cached_property
    def directory(self) -> Path:
        """What is said of all runs: the run's own directory, or the sweep's."""
        return self.results / ("sweeps" if self.is_sweep else "runs") / self.name

    def merged(self, name: str) -> dict[str, Any]:
        """The values of a run's config; the name of one run alone is as the config has it."""
        own = {"run": name} if self.is_sweep else {}
        return merge_overlay(self.values, {**self.overlays[name], **own})

    def layout(self, name: str) -> Layout:
        """A run's config, validated, and its paths."""
        if name not in self.overlays:
            raise ConfigError(f"there is no run {name} in the sweep {self.name}")
        if name not in self.layouts:
            self.layouts[name] = Layout(config=validate_config(self.merged(name)))
        return self.layouts[name]

    def check(self) -> None:
        """ConfigError with all mistakes of all runs; one that several make is told once."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            config, mistakes = examine(self.merged(name))
            for mistake in mistakes:
                found.setdefault(str(mistake), []).append(name)
            if config and not mistakes:
                layout = self.layouts[name] = Layout(config=config)
                if reads_itself(layout):
                    words = "model.path lies in this run's own directory: give the run another name"
                    found.setdefault(
                        f"{words}, or export would replace what it began with", []
                    ).append(name)
        if not found:
            return
        if not self.is_sweep:
            validate_config(self.merged(self.name))  # raises, in the words for one run
            raise ConfigError(next(iter(found)))
        count = "a mistake" if len(found) == 1 else f"{len(found)} mistakes"
        lines = [f"{text} ({self.runs_in_words(names)})" for text, names in found.items()]
        raise ConfigError("\n    ".join([f"the configs of the sweep have {count}:", *lines]))

    def runs_in_words(self, names: list[str]) -> str:
        """Some runs, for a message."""
        if len(names) == len(self.names):
            return f"in all {len(names)} runs"
        more = f" and {len(names) - NAMED_RUNS} more" if len(names) > NAMED_RUNS else ""
        return f"in {', '.join(names[:NAMED_RUNS])}{more}"

    def layout_of(self, wildcards: Mapping[str, str]) -> Layout:
        """The layout of the run that a job is of; of a shared stage, of the first run that needs it."""
        if not self.is_sweep:
            return self.layout(self.name)
        if "run" in wildcards:
            return self.layout(wildcards["run"])
        kind, key = next((kind, wildcards[kind]) for kind in KEYS.values() if kind in wildcards)
        for name in self.names:
            if getattr(self.layout(name), kind).name == key:
                return self.layout(name)
        raise ConfigError(f"no run of the sweep {self.name} needs the {kind} {key}")

    def each(self, kind: str) -> list[Layout]:
        """A layout for each of the directories that the runs have of a kind."""
        found: dict[Path, Layout] = {}
        for layout in map(self.layout, self.names):
            found.setdefault(getattr(layout, kind), layout)
        return list(found.values())

    def place(self, kind: str) -> Path:
        """Where a kind of directory lies, as a rule's output has it: in a sweep with a wildcard."""
        if not self.is_sweep:
            path: Path = getattr(self.layout(self.name), kind)
            return path
        if kind == "run":
            return self.results / "runs" / "{run}"
        return Layout.shared(self.results, kind, f"{{{kind}}}")

    @property
    def shards(self) -> Path:
        """`place` of preprocess's shards until they are merged."""
        return Layout.shards_of(self.place("data"))

    def log(self, stage: str, suffix: str = ".log") -> Path:
        """A file of a stage among the logs; a sweep's shared stages have theirs beside its table."""
        if self.is_sweep and stage in KEYS:
            return self.directory / "logs" / f"{stage}.{{{KEYS[stage]}}}{suffix}"
        return self.place("run") / "logs" / f"{stage}{suffix}"

    @property
    def log_directories(self) -> list[Path]:
        """Where the logs of all runs lie."""
        own = [self.results / "runs" / name / "logs" for name in self.names]
        return [*([self.directory / "logs"] if self.is_sweep else []), *own]

    def label(self, name: str) -> dict[str, Any]:
        """What tells a run from the others: its own values, by their keys with dots."""
        return dict(flattened(self.overlays[name]))

    @property
    def digest(self) -> str:
        """The runs, as Snakemake sees a change of their table."""
        return digest({"runs": {name: self.label(name) for name in self.names}, "recipe": RECIPE})


def reads_itself(layout: Layout) -> bool:
    """Whether a run starts from a model that it has written itself, or is about to write."""
    model = layout.config.model
    if not isinstance(model, PathModel):
        return False
    return Path(model.path).expanduser().resolve().is_relative_to(layout.run.resolve())


def read_runs(
    path: Path, overlay: Mapping[str, Any] | None = None, overlay_files: Iterable[Path] = ()
) -> Runs:
    """The runs of a config with others laid over it, as `load_config` reads that of one.

    Raises:
        ConfigError: A file cannot be read, or its sweep cannot be made or has no name. The runs' own
            configs are not looked at yet (`Runs.check`).
    """
    base = merged_files(path, overlay_files)
    over: dict[str, Any] = plain(overlay or {})
    if "sweep" in over:
        over["sweep"] = typed(over["sweep"])
    section: Any = merge_overlay(base, over).get("sweep")
    sweep = sweep_of({} if section is None else section)
    base.pop("sweep", None)
    over.pop("sweep", None)
    if over:
        some_run = next(iter(overlays(sweep, "run").values()))
        over = with_types(merge_overlay(base, some_run), over)
    values = merge_overlay(base, over)
    is_sweep = bool(sweep.grid or sweep.runs)
    if is_sweep:
        check_name(values)
    name = str(values.get("run"))
    return Runs(
        name=name,
        sweep=section if is_sweep else {},
        values=values,
        overlays=overlays(sweep, name),
    )


def check_name(values: Mapping[str, Any]) -> None:
    """ConfigError unless a sweep's config has a name, with which those of its runs begin."""
    _, mistakes = examine(values)
    if wrong := [mistake for mistake in mistakes if mistake.path == ("run",)]:
        raise sweep_error(wrong)


def typed(values: Any) -> Any:
    """The texts of `--config` as the numbers and truth values that they write."""
    if isinstance(values, dict):
        return {key: typed(value) for key, value in values.items()}
    if isinstance(values, list):
        return [typed(value) for value in values]
    return scalar(values) if isinstance(values, str) else values
