"""The tensors of a Hugging Face model directory: looked up in headers, read one at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqwen.architecture import Architecture, tensor_shapes
from megaqwen.errors import InputError
from megaqwen.sources.verify import (
    end_of_tensor,
    find_shards,
    read_json_object,
    read_safetensors_header,
)
from megaqwen.weights.saved_tensors import read_exactly, tensor_memory

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMED_AT_MOST = 5  # tensors in a message


@dataclass(frozen=True)
class HuggingFaceWeights:
    """The weights of a model directory."""

    directory: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        return read_json_object(self.directory / "config.json")

    @cached_property
    def entries(self) -> dict[str, tuple[Path, Mapping[str, Any]]]:
        """File and header entry (dtype, shape) of each tensor."""
        files = [self.directory / name for name in sorted(find_shards(self.directory))]
        return {
            name: (path, entry)
            for path in files
            for name, entry in read_safetensors_header(path).items()
        }

    @cached_property
    def data_starts(self) -> dict[Path, int]:
        """Where each file's tensors begin, in bytes: its header is as long as leaves room for them."""
        ends: dict[Path, int] = {}
        for path, entry in self.entries.values():
            ends[path] = max(ends.get(path, 0), end_of_tensor(entry))
        return {path: path.stat().st_size - end for path, end in ends.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each tensor."""
        return {name: DTYPES[entry["dtype"]] for name, (_, entry) in self.entries.items()}

    def check(self, qwen: Architecture) -> None:
        """InputError unless the files hold exactly the tensors of this architecture."""
        expected = tensor_shapes(qwen)
        found = set(self.entries)
        stored_twice = qwen.tied_embeddings and HEAD in found
        if stored_twice:
            expected[HEAD] = expected[EMBEDDING]
        problems = {
            "missing": sorted(expected.keys() - found),
            "not part of the model that config.json describes": sorted(found - expected.keys()),
        }
        for what, names in problems.items():
            if names:
                raise InputError(f"{self.directory}: {listed(names)}: {what}")
        for name, shape in expected.items():
            path, entry = self.entries[name]
            if tuple(entry["shape"]) != shape:
                raise InputError(
                    f"{path}: {name} has shape {entry['shape']}, but by config.json it is"
                    f" {list(shape)}"
                )
            if entry["dtype"] not in DTYPES:
                raise InputError(
                    f"{path}: {name} has dtype {entry['dtype']};"
                    f" supported: {', '.join(DTYPES)}. Give the model before quantization"
                )
        if stored_twice:
            self.check_tied_head()

    def check_tied_head(self) -> None:
        """InputError where config.json ties the output head, but the file's differs."""
        embedding, head = self.read(EMBEDDING), self.read(HEAD)
        wider = torch.promote_types(embedding.dtype, head.dtype)
        if not torch.equal(embedding.to(wider), head.to(wider)):
            raise InputError(
                f"{self.directory}: config.json says tie_word_embeddings, but {HEAD} differs from"
                f" {EMBEDDING}: set it to false to keep both"
            )

    def read(self, name: str) -> Tensor:
        """One tensor, in its dtype: read, not mapped, so that only it takes memory.

        Raises:
            InputError: The file ends within it.
        """
        path, entry = self.entries[name]
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        start = self.data_starts[path] + entry["data_offsets"][0]
        try:
            with open(path, "rb", buffering=0) as stream:
                read_exactly(stream, start, tensor_memory(tensor))
        except (OSError, EOFError) as error:
            raise InputError(f"{path}: {name} cannot be read: {error}; fetch it again") from error
        return tensor


def listed(names: list[str]) -> str:
    """Names for a message: the first few, and how many there are."""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more
