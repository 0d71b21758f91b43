"""scripts/download.py with `source: path` and `source: tiny`, and what verification refuses."""

import json
import logging
import queue
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any

import pytest

from commands import ROOT, options, run_script, write_config
from megaqwen.data.tokenization import TOKENIZER_FILES
from megaqwen.errors import InputError
from megaqwen.provenance import existing
from megaqwen.sources import progress
from megaqwen.sources.local import files_that_are_read
from megaqwen.sources.verify import verify_model_directory


@pytest.fixture
def model(tmp_path: Path, tiny_qwen3: Path) -> Path:
    return shutil.copytree(tiny_qwen3, tmp_path / "model")


def split_in_two(model: Path) -> None:
    """Rewrite model.safetensors as two shards with an index, as large models have."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, part in enumerate((names[:20], names[20:]), start=1):
        name = f"model-0000{shard}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, model / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def run_download(tmp_path: Path, model: dict[str, Any]) -> tuple[int, str, Path]:
    output = tmp_path / "output"
    config = write_config(tmp_path / "config.yaml", model=model)
    done = run_script("download.py", *options(config=config, output=output), cwd=ROOT)
    return done.returncode, done.stdout + done.stderr, output


def test_every_file_that_parity_digests_is_one_whose_change_is_seen(model: Path) -> None:
    for name in (*TOKENIZER_FILES, "model-00001-of-00002.safetensors"):
        (model / name).touch()
    seen = {path.name for path in files_that_are_read(model)}
    assert {"config.json", "model-00001-of-00002.safetensors", *TOKENIZER_FILES} <= seen
    assert files_that_are_read(model / "absent") == []


def test_a_directory_is_linked_and_left_as_it_is(tmp_path: Path, model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    for _ in range(2):
        code, text, output = run_download(tmp_path, {"source": "path", "path": str(model)})
        assert code == 0, text
        assert f"model: {model}, 2.3 M parameters in F32, 9.1 MB" in text
        assert (output / "hf").readlink() == model
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before
    results = json.loads((output / "manifest.json").read_text())["results"]
    assert results["source"] == "path" and results["path"] == str(model)
    assert results["parameters"] == 2263104
    assert results["files"]["config.json"]["bytes"] == (model / "config.json").stat().st_size


def test_a_tiny_model_is_made_and_kept(tmp_path: Path) -> None:
    tiny = {"source": "tiny", "architecture": "qwen2", "seed": 3}
    code, text, output = run_download(tmp_path, tiny)
    assert code == 0, text
    assert "model: tiny qwen2 (seed 3), 2.6 M parameters in F32, 10.3 MB" in text
    results = json.loads((output / "manifest.json").read_text())["results"]
    weights = results["files"]["model.safetensors"]
    assert weights["bytes"] == results["weight_bytes"] and len(weights["sha256"]) == 64
    code, text, _ = run_download(tmp_path, tiny)
    assert code == 0 and "already complete" in text

    code, text, _ = run_download(tmp_path, {**tiny, "seed": 4})
    assert code == 0 and "seed 4" in text
    results = json.loads((output / "manifest.json").read_text())["results"]
    assert results["files"]["model.safetensors"]["sha256"] != weights["sha256"]


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    code, text, output = run_download(tmp_path, {"source": "path", "path": "no/such"})
    assert code == 2, text
    assert "no/such" in text and "Traceback" not in text
    assert not output.exists()


def test_a_broken_directory_leaves_nothing(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    code, text, output = run_download(tmp_path, {"source": "path", "path": str(model)})
    assert code == 2, text
    assert f"{model} has no tokenizer" in text and "Traceback" not in text
    assert not output.exists()


def without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def with_config(text: str) -> Callable[[Path], None]:
    return lambda model: (model / "config.json").write_text(text) and None


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def lengthen(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as stream:
        stream.write(b"tail")


def spoil_the_header(model: Path) -> None:
    header = b'{"a": {"dtype": "F32", "sha'
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def write_header(header: object) -> Callable[[Path], None]:
    """A file of nothing but a header, and 8 bytes."""

    def damage(model: Path) -> None:
        raw = json.dumps(header).encode()
        content = struct.pack("<Q", len(raw)) + raw + bytes(8)
        (model / "model.safetensors").write_bytes(content)

    return damage


def empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def not_utf8(model: Path) -> None:
    (model / "config.json").write_bytes(b'{"a": "\xff"}')


def name_no_file(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": 3}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def dangle(model: Path) -> None:
    """A link of the Hub's cache whose file was cleaned away."""
    split_in_two(model)
    shard = model / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(model / "blobs" / "gone")


def pointer(model: Path) -> None:
    """What git leaves in a clone made without git-lfs."""
    (model / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9057288\n"
    )


def lose_a_shard(model: Path) -> None:
    split_in_two(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def swap_shards(model: Path) -> None:
    split_in_two(model)
    first = model / "model-00001-of-00002.safetensors"
    shutil.copy(first, model / "model-00002-of-00002.safetensors")


def empty_the_index(model: Path) -> None:
    split_in_two(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def leave_the_directory(model: Path) -> None:
    (model / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": "../elsewhere.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "has no config.json"),
        (with_config("{"), "config.json: not valid JSON"),
        (with_config("[]"), "config.json: a JSON object is expected, not list"),
        (
            with_config('{"model_type": "llama"}'),
            "model_type 'llama' is not supported; supported: qwen2, qwen3",
        ),
        (with_config("{}"), "model_type None is not supported"),
        (without("model.safetensors"), "has no model.safetensors and no model.safetensors.index"),
        (without("tokenizer.json"), "has no tokenizer"),
        (cut, "9,056,288 bytes, but its header says 9,057,288: truncated or damaged"),
        (cut_in_the_header, "not a whole safetensors file (500 bytes"),
        (lengthen, "9,057,292 bytes, but its header says 9,057,288"),
        (spoil_the_header, "its safetensors header cannot be read"),
        (pointer, "not a whole safetensors file"),
        (empty, "not a whole safetensors file (0 bytes"),
        (write_header([1, 2]), "its safetensors header cannot be read"),
        (write_header({"a": {"dtype": "F32", "shape": [2]}}), "header cannot be read"),
        (write_header({"a": {"shape": [2], "data_offsets": [0, 8]}}), "header cannot be read"),
        (
            write_header({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}),
            "header cannot be read",
        ),
        (
            write_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}),
            "header cannot be read",
        ),
        (not_utf8, "config.json: not valid JSON"),
        (name_no_file, "model.norm.weight names 3, which is not a file beside it"),
        (dangle, "1 of 2 weight files are missing: model-00001-of-00002.safetensors"),
        (shutil.rmtree, "there is no such model directory"),
        (lose_a_shard, "1 of 2 weight files are missing: model-00002-of-00002.safetensors"),
        (swap_shards, "is not in the file, though model.safetensors.index.json says so"),
        (empty_the_index, "weight_map, from tensor names to files, is missing or empty"),
        (leave_the_directory, "'../elsewhere.safetensors', which is not a file beside it"),
    ],
)
def test_what_is_wrong_is_named(model: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(model)
    with pytest.raises(InputError) as caught:
        verify_model_directory(model)
    assert message in str(caught.value)
    assert str(model) in str(caught.value)


def test_shards_count_like_one_file(model: Path) -> None:
    whole = verify_model_directory(model)
    split_in_two(model)
    shards = verify_model_directory(model)
    assert len(shards.weight_files) == 2
    assert (shards.parameters, shards.dtypes) == (whole.parameters, whole.dtypes)


def test_a_single_file_is_taken_as_transformers_takes_it(model: Path) -> None:
    """Not the shards that an earlier, larger save left beside it."""
    weights = model / "model.safetensors"
    kept = weights.read_bytes()
    split_in_two(model)
    weights.write_bytes(kept)
    assert verify_model_directory(model).weight_files == ("model.safetensors",)


def test_vocabulary_and_merges_are_a_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text("{}")
    (model / "merges.txt").write_text("")
    verify_model_directory(model)


def test_verification_is_light() -> None:
    code = "import sys, megaqwen.sources.verify, megaqwen.config.tiny_shapes; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(
        command, cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "numpy", "huggingface_hub"} & set(modules)


def test_progress_says_how_much_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: queue.Queue[logging.LogRecord] = queue.Queue()
    handler = QueueHandler(lines)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.1)
    monkeypatch.setattr(progress.logger, "handlers", [handler])
    monkeypatch.setattr(progress.logger, "level", logging.INFO)
    with progress.logged_progress(tmp_path, total=4_000_000):
        (tmp_path / "part").write_bytes(b"x" * 1_000_000)
        message = lines.get(timeout=10).getMessage()
    assert message.startswith("1.0 MB of 4.0 MB, ")


def test_who_needs_a_model_that_is_gone_names_its_directory(tmp_path: Path) -> None:
    link = tmp_path / "hf"
    link.symlink_to(tmp_path / "qwen")
    with pytest.raises(InputError, match=r"hf links to .*/qwen, which is gone: bring it back"):
        existing(link / "config.json", "download")
