"""Make every mistake of tests/sabotage.py, and tell how far each is from passing.

    uv run python tests/benchmarks/sabotage.py --directory DIR [--model HF_DIRECTORY ...]
    uv run python tests/benchmarks/sabotage.py --directory DIR --sizes qwen3 Qwen2.5-0.5B --steps 60

Without --model and --sizes the four tiny models are made. Their weights are random, and with --steps then
trained that many steps by plain AdamW; so are those of public sizes. With --mistakes only those are made
that have one of its words in their names. Each model is converted as it is and with each mistake that it
can have, and held against the model by the parity stage's gates. Printed are, for each gate, the worst
value of a healthy model and the value of the mildest mistake that fails it; DIR/sabotage.json has every
gate of every comparison.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[0:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from megaqwen.config import Config, load_config  # noqa: E402
from megaqwen.config.tiny_shapes import TINY  # noqa: E402
from megaqwen.data.builtin import builtin_documents  # noqa: E402
from megaqwen.sources.tiny import write_tiny_model  # noqa: E402
from megaqwen.training import cpu_emulation  # noqa: E402
from trained_models import make_trained  # noqa: E402

Row = dict[str, Any]
TEXTS = [
    "def mean(values):\n    return sum(values) / len(values)\n",
    "今天天气很好，我们去公园散步吧。",
]


def config_of_texts(directory: Path) -> Config:
    """A config whose parity section compares real text, code and Chinese."""
    config = load_config(ROOT / "config" / "config.yaml").model_dump(mode="json")
    texts = [text[:600] for text in islice(builtin_documents(), 2)]
    config["parity"] |= {
        "texts": [*texts, *TEXTS],
        "held_out_documents": 0,
        "max_tokens": 96,
        "generated_tokens": 2,
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(config))
    return load_config(path)


def compare_all(models: Sequence[Path], directory: Path, words: Sequence[str]) -> Iterator[Row]:
    """Every gate of each model, healthy and with each mistake that one of the words names."""
    cpu_emulation.install()
    from megaqwen.data.tokenization import tokenizer_digests
    from megaqwen.errors import InputError
    from megaqwen.parity.gates import first_divergence
    from megaqwen.parity.localization import likely_cause
    from megaqwen.parity.measure import measure
    from megaqwen.weights import convert_to_megatron
    from sabotage import SABOTAGES, TIES, Sabotage, changed_model, sabotaged

    config = config_of_texts(directory)
    healthy = Sabotage(name="healthy", architectures=(), gate="")

    def compared(model: Path, mistake: Sabotage) -> Row:
        work = directory / "work"
        shutil.rmtree(work, ignore_errors=True)
        (work / "checkpoint").mkdir(parents=True)
        convert_to_megatron(sabotaged(model, work / "converted", mistake), work / "checkpoint")
        against = model
        if mistake.files:
            against = Path(shutil.copytree(model, work / "model"))
            mistake.files(against)
        row = {"model": model.name, "mistake": mistake.name}
        try:
            with changed_model(mistake.model):
                found = measure(
                    model=against,
                    checkpoint=work / "checkpoint",
                    data=directory,
                    config=config,
                    rounded=False,
                    tokenizer=tokenizer_digests(model),
                )
        except InputError as error:
            return {**row, "refused": str(error)}
        first = first_divergence(found.walk.points)
        return {
            **row,
            "gates": {gate.name: gate.facts() for gate in found.gates},
            "ties": sum(routing.ties for routing in found.walk.routing),
            "first": str(first) if first else "",
            "point": first.point if first else "",
            "cause": likely_cause(found.gates, found.walk.points) if found.failed else "",
        }

    for model in models:
        facts = json.loads((model / "config.json").read_text())
        yield compared(model, healthy)
        for mistake in (TIES, *SABOTAGES):
            if mistake.fits(facts) and any(word in mistake.name for word in words or [""]):
                yield compared(model, mistake)
    shutil.rmtree(directory / "work")


def margins(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each gate."""
    yield f"{'gate':12} {'threshold':>10} {'worst healthy':>14} {'mildest caught':>15}  mistake"
    measured = [row for row in rows if "gates" in row]
    for name in dict.fromkeys(name for row in measured for name in row["gates"]):
        found = [(row["gates"][name], row) for row in measured if name in row["gates"]]
        worst = max(gate["value"] for gate, row in found if row["mistake"] == "healthy")
        caught = [(gate["value"], row) for gate, row in found if not gate["passed"]]
        mildest = min(caught, key=lambda pair: pair[0], default=None)
        words = (
            f"{mildest[0]:15.3g}  {mildest[1]['model']}: {mildest[1]['mistake']}" if mildest else ""
        )
        yield f"{name:12} {found[0][0]['threshold']:10.3g} {worst:14.3g} {words}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="for models and results")
    parser.add_argument(
        "--model", type=Path, nargs="*", default=[], help="Hugging Face directories"
    )
    parser.add_argument("--sizes", nargs="*", default=[], help="tiny models or public sizes")
    parser.add_argument("--steps", type=int, default=0, help="of training before (default: 0)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step (default: 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens in one (default: 256)")
    parser.add_argument("--mistakes", nargs="*", default=[], help="words in their names")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    models = list(arguments.model)
    sizes = arguments.sizes or ([] if models else ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
    for name in sizes:
        if name in TINY and not arguments.steps:
            write_tiny_model(directory / name, name, seed=1234)
        else:
            size = {"batch": arguments.batch, "length": arguments.length}
            losses = make_trained(directory / name, name, arguments.steps, **size)
            print(f"{name}: {len(losses)} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}")
        models.append(directory / name)
    rows = []
    for row in compare_all(models, directory, arguments.mistakes):
        rows.append(row)
        failed = [name for name, gate in row.get("gates", {}).items() if not gate["passed"]]
        print(
            f"{row['model']}: {row['mistake']}: {', '.join(failed) or row.get('refused', 'passed')}",
            flush=True,
        )
        (directory / "sabotage.json").write_text(json.dumps(rows, indent=1))
    print(*margins(rows), sep="\n")


if __name__ == "__main__":
    main()
