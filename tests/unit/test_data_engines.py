"""gigatoken gives the ids of tokenizers, or is not used."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
from pyarrow import ipc, parquet
from tokenizers import Regex, pre_tokenizers

from megaqwen.config.sections import FilesCorpus
from megaqwen.data import engines
from megaqwen.data.engines import (
    GigatokenEngine,
    Tokens,
    choose_engine,
    first_difference,
    has_new_characters,
)
from megaqwen.data.hard_texts import HARD_TEXTS, around
from megaqwen.data.parts import tokenize_part
from megaqwen.data.pieces import Shard
from megaqwen.data.readers import SAMPLE_CHARACTERS, sample_texts
from megaqwen.data.tokenization import DocumentTokenizer
from megaqwen.data.tokenize_corpus import tokenize_corpus
from megaqwen.provenance import sha256_file

# Letters that Unicode got with version 16 or 17.
NEW = ["a \u088f b", "\U000323b0", "x\U00011de0y", "\ua7d2", "\U00010940 and \U0001e6c0"]


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen3: Path) -> DocumentTokenizer:
    return DocumentTokenizer(tiny_qwen3)


@pytest.fixture(scope="module")
def engine(tokenizer: DocumentTokenizer) -> GigatokenEngine:
    return GigatokenEngine(tokenizer)


def corpus(path: Path, texts: list[str]) -> FilesCorpus:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FilesCorpus.model_validate({"source": "files", "name": path.stem, "files": [str(path)]})


def test_the_hard_texts_one_by_one(tokenizer: DocumentTokenizer, engine: GigatokenEngine) -> None:
    texts = [*HARD_TEXTS, *around(tokenizer.added_tokens()), *NEW]
    assert len(texts) > 80
    for text in texts:
        assert first_difference(engine, tokenizer, [text]) is None
    assert first_difference(engine, tokenizer, texts) is None


def test_every_assigned_character(tokenizer: DocumentTokenizer, engine: GigatokenEngine) -> None:
    points = (point for point in range(0x20, 0x110000, 7) if not 0xD800 <= point < 0xE000)
    texts = [f"x{char}y {char}{char}1{char}\n{char}'s" for char in map(chr, points)]
    assert first_difference(engine, tokenizer, texts) is None


def test_documents_with_new_characters_go_to_tokenizers(
    tokenizer: DocumentTokenizer, engine: GigatokenEngine
) -> None:
    texts = ["before", NEW[0], "between", NEW[1] * 50, "today 今天", "after"]
    assert [has_new_characters(text.encode()) for text in texts] == [0, 1, 0, 1, 0, 0]
    found = engine.encode(texts, [text.encode() for text in texts])
    assert found.ids.tolist() == [id for row in tokenizer.ids(texts) for id in row]
    assert found.lengths.tolist() == [len(row) for row in tokenizer.ids(texts)]


def test_an_emptied_cache_does_not_show(
    tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = GigatokenEngine(tokenizer)
    renewed: list[None] = []
    monkeypatch.setattr(engines, "BYTES_A_CACHE", -(2**40))
    monkeypatch.setattr(engines, "BATCHES_AT_FIRST", 1)
    monkeypatch.setattr(
        engine, "renew", lambda: (renewed.append(None), GigatokenEngine.renew(engine))
    )
    for _ in range(4):
        assert first_difference(engine, tokenizer, HARD_TEXTS) is None
    assert len(renewed) == 2  # each second time: the first time says what memory it starts from


def test_a_tokenizer_that_is_not_supported(tmp_path: Path, tiny_qwen3: Path) -> None:
    tokenizer = DocumentTokenizer(tiny_qwen3)
    split = pre_tokenizers.Split(Regex("[aeiou]+|[^aeiou]+"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    card, _ = tokenize_corpus(corpus(tmp_path / "a.jsonl", ["some text"]), tokenizer, tmp_path)
    assert card["engine"]["name"] == "tokenizers"
    assert card["engine"]["reason"].startswith("gigatoken does not support the tokenizer: ")


encode_rightly = GigatokenEngine.encode_bytes


def wrong_about_zebras(self: GigatokenEngine, documents: list[bytes]) -> Tokens:
    tokens = encode_rightly(self, documents)
    starts = numpy.cumsum(tokens.lengths) - tokens.lengths
    ids = tokens.ids.copy()
    ids[starts[[b"zebra" in document for document in documents]] + 1] += 1
    return Tokens(ids=ids, lengths=tokens.lengths)


def test_one_wrong_id_anywhere_in_the_sample_is_enough(
    tmp_path: Path,
    tokenizer: DocumentTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = [f"document {number} of some" for number in range(160)]
    notes = corpus(tmp_path / "notes.jsonl", [*texts[:81], "a zebra in the middle", *texts[81:]])
    assert "a zebra in the middle" in sample_texts(notes)
    (tmp_path / "right").mkdir()
    right, _ = tokenize_corpus(notes, tokenizer, tmp_path / "right")
    assert right["engine"] == {"name": "gigatoken", "reason": None}
    monkeypatch.setattr(GigatokenEngine, "encode_bytes", wrong_about_zebras)
    monkeypatch.setattr(engines.logger, "propagate", True)
    monkeypatch.setattr(engines.logger.parent, "propagate", True)
    card, _ = tokenize_corpus(notes, tokenizer, tmp_path)
    assert card["engine"]["name"] == "tokenizers"
    assert "zebra" in card["engine"]["reason"] and "zebra" in caplog.text
    assert sha256_file(tmp_path / "notes.bin") == sha256_file(tmp_path / "right" / "notes.bin")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".arrow", ".parquet"])
def test_what_the_sample_cannot_reach_is_held_against_tokenizers_on_the_way(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Such a file is read from its beginning, so that the sample has its first 300 documents."""
    kinds = [f"a {'horse' if number < 400 else 'zebra'} " * 28 for number in range(600)]
    path = tmp_path / f"a{suffix}"
    table = pyarrow.table({"text": [*kinds[:500], None, *kinds[500:]]})
    if suffix == ".jsonl.gz":
        lines = [json.dumps(row) + "\n" for row in table.to_pylist()]
        path.write_bytes(gzip.compress("".join(lines).encode()))
    elif suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    notes = FilesCorpus(name="a", source="files", files=[str(path)], max_bad_documents=1)
    assert not any("zebra" in text for text in sample_texts(notes))
    (tmp_path / "right").mkdir()
    right, _ = tokenize_corpus(notes, tokenizer, tmp_path / "right")
    monkeypatch.setattr(GigatokenEngine, "encode_bytes", wrong_about_zebras)
    card, _ = tokenize_corpus(notes, tokenizer, tmp_path)
    engine = card.pop("engine")
    assert engine["name"] == "tokenizers"
    assert "zebra" in engine["reason"] and engine["reason"].endswith("(found on the way)")
    assert right.pop("engine") == {"name": "gigatoken", "reason": None} and card == right
    assert sha256_file(tmp_path / "a.bin") == sha256_file(tmp_path / "right" / "a.bin")


def test_excerpts_are_from_all_over_and_small() -> None:
    texts = [f"{number:04}" * (number % 50) for number in range(2000)]
    pieces = engines.excerpts(texts)
    assert len(pieces) == 8 and {len(piece) for piece in pieces} <= set(range(4, 65))
    numbers = [int(piece[-4:]) for piece in pieces]
    assert numbers == pytest.approx([2000 * (n + 1) / 8 for n in range(8)], abs=60)
    large = engines.excerpts(["x" * 10_000_000 + "end"])
    assert len(large) == 40 and large[-1] == "x" * 61 + "end"
    assert engines.excerpts(["", "a", ""]) == ["a"] * 8
    assert engines.excerpts(["", ""]) == engines.excerpts([]) == []


def test_the_card_says_of_how_many_shards_the_engine_was_the_slower_one(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = corpus(tmp_path / "notes.jsonl", [f"document {number}" for number in range(9)])
    shards = [tmp_path / f"{index}" for index in range(3)]
    for index, directory in enumerate(shards):
        directory.mkdir()
        if index == 1:
            monkeypatch.setattr(engines, "GigatokenEngine", missing)
        tokenize_part(notes, tokenizer, directory, Shard(index=index, count=3))
    card, _ = tokenize_corpus(notes, tokenizer, tmp_path, shards)
    reason = "gigatoken cannot be imported: No module named 'gigatoken'"
    assert card["engine"] == {
        "name": "gigatoken and tokenizers",
        "reason": f"tokenizers for 2 of 3 shards: {reason}",
    }


def test_both_engines_write_the_same_files(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = corpus(tmp_path / "notes.jsonl", [*HARD_TEXTS, *around(tokenizer.added_tokens()), *NEW])
    written: list[dict[str, Any]] = []
    for name in ("gigatoken", "tokenizers"):
        if name == "tokenizers":
            monkeypatch.setattr(engines, "GigatokenEngine", missing)
        (tmp_path / name).mkdir()
        card, _ = tokenize_corpus(notes, tokenizer, tmp_path / name)
        assert card.pop("engine")["name"] == name
        written.append(card)
    assert written[0] == written[1]
    for suffix in ("bin", "idx"):
        first, second = (
            tmp_path / name / f"notes.{suffix}" for name in ("gigatoken", "tokenizers")
        )
        assert sha256_file(first) == sha256_file(second)


def missing(tokenizer: DocumentTokenizer) -> GigatokenEngine:
    raise ImportError("No module named 'gigatoken'")


def test_a_sample_is_small_however_large_the_corpus(tmp_path: Path) -> None:
    sample = sample_texts(corpus(tmp_path / "a.jsonl", ["word " * 20_000] * 100))
    assert len(sample) == 16 and {len(text) for text in sample} == {SAMPLE_CHARACTERS}


# The end of a document


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "bos_token"])
def test_the_end_of_a_document_is_never_the_end_of_a_turn(
    tmp_path: Path, tiny_qwen3: Path, name: str
) -> None:
    model = tmp_path / "instruct"
    shutil.copytree(tiny_qwen3, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, name: "<|im_end|>"}))
    base, instruct = DocumentTokenizer(tiny_qwen3), DocumentTokenizer(model)
    assert getattr(instruct.tokenizer, name) == "<|im_end|>"
    end = base.backend.token_to_id("<|endoftext|>")
    assert instruct.end_of_document == base.end_of_document == end
    assert choose_engine(instruct, "notes", []).name == "gigatoken"
    assert instruct.describe()["end_of_document"] == {"token": "<|endoftext|>", "id": end}
