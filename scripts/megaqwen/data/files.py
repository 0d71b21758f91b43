"""Which files a corpus is made of, and in what format each one is.

Imports nothing heavy: the workflow asks for a corpus's files in order to declare them as inputs.
"""

import glob
import json
from pathlib import Path
from typing import Literal

from megaqwen.config.sections import BuiltinCorpus, Corpus, FilesCorpus
from megaqwen.errors import InputError

Format = Literal["jsonl", "text", "parquet", "arrow"]
Compression = Literal["gzip", "zstd", "xz"]

FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SAVED_STATE = "state.json"  # of a data set that `datasets` saved
SAVED_SPLITS = "dataset_dict.json"  # of several in one folder
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
RENAMED = {".zstd": ".zst", ".gzip": ".gz"}  # other names of what is read
UNREAD = (".bz2", ".lz4", ".lzma", ".zip", ".7z", ".rar", ".br", ".sz", ".z", ".tar", ".tgz")


class FilesGone(InputError):
    """Nothing is there, or not all, that a corpus's path or pattern names."""

    def __init__(self, message: str, pattern: str):
        """See InputError; `pattern` is as the config has it."""
        super().__init__(message)
        self.pattern = pattern


def corpus_files(corpus: Corpus) -> list[Path]:
    """The files of a corpus in the order in which they are read; none for the built-in corpus.

    Patterns are taken in the order of the config, and the matches of each in sorted order. `**`
    matches folders at any depth. A file that several patterns match, or one by several paths, is
    read once. A name that exists as it stands is no pattern, whatever characters it has.

    Raises:
        FilesGone: A pattern matches no file, or a link to one that is not there.
        InputError: The format of a file is unknown.
    """
    if isinstance(corpus, BuiltinCorpus):
        return []
    found: dict[Path, Path] = {}
    folders: dict[Path, Path] = {}  # what each leads to
    for pattern in corpus.files:
        for path in matching_files(corpus.name, pattern):
            if path.parent not in folders:
                folders[path.parent] = path.parent.resolve()
            real = path.resolve() if path.is_symlink() else folders[path.parent] / path.name
            found.setdefault(real, path)
    for path in found.values():
        file_format(path, corpus)
    return list(found.values())


def matching_files(corpus: str, pattern: str) -> list[Path]:
    """The files that a path or a glob pattern names, sorted."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if (path / SAVED_STATE).is_file():
        return saved_files(corpus, path)
    if (path / SAVED_SPLITS).is_file():
        splits = sorted(str(each.parent) for each in path.glob(f"*/{SAVED_STATE}"))
        raise InputError(
            f"corpus {corpus}: {pattern} holds several splits of a data set: name one of them, "
            f"{' or '.join(splits) or 'each a folder below it'}"
        )
    if path.is_dir():
        raise InputError(
            f"corpus {corpus}: {pattern} is a folder: name its files, such as {path}/**/*.jsonl"
        )
    matches = sorted(Path(match) for match in glob.iglob(str(path), recursive=True))  # noqa: PTH207
    for match in matches:
        if is_broken_link(match):
            raise FilesGone(
                f"corpus {corpus}: {match}, which {pattern!r} matches, is a link to {match.readlink()}, "
                "which does not exist: mend the link or remove it",
                str(match),
            )
    files = [match for match in matches if match.is_file()]
    if not files:
        raise FilesGone(
            f"corpus {corpus}: no file matches {pattern!r} (looked in {Path.cwd()}): "
            "check data.corpora in the config",
            pattern,
        )
    return files


def is_broken_link(path: Path) -> bool:
    """Whether nothing is where a link leads; one that leads round in a circle of folders is none."""
    try:
        path.stat()
    except FileNotFoundError:
        return path.is_symlink()
    except OSError:
        return False
    return False


def saved_files(corpus: str, directory: Path) -> list[Path]:
    """The Arrow files of a data set that `datasets` saved with save_to_disk, in its order.

    The folder's state.json names them; it stands beside them.
    """
    try:
        state = json.loads((directory / SAVED_STATE).read_text(encoding="utf-8"))
        files = [directory / entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"corpus {corpus}: {directory / SAVED_STATE} is not what save_to_disk writes: {error!r}"
        ) from error
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        raise FilesGone(
            f"corpus {corpus}: {directory} lacks {', '.join(missing) or 'any data file'}: "
            "save the data set again",
            missing[0] if missing else str(directory / "*.arrow"),
        )
    return files


def compression_of(path: Path) -> Compression | None:
    """How a file is compressed, by its name."""
    return COMPRESSIONS.get(path.suffix.lower())


def file_format(path: Path, corpus: FilesCorpus) -> Format:
    """The format of a file: what the corpus says, or with `auto` what the file's name says.

    Raises:
        InputError: The name says nothing, or that the file is packed in a way that is not read, or it
            is a Parquet or Arrow file inside .gz, .zst or .xz.
    """
    compression = compression_of(path)
    inner = path.with_suffix("") if compression else path
    check_packing(inner.suffix.lower(), path, corpus.name)
    declared = corpus.format
    chosen = FORMATS.get(inner.suffix.lower()) if declared == "auto" else declared
    if chosen is None:
        raise InputError(
            f"corpus {corpus.name}: {path}: the extension {inner.suffix!r} is unknown. Known are "
            f"{', '.join(FORMATS)}, and all but .parquet and .arrow also with "
            f"{' or '.join(COMPRESSIONS)}. "
            "For other names give the format in the config: jsonl, text, parquet or arrow"
        )
    if chosen in ("parquet", "arrow") and compression:
        raise InputError(
            f"corpus {corpus.name}: {path}: {chosen.capitalize()} compresses its own columns: "
            "unpack the file"
        )
    return chosen


def check_packing(suffix: str, path: Path, corpus: str) -> None:
    """InputError where a suffix of a file says that it is packed in a way that is not read."""
    if suffix in RENAMED:
        name = RENAMED[suffix]
        raise InputError(
            f"corpus {corpus}: {path}: {suffix} is read by the name {name} alone: rename the file,"
            f" to {path.stem}{name}"
        )
    if suffix in UNREAD:
        raise InputError(
            f"corpus {corpus}: {path}: files that are packed as {suffix} are not read: unpack it, or"
            f" pack it as {' or '.join(COMPRESSIONS)}"
        )
