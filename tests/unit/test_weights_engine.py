"""The engine of the bridge: memory, workers, damage and kills."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commands import ROOT, options, run_script, write_config
from megaqwen.architecture import read_architecture, tensor_shapes
from megaqwen.errors import InputError
from megaqwen.provenance import describe_files, sha256_file
from megaqwen.sources.recorded import download_manifest, recorded_digests
from megaqwen.weights import bridge, convert_to_megatron, read_hf_tensors, writing
from megaqwen.weights.huggingface import HuggingFaceWeights
from megaqwen.weights.safetensors_files import plan_files, write_file
from megaqwen.weights.saved_tensors import find_bytes, read_saved_tensor
from megaqwen.weights.workers import Progress, run_all

# 12 layers of 67 MB, none of whose tensors has more than 17 MB; as Megatron has them, 34 MB.
LARGE = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MEASURE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "scripts")
from megaqwen.weights import bridge, convert_to_megatron, export_to_huggingface, writing
writing.LEAST_MEMORY = bridge.LEAST_MEMORY = 32 * 2**20
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model, place = Path(sys.argv[1]), Path(sys.argv[2])
for each in ("megatron", "back"):
    (place / each).mkdir()
before = peak()
convert_to_megatron(model, place / "megatron", workers=4)
between = peak()
export_to_huggingface(model, place / "megatron", place / "back", max_shard_bytes=10**8, workers=4)
print(between - before, peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.8 GB."""
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(LARGE))
    (directory / "tokenizer.json").write_text("{}")
    shapes = tensor_shapes(read_architecture(LARGE))
    files = plan_files(shapes, dict.fromkeys(shapes, torch.float32), 10**10)
    for name, entries in files.items():
        tensors = ((key, torch.randn(shapes[key])) for key in entries)
        write_file(directory / name, entries, tensors)
    return directory


def test_memory_is_bounded_by_the_largest_tensor(large: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, large, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    convert, both = map(int, done.stdout.split()[-2:])
    assert convert < 250e6 and both < 300e6, "of a model of 800 MB"
    (weights,) = large.glob("*.safetensors")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 4
    back = HuggingFaceWeights(large)
    assert back.dtypes.keys() == tensor_shapes(read_architecture(LARGE)).keys()
    assert weights.stat().st_size > 800e6


def test_a_killed_conversion_starts_again(large: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    config = write_config(tmp_path / "config.yaml")
    words = options(config=config, model=large, output=output)
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "convert.py", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(output.glob(".checkpoint.partial-*/release/*.distcp")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "checkpoint").exists() and not (output / "manifest.json").exists()
    done = run_script("convert.py", *words)
    assert done.returncode == 0, done.stdout
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint", "manifest.json"]
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["results"]["files"] == describe_files(output / "checkpoint")


def test_workers_change_nothing(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "FILE_BYTES", 10**6)
    described = []
    for workers in (1, 4):
        directory = tmp_path / str(workers)
        directory.mkdir()
        streamed = convert_to_megatron(tiny_qwen3, directory, workers=workers)
        described.append(describe_files(directory))
        assert describe_files(directory, streamed.files) == described[-1]
    assert described[0] == described[1]
    assert len(described[0]) > 5


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


def test_the_first_error_ends_the_work() -> None:
    begun = []

    def task(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise InputError("here")
        time.sleep(0.05)

    with pytest.raises(InputError, match="here"):
        run_all([lambda number=number: task(number) for number in range(100)], workers=2)
    assert len(begun) < 50


def test_progress_says_what_is_left() -> None:
    progress = Progress(4 * 10**9, None)
    progress.started -= 2
    progress.add(10**9)
    assert re.fullmatch(r"1\.0 GB of 4\.0 GB, 0\.50 GB/s, [67]s left", str(progress))


def test_shards_are_few_and_even() -> None:
    shapes = {f"layer {number}": (10,) for number in range(50)}  # 40 bytes each
    files = plan_files(shapes, dict.fromkeys(shapes, torch.float32), 900)
    sizes = [sum(entry.bytes for entry in entries.values()) for entries in files.values()]
    assert sizes == [680, 680, 640]
    assert [name for entries in files.values() for name in entries] == list(shapes)


def test_a_file_that_cannot_be_written_leaves_no_worker_waiting(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file fails with all of the shared memory in its hands; the others need it."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    megatron.mkdir()
    back.mkdir()
    convert_to_megatron(tiny_qwen3, megatron)
    monkeypatch.setattr(bridge, "LEAST_MEMORY", 1)
    failed = threading.Event()

    def full(*_: object) -> None:
        if not failed.is_set():
            time.sleep(0.2)
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")

    def export() -> None:
        with pytest.raises(OSError, match="No space"):
            bridge.export_to_huggingface(
                tiny_qwen3, megatron, back, max_shard_bytes=10**6, workers=4
            )

    monkeypatch.setattr(Progress, "add", full)
    thread = threading.Thread(target=export, daemon=True)
    thread.start()
    thread.join(30)
    assert failed.is_set() and not thread.is_alive()


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


@pytest.mark.parametrize("workers", ["0", "-1", "many"])
def test_a_number_of_workers_is_above_0(workers: str, tmp_path: Path) -> None:
    words = options(config="config.yaml", model=tmp_path, output=tmp_path / "output")
    done = run_script("convert.py", *words, "--workers", workers)
    assert done.returncode == 2
    assert f"argument --workers: invalid number above 0 value: '{workers}'" in done.stderr


@pytest.mark.parametrize("text", ["[]", "{}", "not JSON", '{"stage": "train"}'])
def test_another_programs_manifest_is_none_of_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert download_manifest(tmp_path / "hf") == {}
    assert recorded_digests(tmp_path / "hf") == {}


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"stage": "download"}')
    with pytest.raises(InputError, match=r"manifest\.json is damaged: run download again"):
        recorded_digests(tmp_path / "hf")
