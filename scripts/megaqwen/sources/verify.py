"""Checks a Hugging Face model directory before anything is built on it. Light: no torch.

Weights are judged by their safetensors headers: every shard is there, readable, and as long as its
header says. What the tensors must be called is the weight bridge's business.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from megaqwen.architecture.qwen import read_architecture
from megaqwen.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes: what the safetensors library itself accepts


@dataclass(frozen=True, kw_only=True)
class ModelDirectory:
    """What a verified model directory holds."""

    directory: Path
    model_type: str
    """As in config.json: qwen2 or qwen3."""
    weight_files: tuple[str, ...]
    """Names of the safetensors files, sorted."""
    parameters: int
    """Elements of all tensors in the files; tied weights count once, as they are stored."""
    dtypes: dict[str, int]
    """Elements by dtype, in safetensors' names (F32, BF16, ...)."""
    weight_bytes: int
    """Total size of the safetensors files."""


def verify_model_directory(directory: Path) -> ModelDirectory:
    """Check a model directory; InputError names the first thing that is wrong and what to do."""
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such model directory")
    model_type = check_architecture(directory / "config.json")
    shards = find_shards(directory)
    headers = {name: read_safetensors_header(directory / name) for name in sorted(shards)}
    for name, tensors in shards.items():
        if missing := sorted(tensors - headers[name].keys()):
            raise InputError(
                f"{directory / name}: {missing[0]} is not in the file, though {INDEX_FILE} says so"
                f" ({len(missing)} such tensors); the files are not of one model: fetch them again"
            )
    check_tokenizer(directory)
    dtypes: Counter[str] = Counter()
    for header in headers.values():
        for tensor in header.values():
            dtypes[tensor["dtype"]] += math.prod(tensor["shape"])
    return ModelDirectory(
        directory=directory,
        model_type=model_type,
        weight_files=tuple(headers),
        parameters=dtypes.total(),
        dtypes=dict(dtypes),
        weight_bytes=sum((directory / name).stat().st_size for name in headers),
    )


def check_architecture(config_file: Path) -> str:
    """The model_type of a config.json; InputError where it is not one that the bridge can carry."""
    config = read_json_object(config_file)
    try:
        return read_architecture(config).model_type
    except InputError as error:
        raise InputError(f"{config_file.parent}: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; InputError where there is no such file or it is something else."""
    if not path.is_file():
        raise InputError(
            f"{path.parent} has no {path.name}: a Hugging Face model directory holds config.json,"
            " safetensors files and a tokenizer"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def has_weights(directory: Path) -> bool:
    """Whether there are safetensors weights, complete or not."""
    return any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def find_shards(directory: Path) -> dict[str, set[str]]:
    """The safetensors files of a model, each with the tensors that the index expects in it.

    Where there is a single file it is taken, as transformers does, though older shards lie beside it.
    """
    if (directory / SINGLE_FILE).is_file():
        return {SINGLE_FILE: set()}
    index_file = directory / INDEX_FILE
    if not index_file.is_file():
        raise InputError(
            f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}:"
            " only safetensors weights are read"
        )
    weight_map = read_json_object(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index_file}: weight_map, from tensor names to files, is missing or empty"
        )
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(
                f"{index_file}: {tensor} names {name!r}, which is not a file beside it"
            )
        shards.setdefault(name, set()).add(tensor)
    missing = sorted(name for name in shards if not (directory / name).is_file())
    if missing:
        raise InputError(
            f"{directory}: {len(missing)} of {len(shards)} weight files are missing:"
            f" {', '.join(missing)}"
        )
    return shards


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file by name: dtype, shape, data_offsets.

    Raises:
        InputError: The header cannot be read, or the file is not as long as its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LONGEST_HEADER, max(size - 8, 0)):
            raise InputError(
                f"{path}: not a whole safetensors file ({size:,} bytes, and its header would be"
                f" {length:,}); fetch it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max(map(end_of_tensor, header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path}: its safetensors header cannot be read; fetch it again"
        ) from error
    if size != 8 + length + end:
        raise InputError(
            f"{path}: {size:,} bytes, but its header says {8 + length + end:,}:"
            " truncated or damaged; fetch it again"
        )
    return header


def end_of_tensor(entry: Mapping[str, Any]) -> int:
    """Where a header's entry says that its tensor ends, in bytes after the header.

    Raises:
        KeyError, TypeError, ValueError, IndexError: The entry lacks a dtype, shape or place.
    """
    if not isinstance(entry["dtype"], str) or min(map(index, entry["shape"]), default=0) < 0:
        raise ValueError("no dtype or shape")
    start, end = map(index, entry["data_offsets"])
    if not 0 <= start <= end:
        raise ValueError("no place in the file")
    return end


def check_tokenizer(directory: Path) -> None:
    """InputError unless there is a tokenizer.json, or vocab.json with merges.txt."""
    fast = (directory / "tokenizer.json").is_file()
    slow = all((directory / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not fast and not slow:
        raise InputError(
            f"{directory} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, is needed"
        )
