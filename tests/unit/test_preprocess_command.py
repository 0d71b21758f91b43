"""scripts/preprocess.py as the workflow runs it, over files of every kind and the built-in text."""

import gzip
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet
from transformers import AutoTokenizer

from commands import options, run_script, write_config
from megaqwen.data.builtin import builtin_documents
from megaqwen.errors import InputError
from megaqwen.provenance import read_json, sha256_file
from preprocess import check_shards
from workspace import Workspace

END = "<|endoftext|>"


def texts(kind: str, count: int) -> list[str]:
    return [f"{kind} {number}: " + "one and two. " * (number % 9 + 1) for number in range(count)]


def json_lines(documents: Sequence[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in documents).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind that a corpus may have."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(texts("gzip", 30))))
    (folder / "deep" / "er" / "c.jsonl").write_bytes(json_lines([*texts("plain", 1100), "", " "]))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(json_lines(texts("zstd", 20))))
    parquet.write_table(pyarrow.table({"text": texts("parquet", 40)}), folder / "d.parquet")
    (folder / "e.txt").write_text("line one\nline two\n")
    (folder / "bodies.json").write_bytes(json_lines(["今天天气很好"] * 3, "body"))
    return folder


EXPECTED = [
    *texts("zstd", 20),
    *texts("gzip", 30),
    *texts("plain", 1100),
    *texts("parquet", 40),
    "line one\nline two\n",
]


def preprocess(
    workspace: Workspace, directory: Path, corpora: list[dict[str, Any]], threads: int
) -> str:
    """Run the command; what it printed."""
    write_config(directory / "config.yaml", data={"corpora": corpora})
    words = options(config="config.yaml", model=workspace.directory / "model" / "hf", output="data")
    environment = {"RAYON_NUM_THREADS": str(threads)}
    done = run_script("preprocess.py", *words, environment=environment, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def mixed(folder: Path, weight: float) -> dict[str, Any]:
    patterns = ("*.zst", "deep/**/*.jsonl*", "d.parquet", "*.txt")
    files = [str(folder / pattern) for pattern in patterns]
    return {"name": "mixed", "source": "files", "files": files, "weight": weight}


@pytest.fixture(scope="module")
def everything(
    workspace: Workspace, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Data of three corpora, made on one thread, and what was printed."""
    directory = tmp_path_factory.mktemp("everything")
    bodies = {"name": "bodies", "source": "files", "files": [str(folder / "bodies.json")]}
    corpora = [
        mixed(folder, weight=1.0),
        {**bodies, "text_field": "body"},
        {"name": "python-docs", "source": "builtin"},
    ]
    return directory / "data", preprocess(workspace, directory, corpora, threads=1)


@pytest.fixture(scope="module")
def tokenizer(workspace: Workspace) -> Any:
    return AutoTokenizer.from_pretrained(workspace.directory / "model" / "hf")


def documents(prefix: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(str(prefix))]


def test_each_corpus_holds_its_documents_in_order(
    everything: tuple[Path, str], tokenizer: Any
) -> None:
    end = tokenizer.convert_tokens_to_ids(END)
    builtin = list(builtin_documents())
    for name, expected in (
        ("mixed", EXPECTED),
        ("bodies", ["今天天气很好"] * 3),
        ("python-docs", builtin),
    ):
        found = documents(everything[0] / name)
        assert len(found) == len(expected)
        assert all(document[-1] == end for document in found)
        some = range(0, len(found), 7)  # of both, the built-in text is long
        decoded = [tokenizer.decode(found[index][:-1]) for index in some]
        assert decoded == [expected[index] for index in some]


def test_what_it_prints_is_true(everything: tuple[Path, str]) -> None:
    directory, text = everything
    pattern = r"(\S+): ([\d,]+) documents, (\S+ \S+) -> ([\d,]+) tokens \((\S+) bytes a token\)(.*)"
    lines = {match[0]: match[1:] for match in re.findall(pattern, text)}
    assert lines.keys() == {"mixed", "bodies", "python-docs"}
    tokens = (directory / "mixed.bin").stat().st_size // 2
    size = sum(len(document.encode()) for document in EXPECTED)
    assert lines["mixed"] == (
        f"{len(EXPECTED):,}",
        f"{size / 1e3:.1f} kB",
        f"{tokens:,}",
        f"{size / tokens:.1f}",
        "; 2 empty documents left out",
    )
    assert lines["bodies"][:2] == ("3", "54 bytes") and lines["bodies"][-1] == ""
    assert text.rstrip().endswith("tokenized data: data")


def test_the_manifest_is_what_is_on_disk(everything: tuple[Path, str], folder: Path) -> None:
    directory, _ = everything
    manifest = read_json(directory / "manifest.json")
    results, card = manifest["results"], read_json(directory / "card.json")
    assert {"kind", "tokenizer", "corpora"} == card.keys() and card["kind"] == "pretrain"
    assert all(results[key] == card[key] for key in card)
    data = {path for path in directory.iterdir() if path.suffix in (".bin", ".idx")}
    assert len(data) == 6 and results["files"].keys() == {path.name for path in data}
    for path in data:
        facts = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        assert results["files"][path.name] == facts
    sources = results["corpora"]["mixed"]["sources"]
    order = ("a.jsonl.zst", "deep/b.jsonl.gz", "deep/er/c.jsonl", "d.parquet", "e.txt")
    assert [source["path"] for source in sources] == [str(folder / name) for name in order]
    assert all(source["sha256"] == sha256_file(Path(source["path"])) for source in sources)
    for name, corpus in results["corpora"].items():
        counts = Counter(token for document in documents(directory / name) for token in document)
        shares = [count / counts.total() for count in counts.values()]
        entropy = -sum(share * math.log(share) for share in shares)
        assert corpus["tokens"] == counts.total()
        assert corpus["unigram_entropy"] == pytest.approx(entropy, abs=1e-9)
    assert "weight" not in json.dumps(manifest["config"])


def test_neither_threads_nor_weights_nor_other_corpora_change_a_corpus(
    workspace: Workspace, folder: Path, everything: tuple[Path, str], tmp_path: Path
) -> None:
    preprocess(workspace, tmp_path, [mixed(folder, weight=3.0)], threads=4)
    for name in ("mixed.bin", "mixed.idx"):
        assert sha256_file(tmp_path / "data" / name) == sha256_file(everything[0] / name)
    first, again = (
        read_json(path / "card.json")["corpora"]["mixed"]
        for path in (everything[0], tmp_path / "data")
    )
    assert first == again


def test_what_is_merged_are_all_shards_in_order(
    workspace: Workspace, folder: Path, tmp_path: Path
) -> None:
    bodies = {"name": "bodies", "source": "files", "files": [str(folder / "bodies.json")]}
    corpora = [{**bodies, "text_field": "body"}]
    config = write_config(tmp_path / "config.yaml", data={"corpora": corpora})
    given = options(config=config, model=workspace.directory / "model" / "hf")
    done = run_script("preprocess.py", *given, "--shard", "1-of-2", "--output", tmp_path / "first")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, whole = (tmp_path / name / "manifest.json" for name in ("first", "second", "a"))
    manifest = read_json(first)
    for path, results in ((second, {"shard": 2, "shards": 2}), (whole, {"corpora": {}})):
        shutil.copytree(first.parent, path.parent)
        path.write_text(json.dumps({**manifest, "results": results}))
    before = {path: sha256_file(path) for path in tmp_path.rglob("*") if path.is_file()}

    def refusal(*manifests: Path) -> str:
        output = tmp_path / "data"
        done = run_script("preprocess.py", *given, "--merge", *manifests, "--output", output)
        after = {path: sha256_file(path) for path in tmp_path.rglob("*") if path.is_file()}
        assert done.returncode == 2 and after == before
        return done.stdout + done.stderr

    advice = "give the manifests of all shards, each once and in order"
    told = refusal(first, first)
    assert f"--merge: {first} is of shard 1-of-2, in place 2 of 2: {advice}" in told
    assert f"--merge: {second} is of shard 2-of-2, in place 1 of 2: {advice}" in refusal(
        second, first
    )
    assert f"--merge: {first} is of shard 1-of-2, in place 1 of 1: {advice}" in refusal(first)
    with pytest.raises(InputError, match=f"--merge: {whole} is not the manifest of a shard"):
        check_shards([whole], manifest["config"])
    check_shards([first, second], manifest["config"])
    other = json.loads(first.read_text())
    other["results"]["tokenizer"]["tokenizer.json"] = "0"
    first.write_text(json.dumps(other))
    before[first] = sha256_file(first)
    told = refusal(first, second)
    assert f"--merge: {first} was made with another tokenizer than that of --model" in told
    assert "make it again with --shard 1-of-2 and this one" in told
    with pytest.raises(InputError, match=f"--merge: {first} was made with another config"):
        check_shards([first, second], {**manifest["config"], "kind": "sft"})
