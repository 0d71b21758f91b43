"""How fast the train stage is on one GPU, and what its time goes to.

    uv run python tests/gpu/benchmark_training.py --directory DIR            # every case of CASES
    uv run python tests/gpu/benchmark_training.py --directory DIR 1.5b 8b-fp8
    CUDA_VISIBLE_DEVICES= uv run python tests/gpu/benchmark_training.py --directory DIR --small

Each case is a process that runs `megaqwen.training.run.pretrain_run`, as scripts/train.py does, over
random tokens. Two things differ: the weights are Megatron's random ones, since none of these shapes need
be downloaded for their speed; and nothing is saved, but in the case that measures saving. With several
GPUs the cases are spread over them, one on each at a time. --small shrinks every shape, to try the script
where there is no GPU.

DIR/results.json gets a record for each case, DIR/CASE.log what Megatron printed. TFLOP/s are counted by
megaqwen.training.flops; times are medians over the iterations after the first two.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "scripts"), str(HERE.parents[1]), str(HERE.parent)]

from training_cases import CASES, small  # noqa: E402

WAITING = 2  # processes a GPU: one runs, the next imports


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--directory", type=Path, required=True, help="for data, logs and results")
    parser.add_argument("--small", action="store_true", help="shrink the shapes")
    parser.add_argument("--seconds", type=float, default=400, help="the most that a case may take")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if arguments.worker:
        from training_worker import measure

        case = CASES[arguments.worker]
        measure(small(case) if arguments.small else case, arguments.directory, arguments.seconds)
        return 0
    return run_cases(arguments)


def run_cases(arguments: argparse.Namespace) -> int:
    """Spread the cases over the GPUs; 1 if one failed."""
    from training_worker import write_corpus

    directory = arguments.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    write_corpus(directory)
    results: list[dict[str, Any]] = []
    queue = list(arguments.cases or CASES)
    lock = threading.Lock()

    def work(gpu: str) -> None:
        while True:
            with lock:
                if not queue:
                    return
                name = queue.pop(0)
            record = run_case(name, gpu, arguments, directory)
            with lock:
                results.append(record)
                write_results(directory, results)
                sys.stdout.write(row(record) + "\n")
                sys.stdout.flush()

    gpus = visible_gpus()
    sys.stdout.write(HEADING + "\n")
    waiting = 1 if arguments.small else WAITING
    with ThreadPoolExecutor(max_workers=waiting * len(gpus)) as pool:
        for future in [pool.submit(work, gpu) for gpu in gpus * waiting]:
            future.result()
    return int(any("error" in record for record in results))


def visible_gpus() -> list[str]:
    """The GPUs that may be used; one empty name where there is none."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    found = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.split() or [""]


def run_case(name: str, gpu: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """A case in a process of its own; its record, or its log's last line as an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": gpu,
        **CASES[name].environment,
    }
    words = [sys.executable, str(HERE), "--directory", str(directory), "--worker", name]
    words += ["--seconds", str(arguments.seconds), *(["--small"] if arguments.small else [])]
    log, result = directory / f"{name}.log", directory / f"{name}.json"
    result.unlink(missing_ok=True)
    with open(log, "w", encoding="utf-8") as stream:
        code = subprocess.run(
            words, env=environment, stdout=stream, stderr=stream, check=False
        ).returncode
    if result.is_file():
        return {"case": name, "gpu": gpu, **json.loads(result.read_text())}
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"case": name, "gpu": gpu, "error": f"exit {code}: {(lines or [''])[-1]}"}


def write_results(directory: Path, results: list[dict[str, Any]]) -> None:
    """All records so far."""
    (directory / "results.json").write_text(json.dumps(results, indent=1))


HEADING = f"{'case':28} {'tokens/s':>9} {'TFLOP/s':>8} {'peak GiB':>9} {'loss':>7}  more"


def row(record: dict[str, Any]) -> str:
    """A record as a line of the table."""
    if "error" in record:
        return f"{record['case']:28} {record['error'][:160]}"
    more = {
        name: record[name] for name in ("start", "saves", "waits", "shares") if record.get(name)
    }
    return (
        f"{record['case']:28} {record['tokens_per_second']:9,.0f} {record['tflops']:8.1f}"
        f" {record['peak_gib']:9.1f} {record['loss']:7.3f}  {json.dumps(more) if more else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
