"""The project's commands as subprocesses, and configs to give them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
REPLACED_WHOLE = ("model", "train")


def write_config(path: Path, **sections: Any) -> Path:
    """Write the embedded default with other sections: model and train whole, others laid over."""
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    for name, value in sections.items():
        laid_over = isinstance(value, dict) and name not in REPLACED_WHOLE
        config[name] = {**config[name], **value} if laid_over else value
    path.write_text(yaml.safe_dump(config))
    return path


def run_script(
    name: str, *words: object, environment: Mapping[str, str] | None = None, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run a script of the project on one thread; `settings` are those of subprocess.run."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *map(str, words)],
        **{"capture_output": True, "text": True, "timeout": 300, **settings},
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def run_benchmark(name: str, *words: object) -> str:
    """Run a script of tests/benchmarks; what it prints. An AssertionError where it fails."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "benchmarks" / name, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_ranks(
    program: Path, ranks: int, *words: object, log: Path, **environment: str
) -> subprocess.Popen[bytes]:
    """Start torchrun with a program on so many ranks of one thread each; what they say is in `log`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with open(log, "w") as stream:
        return subprocess.Popen(
            [*launch, f"--nproc-per-node={ranks}", str(program), *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def wait_for_ranks(process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Wait for their end; an AssertionError with the end of `log` where it is no good one."""
    try:
        returned = process.wait(timeout=seconds)
    finally:
        process.terminate()  # which ends its ranks; killed, it would leave them
    assert returned == 0, log.read_text()[-20_000:]


def options(**values: object) -> list[str]:
    """Words of a command line: checkpoint_manifest=x becomes --checkpoint-manifest x."""
    return [
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
