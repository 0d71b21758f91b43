"""scripts/download.py with the real huggingface_hub client against a Hub on localhost."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from safetensors.numpy import save

from hub_server import REPO, Hub, serve

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "1" * 40, "2" * 40
CHUNK = 10 * 1024 * 1024  # what the client writes at a time
UNWANTED = {"pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"not ours"}


@pytest.fixture
def hub(tiny_qwen3: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny_qwen3.iterdir()} | UNWANTED
    with serve(Hub(commits={FIRST: files}, branches={"main": FIRST})) as running:
        yield running


@pytest.fixture
def large_hub(hub: Hub) -> Hub:
    """The same with weights of three chunks and a bit."""
    tensor = numpy.arange(8_000_000, dtype=numpy.float32)
    hub.commits[FIRST]["model.safetensors"] = save({"model.norm.weight": tensor})
    return hub


class Download:
    """The command, its directories and its environment."""

    def __init__(self, tmp_path: Path, hub: Hub):
        self.tmp_path = tmp_path
        self.output = tmp_path / "model"
        self.partial = self.output / ".hf.download"
        self.config = tmp_path / "config.yaml"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
        }
        self.write_config()

    def write_config(self, **model: str) -> None:
        values = yaml.safe_load((ROOT / "config/config.yaml").read_text())
        values["model"] = {"source": "hub", "repo_id": REPO, "revision": "main", **model}
        self.config.write_text(yaml.safe_dump(values))

    def start(self, output: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "scripts/download.py", "--config", str(self.config)]
        return subprocess.Popen(
            [*command, "--output", str(output or self.output)],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, output: Path | None = None, **environment: str) -> tuple[int, str]:
        process = self.start(output, **environment)
        text, _ = process.communicate(timeout=120)
        return process.returncode, text

    def refused(self, **environment: str) -> str:
        """Run it, check that it fails as bad input does, and return the message."""
        code, text = self.run(**environment)
        assert code == 2, text
        assert "Traceback" not in text
        assert len(re.findall(r"^  error: ", text, re.MULTILINE)) == 1
        assert not (self.output / "hf").exists()
        assert not (self.output / "manifest.json").exists()
        return text

    def manifest(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.output / "manifest.json").read_text())
        return value

    def holds(self, files: Mapping[str, bytes]) -> None:
        """Check that hf/ has exactly the wanted files of a commit, and nothing is left over."""
        wanted = {name: content for name, content in files.items() if name not in UNWANTED}
        hf = self.output / "hf"
        assert {path.name: path.read_bytes() for path in hf.iterdir()} == wanted
        assert sorted(path.name for path in self.output.iterdir()) == ["hf", "manifest.json"]


@pytest.fixture
def download(tmp_path: Path, hub: Hub) -> Download:
    return Download(tmp_path, hub)


def test_a_branch_is_pinned_to_its_commit(download: Download, hub: Hub) -> None:
    code, text = download.run()
    assert code == 0, text
    assert f"model: {REPO} at {FIRST[:7]} (main)" in text
    download.holds(hub.commits[FIRST])
    results = download.manifest()["results"]
    assert (results["source"], results["repo_id"]) == ("hub", REPO)
    assert (results["revision"], results["commit"]) == ("main", FIRST)
    assert results["parameters"] == 2263104
    assert results["dtypes"] == {"F32": 2263104}
    weights = hub.commits[FIRST]["model.safetensors"]
    assert results["files"]["model.safetensors"] == {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert not hub.seen("GET", "pytorch_model.bin") and not hub.seen("GET", "onnx")


def test_the_pin_stays_when_the_branch_moves(download: Download, hub: Hub) -> None:
    assert download.run()[0] == 0
    moved = {**hub.commits[FIRST], "generation_config.json": b'{"do_sample": true}'}
    hub.commits[SECOND] = moved
    hub.branches["main"] = SECOND
    hub.requests.clear()
    code, text = download.run()
    assert code == 0 and "already complete" in text
    assert not hub.requests
    download.holds(hub.commits[FIRST])

    (download.output / "manifest.json").unlink()  # as Snakemake does before it runs a rule again
    code, text = download.run()
    assert code == 0, text
    download.holds(moved)
    assert download.manifest()["results"]["commit"] == SECOND
    assert not hub.seen("GET", "/cdn/")  # the weights did not change: they are not fetched again


def test_a_missing_shard_undoes_an_earlier_manifest(download: Download, hub: Hub) -> None:
    assert download.run()[0] == 0
    (download.output / "hf" / "model.safetensors").unlink()
    code, text = download.run()
    assert code == 0, text
    download.holds(hub.commits[FIRST])


def test_a_dropped_connection_is_resumed(download: Download, large_hub: Hub) -> None:
    hub = large_hub
    hub.drop_after = 22_000_000
    code, text = download.run()
    assert code == 0, text
    download.holds(hub.commits[FIRST])
    assert hub.seen("GET", "/cdn/")[-1].range == f"bytes={2 * CHUNK}-"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_download_goes_on_where_it_was(
    download: Download, large_hub: Hub, end: signal.Signals
) -> None:
    hub = large_hub
    hub.stall_after = 22_000_000
    process = download.start()
    assert hub.stalled.wait(60)
    wait_for_bytes(download.partial, 2 * CHUNK)
    process.send_signal(end)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(end, -end)
    if end != signal.SIGKILL:
        assert "interrupted: what has arrived is kept" in text
    assert not (download.output / "hf").exists()
    hub.stall_after = None
    hub.released.set()
    hub.requests.clear()

    code, text = download.run()
    assert code == 0, text
    assert "model.safetensors: going on after" in text
    download.holds(hub.commits[FIRST])
    gets = hub.seen("GET", f"/cdn/{FIRST}/model.safetensors")
    assert [get.range for get in gets] == [f"bytes={2 * CHUNK}-"]


def wait_for_bytes(partial: Path, count: int) -> None:
    for _ in range(200):
        sizes = [path.stat().st_size for path in partial.rglob("*.incomplete")]
        if max(sizes, default=0) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no unfinished file of {count} bytes: {sizes}")


def test_an_unknown_revision_is_refused_with_those_that_exist(download: Download, hub: Hub) -> None:
    hub.tags["v1.0"] = FIRST
    download.write_config(revision="mian")
    text = download.refused()
    assert f"{REPO} has no revision 'mian'; branches: main; tags: v1.0" in text
    assert not download.output.exists()


def test_a_tag_and_a_commit_are_revisions(download: Download, hub: Hub) -> None:
    hub.tags["v1.0"] = FIRST
    for revision in ("v1.0", FIRST):
        download.write_config(revision=revision)
        assert download.run()[0] == 0
        assert download.manifest()["results"]["commit"] == FIRST


def test_an_unknown_repository_is_refused(download: Download, hub: Hub) -> None:
    download.write_config(repo_id="Qwen/Qwen3-Tset")
    text = download.refused()
    assert f"there is no model Qwen/Qwen3-Tset at {hub.url}" in text


def test_a_gated_repository_needs_the_right_token(download: Download, hub: Hub) -> None:
    hub.gated_for = "hf_right"
    text = download.refused()
    assert f"gated and HF_TOKEN is not set: accept its terms at {hub.url}/{REPO}" in text
    assert not download.output.exists()
    assert "has no access" in download.refused(HF_TOKEN="hf_other")
    code, text = download.run(HF_TOKEN="hf_right")
    assert code == 0, text
    assert "hf_right" not in (download.output / "manifest.json").read_text()


def test_a_token_file_is_not_read(download: Download, hub: Hub) -> None:
    hub.gated_for = "hf_right"
    (download.tmp_path / "home").mkdir()
    (download.tmp_path / "home" / "token").write_text("hf_right")
    assert "HF_TOKEN is not set" in download.refused()
    assert not any(request.authorization for request in hub.requests)


def test_a_token_may_end_in_a_line_break(download: Download, hub: Hub) -> None:
    hub.gated_for = "hf_right"
    code, text = download.run(HF_TOKEN="hf_right\r\n")
    assert code == 0, text


@pytest.mark.parametrize("token", ["hf_two\nhf_lines", "hf_umläut"])
def test_a_token_that_none_can_be_is_refused_and_not_printed(
    download: Download, hub: Hub, token: str
) -> None:
    text = download.refused(HF_TOKEN=token)
    assert "HF_TOKEN holds a character that no token has" in text
    assert "hf_" not in text
    assert not hub.requests


def test_a_bad_token_is_named(download: Download, hub: Hub) -> None:
    hub.refused_token = "hf_expired"
    text = download.refused(HF_TOKEN="hf_expired")
    assert "the Hub refused the token in HF_TOKEN (401)" in text


def test_a_truncated_file_is_named(download: Download, hub: Hub) -> None:
    hub.truncate_to = 4_000_000
    text = download.refused()
    size = len(hub.commits[FIRST]["model.safetensors"])
    assert f"file should be of size {size} but has size 4000000" in text
    assert "model.safetensors" in text
    hub.truncate_to = None
    assert download.run()[0] == 0
    download.holds(hub.commits[FIRST])


def test_a_damaged_file_is_named_and_fetched_again(download: Download, hub: Hub) -> None:
    hub.damage = True
    text = download.refused()
    assert "model.safetensors arrived damaged" in text
    assert hashlib.sha256(hub.commits[FIRST]["model.safetensors"]).hexdigest() in text
    hub.damage = False
    assert download.run()[0] == 0
    download.holds(hub.commits[FIRST])


def test_an_unreachable_hub_is_named(download: Download) -> None:
    text = download.refused(HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub at http://127.0.0.1:9 cannot be reached" in text


def test_a_hub_that_is_down_is_named(download: Download, hub: Hub) -> None:
    hub.down = True
    assert f"{REPO}: {hub.url} answered 503" in download.refused()


def test_a_page_in_place_of_the_hub_is_named(download: Download, hub: Hub) -> None:
    hub.page = b"<html>Sign in</html>"
    assert f"{hub.url} does not answer as a Hugging Face Hub" in download.refused()


def test_a_mirror_need_not_say_how_large_files_are(download: Download, hub: Hub) -> None:
    hub.silent = True
    code, text = download.run()
    assert code == 0, text
    download.holds(hub.commits[FIRST])


def test_offline_mode_is_named(download: Download, hub: Hub) -> None:
    assert "HF_HUB_OFFLINE" in download.refused(HF_HUB_OFFLINE="1")
    assert not hub.requests


def test_another_architecture_is_refused_before_its_weights(download: Download, hub: Hub) -> None:
    hub.commits[FIRST]["config.json"] = b'{"model_type": "llama"}'
    text = download.refused()
    assert "model_type 'llama' is not supported; supported: qwen2, qwen3" in text
    assert not hub.seen("GET", "model.safetensors")
    assert not download.output.exists()


def test_a_repository_without_safetensors_is_refused(download: Download, hub: Hub) -> None:
    del hub.commits[FIRST]["model.safetensors"]
    assert "no safetensors weights" in download.refused()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_told_before_the_download(
    download: Download, hub: Hub, small_disk: Path
) -> None:
    download.output = small_disk / "model"
    text = download.refused()
    assert f"{download.output}: 19." in text and "are needed and" in text and "free" in text
    assert not hub.seen("GET", "/cdn/")
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_is_told(download: Download, small_disk: Path) -> None:
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    download.config.write_text(yaml.safe_dump(values))
    download.output = small_disk / "model"
    assert "the disk is full" in download.refused()
    assert not list(download.output.iterdir())
