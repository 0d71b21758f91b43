"""scripts/report.py over a small run: its figures, its escaping, and that it needs nothing else."""

import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from commands import options, run_script, write_config
from megaqwen.config import Config, load_config
from megaqwen.provenance import StageRecord, read_json
from megaqwen.report.attempts import attempts_section
from megaqwen.report.card import model_card
from megaqwen.report.data import turns
from megaqwen.training.attempts import KILLED, Attempt, next_attempt, record_end, record_start

MODEL = 'models/<b onclick="alert(1)">Qwen & sons</b>'
TEXT = "</pre><script>alert(2)</script>"
CORPUS = {"source": "files", "files": ["a.jsonl"], "weight": 1.0}
CROSSINGS = ("convert", "export")


def gates(logits: float) -> list[dict[str, Any]]:
    gate = {"statistic": "max |difference|", "detail": "", "passed": True}
    return [
        {**gate, "name": "tensors", "value": 0, "threshold": 0},
        {**gate, "name": "logits", "value": logits, "threshold": 1e-4},
    ]


COMPARED: dict[str, Any] = {
    "texts": [
        {"text": TEXT, "by_position": [1e-7, 0.0, 3e-7], "pairs": [[-1.5, -1.5], [2.0, 2.0]]}
    ],
    "layers": [
        {"layer": None, "point": "embedding", "error": 0.0, "null": 0.0},
        {"layer": 0, "point": "out", "error": 1e-7, "null": 2e-7},
        {"layer": None, "point": "final norm", "error": 2e-7, "null": 3e-7},
    ],
}
RESULTS: dict[str, dict[str, Any]] = {
    "download": {"source": "path", "path": MODEL, "parameters": 1234567, "model_type": "qwen3"},
    "convert": {"tensors": 46},
    "preprocess": {
        "tokenizer": {"class": "Qwen2Tokenizer"},
        "corpora": {
            "notes": {
                "tokens": 7654321,
                "documents": 4321,
                "bytes": 30_000_123,
                "tokens_per_byte": 0.255,
                "median_document_tokens": 1401.5,
                "empty_documents_skipped": 12,
                "short_documents_skipped": 0,
                "bad_documents_skipped": 1,
                "duplicate_documents_skipped": 1999,
                "length_histogram": [
                    {"from": 512, "below": 1024, "documents": 1080},
                    {"from": 1024, "below": 2048, "documents": 3241},
                ],
                "engine": {"name": "tokenizers", "reason": "<i>not</i> supported"},
                "sample": TEXT,
            },
            "more": {"tokens": 55, "documents": 2},
        },
    },
    "train": {
        "iteration": 5,
        "metrics": "checkpoints/abc/metrics.jsonl",
        "tokens": 20480,
        "world_size": 2,
        "first_loss": 7.8765,
        "last_loss": 5.4321,
        "validation_loss": 5.5432,
        "test_loss": None,
        "unigram_entropy": 6.5891,
        "data": {
            "notes": {
                "train": {"documents": 4321, "tokens": 7654321, "samples": 15, "epochs": 0.25}
            },
            "more": {
                "train": {"documents": 1, "tokens": 44, "samples": 5, "epochs": 116.3636},
                "valid": {"documents": 1, "tokens": 11, "samples": 4, "epochs": 372.36},
            },
        },
    },
    "export": {"checkpoint": "iter_0000005"},
    "parity_convert": {
        "crossing": "convert",
        "verdict": "passed",
        "gates": gates(8.64e-07),
        "positions": 7,
        **COMPARED,
    },
    "parity_export": {
        "crossing": "export",
        "verdict": "passed",
        "gates": gates(1.93e-06),
        "positions": 9,
        **COMPARED,
    },
}


SUMMARY = {
    "model": [MODEL],
    "parameters": ["1,234,567"],
    "data": ["notes: 7,654,321 tokens, more: 55 tokens"],
    "trained on": ["20,480 tokens in 5 iterations"],
    "ranks": ["2"],
    "loss": ["7.8765 at first, 5.4321 at last"],
    "validation loss": ["5.5432 nats per token"],
    "test loss": ["not measured"],
    "unigram entropy": ["6.5891 nats per token"],
    "parity after convert": ["passed"],
    "parity after export": ["passed"],
}


@dataclass(frozen=True)
class Run:
    """A run's directory on disk, as its stages leave it."""

    directory: Path

    @classmethod
    def made(cls, directory: Path, records: list[dict[str, Any]]) -> "Run":
        """Write config, metrics and every manifest."""
        directory.mkdir()
        write_config(
            directory / "config.yaml",
            run="small-run",
            model={"source": "path", "path": MODEL},
            parity={"texts": [TEXT]},
            data={
                "corpora": [{**CORPUS, "name": "notes"}, {**CORPUS, "name": "more", "weight": 3}]
            },
        )
        for stage, results in RESULTS.items():
            StageRecord(stage, {"stage": stage}).write(
                directory / stage / "manifest.json", inputs={}, results=results
            )
        metrics = directory / "train" / RESULTS["train"]["metrics"]
        metrics.parent.mkdir(parents=True)
        metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
        attempt = next_attempt(metrics.parent, resumed=0, ranks=2, log=directory / "train.log")
        record_start(metrics.parent, attempt)
        record_end(metrics.parent, attempt, reached=5, reason="finished", failed=False)
        return cls(directory)

    def report(self) -> str:
        """Run the command; the text of its page."""
        manifests = [self.directory / stage / "manifest.json" for stage in RESULTS]
        places = options(
            config=self.directory / "config.yaml",
            run=self.directory,
            output=self.directory / "report",
            card=self.directory / "export" / "hf" / "README.md",
        )
        done = run_script("report.py", *places, "--manifests", *manifests)
        assert done.returncode == 0, done.stdout + done.stderr
        return (self.directory / "report" / "report.html").read_text()


class Page(HTMLParser):
    """What a browser would see: tags, places that are fetched, words, and the rows of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.fetched.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "th")
        if self.cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = False

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.cell:
            self.rows[-1][-1] += data


def iterations(**left_out: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [
        {
            "iteration": iteration,
            "loss": 8.0 - iteration / 2,
            "learning_rate": 1e-3,
            "gradient_norm": 2.0,
            "tokens_per_second": 900.0,
        }
        for iteration in range(1, 6)
    ]
    records += [{"iteration": 3, "validation_loss": 6.0}, {"iteration": 5, "validation_loss": 5.5}]
    return [
        {name: value for name, value in record.items() if name not in left_out}
        for record in records
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.made(tmp_path_factory.mktemp("report") / "run", iterations())
    run.report()
    return run


@pytest.fixture(scope="module")
def text(run: Run) -> str:
    return (run.directory / "report" / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_page_has_the_runs_figures(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows}
    assert {name: rows[name] for name in list(rows)[1:] if name in SUMMARY} == SUMMARY
    tables = [row for row in page.rows if row[0] in CROSSINGS and len(row) == 6]
    assert [row[3:] for row in tables] == [
        *(["0", "0", "passed"], ["8.64e-07", "0.0001", "passed"]),
        *(["0", "0", "passed"], ["1.93e-06", "0.0001", "passed"]),
    ]
    assert [row[0] for row in page.rows if len(row) == 7] == ["stage", *RESULTS]
    (start,) = (row for row in page.rows if row[-1] == "finished")
    assert start[:4] == ["1", "from 1", "5, to 5", "2"]
    assert ["torch", "2.11.0"] in [[row[0], row[1].partition("+")[0]] for row in page.rows[-20:]]


def test_the_data_is_told(page: Page, text: str) -> None:
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 8}
    counts = ["4,321", "7,654,321", "30,000,123", "0.255", "1,401.5"]
    counts += ["12 empty, 1 bad, 1,999 duplicate"]
    assert rows["notes"] == [*counts, "tokenizers: <i>not</i> supported"]
    assert rows["more"][:2] == ["2", "55"]
    assert ["512 to 1,023", "1,080", ""] in page.rows
    assert ["1,024 to 2,047", "3,241", ""] in page.rows
    assert "width: 33.3%" in text and "width: 100.0%" in text
    assert ["notes", TEXT] in page.rows
    assert ["notes", "training", "4,321", "7,654,321", "15", "0.25"] in page.rows
    assert ["more", "validation", "1", "11", "4", "372"] in page.rows


def test_the_data_card_is_there_as_json(run: Run) -> None:
    card = read_json(run.directory / "report" / "data.json")
    assert card["tokenizer"] == RESULTS["preprocess"]["tokenizer"]
    assert card["corpora"]["more"]["drawn"]["train"]["epochs"] == 116.3636
    assert card["corpora"]["notes"]["tokens_per_byte"] == 0.255


def test_the_page_needs_nothing_from_elsewhere(page: Page, text: str) -> None:
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert page.fetched and all(place.startswith("#") for place in page.fetched)
    assert re.findall(r"@import|url\((?!#)", text) == []


def test_names_and_texts_are_escaped(page: Page) -> None:
    assert not page.tags & {"b", "script"} and not page.handlers
    assert TEXT in page.words and MODEL in page.words


def test_the_curves_have_every_point(run: Run, text: str) -> None:
    labels = {"loss.svg": ("iteration", "loss (nats per token)", "validation", "unigram entropy")}
    labels["rates.svg"] = ("learning rate", "gradient norm", "tokens per second")
    for name, words in labels.items():
        figure = (run.directory / "report" / name).read_text()
        assert figure in text
        drawing = ElementTree.fromstring(figure)
        assert set(words) <= {element.text for element in drawing.iter() if element.text}
        lines = [element.get("d", "") for element in drawing.iter() if element.tag.endswith("path")]
        assert any(len(re.findall(r"[ML] [\d.]+ [\d.]+", line)) == 5 for line in lines)


def test_the_files_for_snakemakes_report_are_whole(run: Run) -> None:
    report = run.directory / "report"
    assert {path.name for path in report.iterdir()} == {
        *("report.html", "parity.html", "versions.html", "loss.svg", "rates.svg", "config.yaml"),
        *("data.json", "verification.yaml", "parity_convert.svg", "parity_export.svg"),
    }
    assert load_config(report / "config.yaml") == load_config(run.directory / "config.yaml")
    assert "8.64e-07" in (report / "parity.html").read_text()


def test_the_same_run_gives_the_same_bytes(run: Run, text: str) -> None:
    assert run.report() == text


def test_a_run_without_gradient_norms_or_validation_has_a_report(tmp_path: Path) -> None:
    left_out = dict.fromkeys(("gradient_norm", "tokens_per_second", "validation_loss"))
    run = Run.made(tmp_path / "run", iterations(**left_out))
    for stage, change in (("train", {"validation_loss": None}), ("download", {})):
        path = run.directory / stage / "manifest.json"
        manifest = {**read_json(path), "git": None, "slurm_job": None}
        path.write_text(json.dumps({**manifest, "results": {**manifest["results"], **change}}))
    page = Page(run.report())
    assert ["validation loss", "not measured"] in page.rows
    assert ["test loss", "not measured"] in page.rows


def test_the_verification_card_lies_with_the_run_and_beside_the_export(run: Run) -> None:
    written = (run.directory / "report" / "verification.yaml").read_text()
    assert (run.directory / "export" / "hf" / "verification.yaml").read_text() == written
    card = yaml.safe_load(written)
    assert (card["verdict"], card["model"]["path"]) == ("passed", MODEL)
    assert set(card["crossings"]) == set(CROSSINGS)
    found = card["crossings"]["export"]
    assert found["gates"]["logits"] == {
        "statistic": "max |difference|",
        "value": 1.93e-06,
        "at_most": 1e-4,
        "verdict": "passed",
    }
    assert found["positions"] == 9 and found["peak_memory_gib"] > 0 and found["versions"]["torch"]
    assert found["date"] and "commit" in found
    # Its ranks are started, and the verdict that is there stays.
    launch = "python scripts/launch.py --ranks-per-node 1 --log parity.log scripts/"
    assert found["command"].startswith(launch)
    assert found["command"].endswith(" --output parity-export.json")


def test_the_differences_are_drawn_for_each_crossing(run: Run, text: str) -> None:
    for crossing in CROSSINGS:
        figure = (run.directory / "report" / f"parity_{crossing}.svg").read_text()
        assert figure in text
        words = " ".join(ElementTree.fromstring(figure).itertext())
        for label in ("position", "transformers' own rounding", "logit of Megatron", "embedding"):
            assert label in words


def card_of(config: Config, **download: str) -> tuple[dict[str, Any], str]:
    """The metadata and the text of the card of a run whose model came from elsewhere."""
    manifests = [
        {
            "stage": stage,
            "results": {**results, **(download if stage == "download" else {})},
            "versions": {"torch": "2.11.0"},
            "git": {"commit": "abcdef"},
        }
        for stage, results in RESULTS.items()
    ]
    _, metadata, text = model_card(config, manifests).split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_says_what_the_model_is_made_of(run: Run) -> None:
    run.report()
    card = (run.directory / "export" / "hf" / "README.md").read_text()
    for words in (
        "# small-run",
        f"The model in {MODEL}, trained further with Megatron-Core on 20,480 tokens (5 iterations)",
        "| notes | 4,321 | 7,654,321 | 0.25 |",
        "| more | 2 | 55 | 116 |",
        "tensor_model_parallel_size: 2",
        "validation 5.5432 nats per token, test not measured",
        "After conversion: passed. After export: passed, over 9 positions.",
        "| export | logits | max \\|difference\\| | 1.93e-06 | 0.0001 |",
    ):
        assert words in card, card


def test_the_card_names_the_base_model_as_the_hub_reads_it(run: Run) -> None:
    config = load_config(run.directory / "config.yaml")
    hub = {"source": "hub", "repo_id": "Qwen/Qwen3-0.6B", "commit": "c0ffee", "revision": "main"}
    metadata, text = card_of(config, **hub)
    assert metadata["base_model"] == "Qwen/Qwen3-0.6B"
    assert (
        "[Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B) at commit c0ffee (main)" in text
    )
    metadata, text = card_of(config, source="tiny", architecture="qwen3", seed="1")
    assert "base_model" not in metadata
    assert "A tiny qwen3 with random weights" in text


def test_conversations_have_their_targets_marked() -> None:
    pieces = [{"text": "<|im_start|>user\nIs <b>it</b>?", "target": False}]
    pieces += [{"text": "It <i>is</i>.<|im_end|>", "target": True}]
    facts = {"turns": 30, "assistant_turns": 14, "target_tokens": 250, "tokens": 1000}
    found = turns({"chats": {**facts, "sample": pieces}, "texts": {"tokens": 5}})
    assert "<mark>It &lt;i&gt;is&lt;/i&gt;.&lt;|im_end|&gt;</mark></pre>" in found
    assert "Is &lt;b&gt;it&lt;/b&gt;?<mark>" in found and "25.0%" in found and "texts" not in found
    assert turns({"texts": {"tokens": 5}}) == ""


def start(number: int, resumed: int, **ended: Any) -> Attempt:
    return Attempt(
        number=number,
        resumed=resumed,
        ranks=2,
        host="node7",
        slurm_job_id=None if number == 1 else "77",
        code={"commit": "0123456789abcdef", "modified": False},
        log="logs/train.log",
        started="2026-01-02T23:59:00Z",
        **ended,
    )


def test_each_start_of_the_training_is_told_and_its_alarms() -> None:
    starts = [
        start(1, 0),  # killed: the next one found what it had saved
        start(2, 4, ended="2026-01-03T00:02:05Z", reached=4, reason="<no> memory"),
        start(3, 4, ended="2026-01-03T00:00:00Z", reached=6, reason="finished", failed=False),
    ]
    alarms = [{"iteration": 5, "alarm": "the loss is nan"}, {"iteration": 5, "loss": 2.0}]
    page = Page(attempts_section(starts, alarms))
    _, first, second, third, _, alarm = page.rows
    when, commit = "2026-01-02T23:59:00Z", "0123456789"
    assert first == ["1", "from 1", "4, to 4", "2", "node7", when, "", commit, KILLED]
    job = "node7, Slurm job 77"
    assert second == ["2", "from 5", "0, to 4", "2", job, when, "3m05s", commit, "<no> memory"]
    assert third[1:3] == ["from 5", "2, to 6"] and third[-1] == "finished"
    assert alarm == ["5", "the loss is nan"]
