"""Which files a corpus is made of."""

import subprocess
import sys
from pathlib import Path

import pytest

from megaqwen.config.sections import BuiltinCorpus, FilesCorpus
from megaqwen.data.files import FilesGone, corpus_files, file_format
from megaqwen.errors import InputError

SCRIPTS = Path(__file__).parents[2] / "scripts"


def corpus(*files: str, **fields: str) -> FilesCorpus:
    return FilesCorpus.model_validate(
        {"source": "files", "name": "notes", "files": list(files), **fields}
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "deep/d.txt.gz", "odd[1].txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*files: str) -> list[str]:
    return [str(path) for path in corpus_files(corpus(*files))]


def test_patterns_keep_the_order_of_the_config_and_matches_are_sorted() -> None:
    assert names("deep/d.txt.gz", "*.jsonl") == ["deep/d.txt.gz", "a.jsonl", "b.jsonl"]


def test_two_stars_match_folders_at_any_depth() -> None:
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/er/c.jsonl"]


def test_a_file_that_several_patterns_match_is_read_once() -> None:
    assert names("b.jsonl", "*.jsonl") == ["b.jsonl", "a.jsonl"]


def test_a_file_that_several_paths_lead_to_is_read_once(tmp_path: Path) -> None:
    place = tmp_path / "linked"
    (place / "2024").mkdir(parents=True)
    (place / "2024" / "a.jsonl").write_text("{}")
    (place / "latest").symlink_to("2024")
    (place / "current").symlink_to(".")
    (place / "b.jsonl").symlink_to("2024/a.jsonl")
    assert len(names(f"{place}/**/*.jsonl")) == 1
    first = f"{place}/2024/a.jsonl"
    assert names(first, f"{place}/../linked/*/a.jsonl") == [first]


def test_a_file_whose_name_looks_like_a_pattern() -> None:
    assert names("odd[1].txt") == ["odd[1].txt"]


def test_absolute_paths_and_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert names(f"{folder}/a.*", "~/b.jsonl") == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]


def test_the_builtin_corpus_has_no_files() -> None:
    assert corpus_files(BuiltinCorpus(source="builtin", name="docs")) == []


def test_a_pattern_that_matches_nothing_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"corpus notes: no file matches 'c\*\.jsonl'") as error:
        corpus_files(corpus("*.jsonl", "c*.jsonl"))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("pattern", ["deep/**/*.jsonl", "deep/er/*", "deep/er/z.jsonl"])
def test_a_link_to_a_file_that_is_not_there_is_named(folder: Path, pattern: str) -> None:
    """It was once a part of the corpus. A folder, or a link to one, is no file and is passed over."""
    (folder / "deep" / "er" / "y.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "other").mkdir()
    (folder / "deep" / "er" / "folder.jsonl").symlink_to(folder / "other")
    assert names("deep/er/*") == ["deep/er/c.jsonl", "deep/er/y.jsonl"]
    (folder / "deep" / "er" / "z.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(FilesGone) as error:
        corpus_files(corpus(pattern))
    told = (
        "corpus notes: deep/er/z.jsonl, which '.*' matches, is a link to gone.jsonl, which does not"
    )
    assert error.match(told) and error.value.pattern == "deep/er/z.jsonl"


def test_a_folder_is_refused_with_advice() -> None:
    with pytest.raises(InputError, match=r"deep is a folder: .* deep/\*\*/\*\.jsonl"):
        corpus_files(corpus("deep"))


def test_a_folder_of_several_splits_names_them(folder: Path) -> None:
    (folder / "saved" / "train").mkdir(parents=True)
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "saved" / "train" / "state.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"saved holds several splits .*: name one of them, saved/train"
    ):
        corpus_files(corpus("saved"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("a.json.gz", "jsonl"),
        ("a.JSONL.ZST", "jsonl"),
        ("a.b.txt", "text"),
        ("a.txt.gz", "text"),
        ("a.parquet", "parquet"),
    ],
)
def test_auto_goes_by_the_name(name: str, expected: str) -> None:
    assert file_format(Path(name), corpus(name)) == expected


@pytest.mark.parametrize("name", ["a.csv", "a.gz", "a"])
def test_an_unknown_extension_needs_a_format(name: str, folder: Path) -> None:
    (folder / name).touch()
    with pytest.raises(InputError, match=r"is unknown\. Known are \.jsonl, \.json, .*give the fo"):
        corpus_files(corpus(name))
    assert corpus_files(corpus(name, format="jsonl")) == [Path(name)]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.jsonl.bz2", r"packed as \.bz2 are not read: unpack it, or pack it as \.gz or \.zst or"),
        ("a.txt.LZ4", r"packed as \.lz4 are not read: unpack it"),
        ("a.zip", r"packed as \.zip are not read: unpack it"),
        ("a.tar.gz", r"packed as \.tar are not read: unpack it"),
        ("a.jsonl.zstd", r"rename the file, to a\.jsonl\.zst$"),
    ],
)
@pytest.mark.parametrize("format", ["auto", "jsonl"])
def test_a_file_that_is_packed_otherwise_is_refused_whatever_its_format(
    name: str, advice: str, format: str, folder: Path
) -> None:
    (folder / name).touch()
    with pytest.raises(InputError, match=advice) as error:
        corpus_files(corpus(name, format=format))
    assert "give the format" not in str(error.value)


def test_a_compressed_parquet_file_is_refused(folder: Path) -> None:
    (folder / "a.parquet.gz").touch()
    with pytest.raises(InputError, match="Parquet compresses its own columns"):
        corpus_files(corpus("a.parquet.gz"))


def test_the_workflow_can_ask_without_heavy_imports() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import megaqwen.data.files; "
        "print({'numpy', 'pyarrow', 'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
