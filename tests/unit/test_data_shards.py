"""Shards: every document in exactly one of them, and a result that does not show how many there were."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from megaqwen.config.sections import BuiltinCorpus, Corpus, FilesCorpus
from megaqwen.data import columns, streams
from megaqwen.data.blocks import corpus_blocks
from megaqwen.data.files import corpus_files
from megaqwen.data.merging import merge_parts
from megaqwen.data.parts import tokenize_part
from megaqwen.data.pieces import Shard, corpus_pieces
from megaqwen.data.readers import Intake, corpus_texts
from megaqwen.data.tokenization import DocumentTokenizer
from megaqwen.data.tokenize_corpus import tokenize_corpora
from megaqwen.errors import InputError
from megaqwen.provenance import read_json, sha256_file


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen3: Path) -> DocumentTokenizer:
    return DocumentTokenizer(tiny_qwen3)


def json_lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def texts(kind: str, count: int) -> list[str]:
    return [f"{kind} {number}: " + "um zwölf " * (number % 13) for number in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind, with blank lines, repeated documents and an empty file at the end."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.jsonl").write_bytes(json_lines(texts("a", 60)) + b"\n\n" + json_lines(["", "b"]))
    (folder / "b.jsonl").write_bytes(json_lines([*texts("a", 20), *texts("b", 9)]).rstrip(b"\n"))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json_lines(texts("c", 30))))
    table = pyarrow.table({"id": range(100), "text": texts("d", 100)})
    parquet.write_table(table, folder / "d.parquet", row_group_size=9)
    (folder / "e.txt").write_text("a 0: ")
    with ipc.new_stream(folder / "f.arrow", table.schema) as writer:
        writer.write_table(table.slice(90))
    (folder / "z.jsonl").write_bytes(b"")
    return folder


def mixed(folder: Path, **fields: Any) -> FilesCorpus:
    values = {"source": "files", "name": "mixed.v1", "files": [str(folder / "*")], **fields}
    return FilesCorpus.model_validate(values)


def read(corpus: Corpus, shard: Shard, block: int | None = None) -> list[str]:
    lists = corpus_texts(corpus, Intake(corpus.name), shard, block)
    return [text for each in lists for text in each]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 50, 400])
@pytest.mark.parametrize("block", [1, 100, None])
def test_every_document_is_in_one_shard_and_in_order(
    folder: Path, count: int, block: int | None
) -> None:
    corpus = mixed(folder)
    shards = [Shard(index=index, count=count) for index in range(count)]
    found = [text for shard in shards for text in read(corpus, shard, block)]
    expected = [*texts("a", 60), "", "b", *texts("a", 20), *texts("b", 9), *texts("c", 30)]
    assert found == [*expected, *texts("d", 100), "a 0: ", *texts("d", 100)[90:]]


def test_shards_are_even_where_files_can_be_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts("a", 1000)))
    corpus = mixed(tmp_path)
    sizes = [sum(map(len, read(corpus, Shard(index=index, count=7)))) for index in range(7)]
    assert max(sizes) - min(sizes) < 0.05 * max(sizes)


def test_a_plan_reads_nothing_of_the_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = mixed(folder)
    read_bytes: list[Path] = []
    monkeypatch.setattr(
        streams.DigestedFile, "__init__", lambda *words: read_bytes.append(words[1])
    )
    assert corpus_pieces(corpus, Shard(index=1, count=3))
    assert not read_bytes


def test_of_many_parquet_files_only_those_at_a_bound_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        table = pyarrow.table({"text": texts(f"{number:02}", 50)})
        parquet.write_table(table, tmp_path / f"{number:02}.parquet", row_group_size=10)
    opened: list[Path] = []
    look = columns.row_group_positions
    monkeypatch.setattr(
        columns, "row_group_positions", lambda path: opened.append(path) or look(path)
    )
    corpus = mixed(tmp_path)
    pieces = [
        piece for index in range(3) for piece in corpus_pieces(corpus, Shard(index=index, count=3))
    ]
    assert len(opened) == 4 and len(pieces) >= 20  # two bounds, each looked at from both sides
    found = [text for index in range(3) for text in read(corpus, Shard(index=index, count=3))]
    assert found == [text for number in range(20) for text in texts(f"{number:02}", 50)]


def test_the_builtin_corpus_is_all_in_the_first_shard() -> None:
    corpus = BuiltinCorpus(source="builtin", name="docs")
    assert read(corpus, Shard(index=0, count=2)) == read(corpus, Shard())
    assert read(corpus, Shard(index=1, count=2)) == []


def test_lines_are_counted_for_a_message_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that only Python's parser takes are on every line of many a file."""
    message = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    line = json.dumps({"text": "good", "messages": message, "score": float("nan")})
    (tmp_path / "a.jsonl").write_text(f"{line}\n" * 50)
    counted: list[int] = []
    monkeypatch.setattr(streams, "lines_before", lambda path, position: counted.append(position))
    assert read(mixed(tmp_path), Shard(index=1, count=2), 100) == ["good"] * 25
    blocks = corpus_blocks(mixed(tmp_path), Intake("chats"), Shard(index=1, count=2), 100)
    records = [record for block in blocks for _, record in block.records()]
    assert [record["messages"] for record in records] == [list(message)] * 25  # type: ignore[index]
    assert counted == []


@pytest.mark.parametrize("number", [1, 8, 20, 40])
def test_a_wrong_line_has_the_number_that_it_has_in_the_file(tmp_path: Path, number: int) -> None:
    lines = [json.dumps({"text": f"number {index}"}).encode() for index in range(40)]
    lines[number - 1] = b"not JSON"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    told = []
    for index in range(6):
        try:
            read(mixed(tmp_path), Shard(index=index, count=6), block=50)
        except InputError as error:
            told.append(str(error))
    assert len(told) == 1 and told[0].startswith(f"{path}:{number}: not JSON")


def made(
    corpora: Sequence[Corpus], tokenizer: DocumentTokenizer, directory: Path, count: int
) -> dict[str, Any]:
    """Data merged from shards; its files' digests are checked."""
    shards = []
    for index in range(count):
        shards.append(directory / f"{index}")
        shards[-1].mkdir(parents=True)
        for corpus in corpora:
            tokenize_part(corpus, tokenizer, shards[-1], Shard(index=index, count=count))
    (directory / "data").mkdir(parents=True)
    results = tokenize_corpora(corpora, tokenizer, directory / "data", shards)
    for name, facts in results["files"].items():
        assert facts["sha256"] == sha256_file(directory / "data" / name)
    return results


@pytest.mark.parametrize("fields", [{}, {"deduplicate": True, "min_characters": 8}], ids=str)
def test_the_result_does_not_show_the_shards(
    folder: Path, tokenizer: DocumentTokenizer, tmp_path: Path, fields: dict[str, Any]
) -> None:
    corpora = [mixed(folder, **fields), BuiltinCorpus(source="builtin", name="manifest")]
    first = made(corpora, tokenizer, tmp_path / "one", 0)
    for count in (1, 2, 5, 30):
        directory = tmp_path / f"{count}"
        assert made(corpora, tokenizer, directory, count)["files"] == first["files"]
        for path in (tmp_path / "one" / "data").iterdir():
            assert path.read_bytes() == (directory / "data" / path.name).read_bytes(), path.name
    sources = read_json(tmp_path / "one" / "data" / "card.json")["corpora"]["mixed.v1"]["sources"]
    assert [source["sha256"] for source in sources] == [
        sha256_file(path) for path in corpus_files(corpora[0])
    ]
    names = {"card.json", "manifest.bin", "manifest.idx", "mixed.v1.bin", "mixed.v1.idx"}
    assert {path.name for path in (tmp_path / "one" / "data").iterdir()} == names


def test_a_file_that_grew_between_shards_is_refused(
    tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    """The second shard would begin where the first one did not end."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(texts("a", 40)))
    corpus = mixed(tmp_path, files=[str(path)])
    shards = [tmp_path / name for name in ("0", "1")]
    for index, directory in enumerate(shards):
        directory.mkdir()
        tokenize_part(corpus, tokenizer, directory, Shard(index=index, count=2))
        with path.open("ab") as stream:
            stream.write(json_lines(texts("b", 20)) if index == 0 else b"")
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"a\.jsonl has changed since shard 1 of 2 was read: tok"):
        merge_parts(corpus, tokenizer, shards, tmp_path / "data")
    assert not any((tmp_path / "data").iterdir())


@pytest.mark.parametrize("file", [".bin", ".lengths", ".documents", ".counts.npy"])
def test_a_full_disk_stops_a_shard(tokenizer: DocumentTokenizer, tmp_path: Path, file: str) -> None:
    """Also where no more is written than fits into a buffer, so that closing the file tells first."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts("a", 3)))
    corpus = mixed(tmp_path, deduplicate=True, files=[str(tmp_path / "a.jsonl")])
    (tmp_path / f"{corpus.name}{file}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        tokenize_part(corpus, tokenizer, tmp_path, Shard())


def test_lengths_that_do_not_add_up_are_never_merged(
    folder: Path, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    corpus = mixed(folder)
    tokenize_part(corpus, tokenizer, tmp_path, Shard())
    lengths = tmp_path / f"{corpus.name}.lengths"
    written = lengths.read_bytes()
    for damaged in (bytes(len(written)), written[:-4], written[4:8] + written[4:]):
        lengths.write_bytes(damaged)
        with pytest.raises(InputError, match=r"corpus mixed\.v1: .* the lengths on disk are of"):
            merge_parts(corpus, tokenizer, [tmp_path], tmp_path)
        assert not list(tmp_path.glob("*.idx"))
    lengths.write_bytes(written)
    merge_parts(corpus, tokenizer, [tmp_path], tmp_path)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_part_that_lost_some_of_its_tokens_is_never_merged(
    folder: Path, tokenizer: DocumentTokenizer, tmp_path: Path, deduplicate: bool
) -> None:
    """As after a crash of its node, on whose disk they were not yet."""
    corpus = mixed(folder, deduplicate=deduplicate)
    parts = [tmp_path / str(index) for index in range(2)]
    for index, part in enumerate(parts):
        part.mkdir()
        tokenize_part(corpus, tokenizer, part, Shard(index=index, count=2))
    tokens = parts[1] / f"{corpus.name}.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(InputError, match=rf"{tokens} has [\d,]+ bytes where [\d,]+ were written"):
        merge_parts(corpus, tokenizer, parts, tmp_path)
