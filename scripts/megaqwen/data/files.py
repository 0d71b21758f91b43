"""Which files a corpus is made of, and in what format each one is.

Imports nothing heavy: the workflow asks for a corpus's files in order to declare them as inputs.
"""

import glob
from pathlib import Path
from typing import Literal

from megaqwen.config.sections import BuiltinCorpus, Corpus, FilesCorpus
from megaqwen.errors import InputError

Format = Literal["jsonl", "text", "parquet"]
Compression = Literal["gzip", "zstd"]

FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}


def corpus_files(corpus: Corpus) -> list[Path]:
    """The files of a corpus in the order in which they are read; none for the built-in corpus.

    Patterns are taken in the order of the config, and the matches of each in sorted order. `**`
    matches folders at any depth. A file that several patterns match is read once. A name that
    exists as it stands is no pattern, whatever characters it has.

    Raises:
        InputError: A pattern matches no file, or the format of a file is unknown.
    """
    if isinstance(corpus, BuiltinCorpus):
        return []
    found: dict[Path, None] = {}
    for pattern in corpus.files:
        found.update(dict.fromkeys(matching_files(corpus.name, pattern)))
    for path in found:
        file_format(path, corpus)
    return list(found)


def matching_files(corpus: str, pattern: str) -> list[Path]:
    """The files that a path or a glob pattern names, sorted."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise InputError(
            f"corpus {corpus}: {pattern} is a folder: name its files, such as {path}/**/*.jsonl"
        )
    matches = sorted(Path(match) for match in glob.iglob(str(path), recursive=True))  # noqa: PTH207
    files = [match for match in matches if match.is_file()]
    if not files:
        raise InputError(
            f"corpus {corpus}: no file matches {pattern!r} (looked in {Path.cwd()}): "
            "check data.corpora in the config"
        )
    return files


def compression_of(path: Path) -> Compression | None:
    """How a file is compressed, by its name."""
    return COMPRESSIONS.get(path.suffix.lower())


def file_format(path: Path, corpus: FilesCorpus) -> Format:
    """The format of a file: what the corpus says, or with `auto` what the file's name says.

    Raises:
        InputError: The name says nothing, or the file is a Parquet file inside .gz or .zst.
    """
    compression = compression_of(path)
    inner = path.with_suffix("") if compression else path
    declared = corpus.format
    chosen = FORMATS.get(inner.suffix.lower()) if declared == "auto" else declared
    if chosen is None:
        raise InputError(
            f"corpus {corpus.name}: {path}: the extension {inner.suffix!r} is unknown. Known are "
            f"{', '.join(FORMATS)}, and all but .parquet also with {' or '.join(COMPRESSIONS)}. "
            "For other names give the format in the config: jsonl, text or parquet"
        )
    if chosen == "parquet" and compression:
        raise InputError(
            f"corpus {corpus.name}: {path}: Parquet compresses its own columns: unpack the file"
        )
    return chosen
