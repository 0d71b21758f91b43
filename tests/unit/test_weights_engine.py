"""The engine of the bridge: memory, workers, damage and kills."""

import errno
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from commands import ROOT, options, run_script, write_config
from megaqwen.architecture import read_architecture, tensor_shapes
from megaqwen.errors import InputError
from megaqwen.provenance import describe_files
from megaqwen.weights import bridge, convert_to_megatron, writing
from megaqwen.weights.huggingface import HuggingFaceWeights
from megaqwen.weights.safetensors_files import plan_files, write_file
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
import re, sys
from pathlib import Path
sys.path.insert(0, "scripts")
from megaqwen.weights import bridge, convert_to_megatron, export_to_huggingface, writing
writing.LEAST_MEMORY = bridge.LEAST_MEMORY = 32 * 2**20
def peak():
    # Not getrusage's: that one begins with the parent's.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
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
    assert convert < 400e6 and both < 400e6, "of a model of 800 MB"
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


def test_what_runs_beside_is_spread_and_can_fail() -> None:
    """All of it runs, however many tasks there are, and the tasks keep their results."""
    begun: list[str] = []
    for tasks, others in ((6, 3), (3, 6), (1, 0)):
        begun.clear()
        results = run_all(
            [lambda number=number: begun.append("task") or number for number in range(tasks)],
            workers=1,
            beside=[lambda: begun.append("beside")] * others,
        )
        assert results == list(range(tasks))
        assert (begun.count("task"), begun.count("beside")) == (tasks, others)
        if others == 3:
            assert begun == ["beside", "task", "task"] * 3
    with pytest.raises(InputError, match="damaged"):
        run_all([int] * 3, workers=2, beside=[lambda: fail("damaged")])


def fail(message: str) -> None:
    raise InputError(message)


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


@pytest.mark.parametrize("workers", ["0", "-1", "many"])
def test_a_number_of_workers_is_above_0(workers: str, tmp_path: Path) -> None:
    words = options(config="config.yaml", model=tmp_path, output=tmp_path / "output")
    done = run_script("convert.py", *words, "--workers", workers)
    assert done.returncode == 2
    assert f"argument --workers: invalid number above 0 value: '{workers}'" in done.stderr
