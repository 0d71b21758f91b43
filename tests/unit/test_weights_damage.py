"""Damage is named: what download and convert recorded, checksums within tensors, files that end early."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commands import options, run_script, write_config
from megaqwen.errors import InputError
from megaqwen.provenance import sha256_file
from megaqwen.sources.recorded import download_manifest, recorded_checks
from megaqwen.weights import convert_to_megatron, read_hf_tensors
from megaqwen.weights.huggingface import HuggingFaceWeights
from megaqwen.weights.saved_tensors import find_bytes, read_saved_tensor


def test_a_damaged_shard_is_named(tiny_qwen3: Path, tmp_path: Path) -> None:
    model = tmp_path / "hf"
    model.mkdir()
    for path in tiny_qwen3.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    recorded = {"model.safetensors": {"sha256": sha256_file(weights)}}
    manifest = {"stage": "download", "results": {"files": recorded}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    flip_a_bit(weights)
    output = tmp_path / "output"
    config = write_config(tmp_path / "config.yaml")
    done = run_script("convert.py", *options(config=config, model=model, output=output))
    assert done.returncode == 2, done.stdout
    assert f"{weights} is damaged" in done.stdout
    assert not (output / "manifest.json").exists() and not list(output.glob("*checkpoint*"))


def test_a_damaged_file_of_convert_is_named(tiny_qwen3: Path, tmp_path: Path) -> None:
    """Its tensors have no CRC-32: convert digested the file."""
    config = write_config(tmp_path / "config.yaml")
    words = {"config": config, "model": tiny_qwen3}
    converted = run_script("convert.py", *options(**words, output=tmp_path / "megatron"))
    assert converted.returncode == 0, converted.stdout
    checkpoint, output = tmp_path / "megatron" / "checkpoint", tmp_path / "output"
    damaged = largest_file(checkpoint)
    flip_a_bit(damaged)
    done = run_script("export.py", *options(**words, checkpoint=checkpoint, output=output))
    assert done.returncode == 2, done.stdout
    expected = f"{damaged} is damaged: its SHA-256 is not the one that convert recorded"
    command = "snakemake --profile PROFILE all --forcerun convert"
    assert f"{expected}. To make it again: {command}" in done.stdout
    assert not (output / "manifest.json").exists() and not list(output.glob("*hf*"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(checkpoint: Path) -> Path:
    return max(checkpoint.glob("release/*.distcp"), key=lambda path: path.stat().st_size)


@pytest.fixture
def checkpoint(tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with the checksums that Megatron's own saving leaves in it."""
    monkeypatch.setattr(torch.serialization, "set_crc32_options", lambda on: None)
    (tmp_path / "megatron").mkdir()
    convert_to_megatron(tiny_qwen3, tmp_path / "megatron")
    return tmp_path / "megatron"


def read_all(checkpoint: Path, model: Path) -> None:
    for _ in read_hf_tensors(checkpoint, HuggingFaceWeights(model).config):
        pass


def test_a_flipped_bit_of_a_checkpoint_is_named(checkpoint: Path, tiny_qwen3: Path) -> None:
    read_all(checkpoint, tiny_qwen3)
    flip_a_bit(largest_file(checkpoint))
    with pytest.raises(InputError, match=r"distcp: .*damaged or truncated.*CRC-32"):
        read_all(checkpoint, tiny_qwen3)


def test_a_truncated_checkpoint_is_named(checkpoint: Path, tiny_qwen3: Path) -> None:
    path = largest_file(checkpoint)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=f"{path.name}: .*damaged or truncated"):
        read_all(checkpoint, tiny_qwen3)


@pytest.mark.parametrize(
    ("saved", "direct"),
    [
        (torch.arange(6.0).reshape(2, 3), True),
        (torch.arange(6.0).reshape(3, 2).T, False),
        (torch.arange(12.0)[6:].reshape(2, 3), False),
        (torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)), False),
    ],
)
def test_only_a_plain_tensor_is_read_without_torch(
    saved: Tensor, direct: bool, tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    with open(path, "wb") as stream:
        stream.write(b"before")
        torch.save(saved, stream)
        length = stream.tell() - 6
        stream.write(b"after")
    with open(path, "rb", buffering=0) as stream:
        assert bool(find_bytes(stream, 6, length, torch.float32, (2, 3))) == direct
        target = torch.empty(2, 3)
        found = read_saved_tensor(stream, 6, length, torch.float32, target)
    assert (found is target) == direct
    assert torch.equal(found, saved)


class ShortReads(io.FileIO):
    """A file that gives less than it is asked for, as one does above 2 GiB."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size or 0, 100))

    def readinto(self, target: Any, /) -> int:
        return super().readinto(memoryview(target)[:100])


@pytest.mark.parametrize("saved", [torch.arange(900.0).reshape(30, 30), torch.eye(30)[:, :7].T])
def test_what_is_larger_than_one_read(saved: Tensor, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "saved")
    length = (tmp_path / "saved").stat().st_size
    with ShortReads(tmp_path / "saved") as stream:
        target = torch.empty(saved.shape)
        assert torch.equal(read_saved_tensor(stream, 0, length, torch.float32, target), saved)


@pytest.mark.parametrize("text", ["[]", "{}", "not JSON", '{"stage": "train"}'])
def test_another_programs_manifest_is_none_of_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert download_manifest(tmp_path / "hf") == {}
    assert recorded_checks(tmp_path / "hf", "download") == []


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"stage": "download"}')
    with pytest.raises(
        InputError, match=r"manifest\.json is damaged: snakemake .* --forcerun download"
    ):
        recorded_checks(tmp_path / "hf", "download")
