"""The documents of a corpus, and every way in which a file can be wrong."""

import gzip
import itertools
import json
import logging
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import ipc, parquet

from megaqwen.config.sections import BuiltinCorpus, FilesCorpus
from megaqwen.data import streams
from megaqwen.data.builtin import builtin_documents
from megaqwen.data.readers import Intake, corpus_documents, corpus_texts
from megaqwen.errors import InputError

TEXTS = ["first", "", "zwei\nZeilen", "今天天气很好", "a line\u2028separator \x00 and a zero"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
}


def read(*files: Path, **fields: str) -> list[str]:
    values = {"source": "files", "name": "notes", "files": [str(file) for file in files]}
    return list(corpus_documents(FilesCorpus.model_validate({**values, **fields})))


def json_lines(texts: list[str], field: str = "text") -> bytes:
    lines = (json.dumps({field: text, "id": 1}, ensure_ascii=False) for text in texts)
    return "\n".join(lines).encode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refusal(*files: Path, **fields: str) -> str:
    with pytest.raises(InputError) as error:
        read(*files, **fields)
    return str(error.value)


# What is read


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.jsonl{suffix}", PACK[suffix](json_lines(TEXTS)))
    assert read(path) == TEXTS


@pytest.mark.parametrize("suffix", PACK)
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    content = "\n".join(TEXTS)
    path = write(tmp_path / f"a.txt{suffix}", PACK[suffix](content.encode()))
    assert read(path, path.parent / f"*.txt{suffix}") == [content]


def test_the_text_field_is_the_configs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS, "body"))
    assert read(path, text_field="body") == TEXTS


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}\r\n')
    assert read(path) == ["a", "b"]
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfa\n")) == ["a\n"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_files_packed_in_several_pieces(tmp_path: Path, suffix: str) -> None:
    content = json_lines(TEXTS)
    pieces = PACK[suffix](content[:20]) + PACK[suffix](content[20:])
    assert read(write(tmp_path / f"a.jsonl{suffix}", pieces)) == TEXTS


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    column = pyarrow.array(TEXTS * 200, pyarrow.string()).cast(kind)
    table = pyarrow.table({"id": range(len(column)), "text": column})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=301)
    assert read(tmp_path / "a.parquet") == TEXTS * 200


def test_files_of_different_formats_follow_one_another(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["c"]}), tmp_path / "c.parquet")
    write(tmp_path / "a.jsonl", b'{"text": "a"}')
    write(tmp_path / "b.txt", b"b")
    assert read(tmp_path / "*") == ["a", "b", "c"]


def test_a_format_that_is_given_overrules_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b'{"text": "a"}')
    assert read(path, format="jsonl") == ["a"]
    assert read(path, format="text") == ['{"text": "a"}']


def test_the_builtin_corpus() -> None:
    corpus = BuiltinCorpus(source="builtin", name="docs")
    few = list(itertools.islice(corpus_documents(corpus), 5))
    assert few == list(itertools.islice(builtin_documents(), 5))


# Memory


@pytest.mark.parametrize("suffix", PACK)
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(streams, "BLOCK", 2**19)
    content = PACK[suffix](json_lines(["0123456789" * 400] * 10_000))  # 40 MB
    path = write(tmp_path / f"a.jsonl{suffix}", content)
    corpus = FilesCorpus.model_validate({"source": "files", "name": "a", "files": [str(path)]})
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    documents = corpus_documents(corpus)
    next(documents)
    assert pyarrow.total_allocated_bytes() - before < 4e6
    assert sum(1 for _ in documents) == 9_999
    dictionary = 16e6 if suffix == ".xz" else 0
    assert tracemalloc.get_traced_memory()[1] < 4e6 + dictionary
    tracemalloc.stop()


def test_memory_does_not_grow_with_a_parquet_row_group(tmp_path: Path) -> None:
    texts = [f"{number:08}" * 500 for number in range(10_000)]  # 40 MB, in one row group
    parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False
    )
    del texts
    corpus = FilesCorpus.model_validate(
        {"source": "files", "name": "a", "files": [str(tmp_path / "a.parquet")]}
    )
    before, most = pyarrow.total_allocated_bytes(), 0
    for document in corpus_documents(corpus):
        assert len(document) == 4_000
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < 12e6


def test_reading_starts_before_the_file_is_known_to_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK", 2**20)
    lines = json_lines(["text " * 50] * 20_000)
    path = write(tmp_path / "a.jsonl", lines + b"\nnot JSON")
    corpus = FilesCorpus.model_validate({"source": "files", "name": "a", "files": [str(path)]})
    assert next(corpus_documents(corpus)) == "text " * 50


# What is wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"hello there", r":2: not JSON (Expecting value: line 1 column 1 (char 0)): one JSON"),
        (b'{"text": "a"', r":2: not JSON (Expecting ',' delimiter"),
        (b"[1, 2]", r":2: one JSON object a line is expected, found an array: '[1, 2]'"),
        (b'"a"', r":2: one JSON object a line is expected, found a string"),
        (b"[" * 100_000, r":2: not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", r":2: not JSON (Exceeds the limit (4300 digits)"),
        (b'{"txt": "a", "id": 1}', r":2: no field 'text'. Fields that it has: txt, id. Did you"),
        (b'{"body": "a"}', r":2: no field 'text'. Fields that it has: body. Set text_field"),
        (b"{}", r":2: no field 'text'. Fields that it has: none. Set text_field in the config"),
        (b'{"text": null}', r":2: the field 'text' is to be a string, found null"),
        (b'{"text": 3.5}', r":2: the field 'text' is to be a string, found a number"),
        (b'{"text": true}', r":2: the field 'text' is to be a string, found a boolean"),
        (b'{"text": ["a"]}', r":2: the field 'text' is to be a string, found an array"),
        (b'{"text": {"a": 1}}', r":2: the field 'text' is to be a string, found an object"),
        (b'{"text": "caf\xe9"}', r":2: not UTF-8 at these bytes: e9 22 7d"),
        (b'{"text": "\\ud83d"}', r":2: the text holds half a surrogate pair at character 0"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    told = refusal(path)
    assert told.startswith(f"{path}{message}")
    assert len(told) < 400


def test_a_misspelt_text_field_gets_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"content": "a", "id": 1}')
    assert "Did you mean 'content'?" in refusal(path, text_field="contents")


def test_the_whole_surrogate_pair_is_fine(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", b'{"text": "\\ud83d\\ude00"}')) == ["😀"]


def test_a_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\ntwo\n\xff\xfeo\n")
    assert refusal(path).startswith(f"{path}:3: not UTF-8 at these bytes: ff fe 6f 0a")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_compressed_file_that_was_cut(tmp_path: Path, suffix: str, name: str) -> None:
    whole = PACK[suffix](json_lines([str(number) for number in range(50_000)]))
    for kept in (len(whole) // 2, len(whole) - 3, 0):
        path = write(tmp_path / f"{name}{suffix}", whole[:kept])
        told = refusal(path)
        assert told.startswith(f"{path}: ")
        assert told.endswith("get it again")


def test_a_later_stream_of_xz_that_is_damaged_costs_no_documents_in_silence(tmp_path: Path) -> None:
    """Python's own reader takes one that does not begin rightly for something that is not its own."""
    first, second = (PACK[".xz"](json_lines([each]) + b"\n") for each in ("one", "two"))
    for place in range(len(second)):
        damaged = bytearray(second)
        damaged[place] ^= 16
        path = write(tmp_path / "a.jsonl.xz", first + bytes(damaged))
        assert refusal(path).endswith("get it again")
    assert read(write(tmp_path / "a.jsonl.xz", first + bytes(4096) + second)) == ["one", "two"]
    assert "3 zeros follow a stream" in refusal(write(tmp_path / "a.jsonl.xz", first + bytes(3)))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_a_file_that_is_not_compressed_though_its_name_says_so(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.jsonl{suffix}", b'{"text": "a"}')
    assert refusal(path).startswith(f"{path}: cannot be read: ")


def test_a_file_that_was_packed_with_too_large_a_window(tmp_path: Path) -> None:
    """It is whole: to get it again would help nobody."""

    def packed(window: int) -> Path:
        parameters = zstandard.ZstdCompressionParameters(window_log=window, write_content_size=0)
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        content = packer.compress(b'{"text": "a"}') + packer.flush()
        return write(tmp_path / f"{window}.jsonl.zst", content)

    assert read(packed(27)) == ["a"]
    told = refusal(packed(28))
    assert told.startswith(f"{tmp_path}/28.jsonl.zst: ") and "get it again" not in told
    assert told.endswith("unpack it, or pack it again without --long")


def test_a_document_past_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LARGEST_DOCUMENT", 50)
    small = b'{"text": "a"}\n'
    path = write(tmp_path / "a.jsonl", small + json_lines(["x" * 50]))
    assert refusal(path).startswith(f"{path}:2: a document of more than")
    path = write(tmp_path / "a.txt", b"x" * 51)
    assert refusal(path).startswith(f"{path}: a document of more than")
    parquet.write_table(pyarrow.table({"text": ["a", "x" * 51]}), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet").startswith(f"{tmp_path / 'a.parquet'}: row 2: a docum")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"texts": ["a"], "id": [1]}), tmp_path / "a.parquet")
    told = refusal(tmp_path / "a.parquet")
    assert "no column 'text'. Columns that it has: texts, id. Did you mean 'texts'?" in told


def test_parquet_whose_column_holds_no_strings(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    told = refusal(tmp_path / "a.parquet")
    assert told.endswith("the column 'text' is to hold strings, found int64")


def test_parquet_with_a_null_names_the_row(tmp_path: Path) -> None:
    texts = ["a"] * 300 + [None]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    told = refusal(tmp_path / "a.parquet")
    assert told.endswith("row 301: the column 'text' is to be a string, found null")


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path).startswith(f"{path}: not a readable Parquet file: ")


# Data sets that datasets saved


def save_to_disk(directory: Path, texts: list[str], files: int = 2) -> Path:
    """As datasets' save_to_disk does it: Arrow streams, and state.json that names them in order."""
    directory.mkdir()
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    size = -(-len(texts) // files)
    for number, name in enumerate(names):
        table = pyarrow.table({"text": texts[number * size : (number + 1) * size]})
        with ipc.new_stream(directory / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")
    return directory


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    directory = save_to_disk(tmp_path / "saved", TEXTS * 4)
    assert read(directory) == TEXTS * 4
    table = pyarrow.table({"body": ["in the file format"]})
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "a.arrow", text_field="body") == ["in the file format"]


def test_a_saved_data_set_that_is_damaged(tmp_path: Path) -> None:
    directory = save_to_disk(tmp_path / "saved", TEXTS)
    told = refusal(directory, text_field="texts")
    assert "no column 'texts'. Columns that it has: text. Did you mean 'text'?" in told
    second = directory / "data-00001-of-00002.arrow"
    whole = second.read_bytes()
    second.write_bytes(whole[:-40])
    assert refusal(directory).startswith(f"{second}: not a readable Arrow file: ")
    second.write_bytes(whole[:-8])  # between two batches, where pyarrow sees nothing missing
    assert "an Arrow stream without its end" in refusal(directory)
    second.unlink()
    assert refusal(directory).endswith(f"lacks {second}: save the data set again")
    (directory / "state.json").write_text("{}")
    assert "state.json is not what save_to_disk writes" in refusal(directory)


# What may be wrong


def tolerant(path: Path, tolerated: int) -> FilesCorpus:
    values = {"source": "files", "name": "notes", "files": [str(path)]}
    return FilesCorpus.model_validate({**values, "max_bad_documents": tolerated})


def take(path: Path, tolerated: int) -> tuple[list[str], Intake]:
    intake = Intake("notes", tolerated)
    lists = corpus_texts(tolerant(path, tolerated), intake)
    return [text for texts in lists for text in texts], intake


BAD_LINES = [b"not JSON", b'{"text": "caf\xe9"}', b'{"text": 1}', b"{}", b'{"text": "\\ud83d"}']


def test_bad_lines_within_the_tolerance_are_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [json.dumps({"text": f"good {number}"}).encode() for number in range(len(BAD_LINES))]
    lines = [line for pair in zip(good, BAD_LINES, strict=True) for line in pair]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    monkeypatch.setattr(logging.getLogger("megaqwen"), "propagate", True)
    texts, intake = take(path, len(BAD_LINES))
    assert texts == [f"good {number}" for number in range(len(BAD_LINES))]
    assert intake.bad == len(BAD_LINES)
    logged = [record.getMessage() for record in caplog.records]
    assert [message.split(": ")[:3] for message in logged] == [
        ["notes", "left out", f"{path}:{number}"] for number in (2, 4, 6, 8, 10)
    ]


def test_one_bad_line_too_many_names_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + b"\n".join(BAD_LINES))
    with pytest.raises(InputError) as error:
        take(path, 2)
    told = str(error.value).splitlines()
    assert told[0].startswith("corpus notes: more than 2 documents cannot be used, which is what")
    assert [line.strip().split(": ")[0] for line in told[1:]] == [f"{path}:{n}" for n in (2, 3, 4)]


def test_bad_rows_and_bad_text_files_are_tolerated_too(tmp_path: Path) -> None:
    texts = ["a", None, "b"]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert take(tmp_path / "a.parquet", 1)[0] == ["a", "b"]
    write(tmp_path / "a.txt", b"\xff")
    write(tmp_path / "b.txt", b"good")
    found, intake = take(tmp_path / "*.txt", 1)
    assert (found, intake.bad) == (["good"], 1)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_rows_that_are_not_utf8_are_named_or_tolerated(tmp_path: Path, kind: str) -> None:
    """Arrow does not look at the bytes of a string when it reads them."""
    rows = pyarrow.array([b"good", b"caf\xe9 au lait", b"better"])
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(rows), rows.buffers())
    encoded = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pyarrow.table({"text": encoded})
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        assert refusal(path).startswith(f"{path}: row 2: not UTF-8 at these bytes: e9 20 61 75")
        found, intake = take(path, 1)
        assert (found, intake.bad) == (["good", "better"], 1)


def test_a_damaged_file_is_never_tolerated(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines(TEXTS))[:-9])
    with pytest.raises(InputError, match="get it again"):
        take(path, 100)


def test_an_object_a_line_is_expected_however_well_others_can_be_read(tmp_path: Path) -> None:
    two = write(tmp_path / "a.jsonl", b'{"text": "a"} {"text": "b"}\n')
    assert refusal(two).startswith(f"{two}:1: not JSON (Extra data")
    spread = write(tmp_path / "b.jsonl", b'{"text":\n"a"}\n')
    assert refusal(spread).startswith(f"{spread}:1: not JSON")
    assert read(write(tmp_path / "c.jsonl", b'{"text": "a", "score": NaN}\n')) == ["a"]


@pytest.mark.parametrize("wrong", [b'{"text": "a"} {"text": "b"}', b'{"text": "a"}{"text": "b"}'])
@pytest.mark.parametrize("neighbour", [b"", b"\r", b'{"text":\n"c"}', b'{"text": "c"\n}'])
def test_two_objects_on_a_line_are_refused_whatever_stands_beside_them(
    tmp_path: Path, wrong: bytes, neighbour: bytes
) -> None:
    """Of such lines there are as many as records: one of two records, one of none."""
    path = write(tmp_path / "a.jsonl", wrong + b"\n" + neighbour + b"\n")
    assert refusal(path).startswith(f"{path}:1: not JSON (Extra data")
    path = write(tmp_path / "b.jsonl", b'{"text": "c"}\n' + neighbour + b"\n" + wrong)
    number = 3 + neighbour.count(b"\n") if not neighbour.strip() else 2
    assert refusal(path).startswith(f"{path}:{number}: not JSON")
