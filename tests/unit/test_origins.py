"""A training whose corpus or model changed in place is set apart, and nothing else is."""

from pathlib import Path
from typing import Any

import pytest

from megaqwen.provenance import write_json
from megaqwen.training.origins import RECORD, set_apart


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Checkpoints of a start that still has its lease."""
    directory = tmp_path / "checkpoints"
    (directory / "iter_0000002").mkdir(parents=True)
    for name in ("metrics.jsonl", "lease.json", ".lease.json.partial-1"):
        (directory / name).write_text(name)
    return directory


def manifest(directory: Path, stage: str, **digests: str) -> Path:
    files: dict[str, Any] = {name: {"bytes": 1, "sha256": sha} for name, sha in digests.items()}
    path = directory.with_name(f"{stage}.json")
    write_json(path, {"stage": stage, "results": {"files": files}})
    return path


def test_what_was_there_before_records_were_kept_stays(directory: Path) -> None:
    data = manifest(directory, "preprocess", lines="0")
    for _ in range(2):
        assert set_apart(directory, [data]) == ""
    assert (directory / "iter_0000002").is_dir()


@pytest.mark.parametrize("digests", [{"lines": "1"}, {}, {"lines": "0", "more": "0"}])
def test_other_files_set_it_apart(directory: Path, digests: dict[str, str]) -> None:
    model = manifest(directory, "convert", weights="0")
    set_apart(directory, [model, manifest(directory, "preprocess", lines="0")])
    data = manifest(directory, "preprocess", **digests)
    said = set_apart(directory, [model, data])
    assert " of preprocess): training starts again" in said and "convert" not in said
    left = {"lease.json", ".lease.json.partial-1", RECORD, "before-1"}
    assert {path.name for path in directory.iterdir()} == left
    kept = {"iter_0000002", "metrics.jsonl", RECORD}
    assert {path.name for path in (directory / "before-1").iterdir()} == kept
    assert set_apart(directory, [model, data]) == ""


def test_a_kill_in_between_leaves_the_rest_to_the_next_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_apart(directory, [manifest(directory, "preprocess", lines="0")])
    data = manifest(directory, "preprocess", lines="1")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == RECORD:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        set_apart(directory, [data])
    monkeypatch.undo()
    (directory / "iter_0000004").mkdir()
    assert "before-2" in set_apart(directory, [data])
    assert not list(directory.glob("iter_*"))
