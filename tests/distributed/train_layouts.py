"""Ranks that train the same few iterations under one layout after another, through Megatron's `pretrain`.

    torchrun --nproc-per-node 4 train_layouts.py JOBS.json

JOBS.json: {"models": {name: {"hf_config": config.json, "checkpoint": ...}}, "data": a prefix, "losses": a
file to write, "layouts": {model: {name: options under train}}}. Start-up is what costs; it is paid once.
The options, the model, the datasets and the forward step are those of a training.
"""

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from forgetting import forget

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))


def train(model: dict[str, Any], data: Path, options: dict[str, Any]) -> list[float]:
    """The losses of one layout, on the last rank; none on the others."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training import training as megatron_training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megaqwen.config import load_config
    from megaqwen.config.megatron_options import to_arguments
    from megaqwen.training.arguments import RunPaths, training_options
    from megaqwen.training.datasets import Corpora, EndOfDocument, dataset_provider
    from megaqwen.training.forward import forward_step
    from megaqwen.training.model import model_config

    nowhere = Path("unused")
    paths = RunPaths(pretrained=Path(model["checkpoint"]), checkpoints=nowhere, tensorboard=nowhere)
    config = load_config(ROOT / "config" / "config.yaml").model_copy(update={"train": options})
    whole = training_options(config, model["hf_config"], paths, gpu=False)
    for name in ("save", "load", "tensorboard_dir"):
        del whole[name]
    sys.argv = [sys.argv[0], *to_arguments(whole)]
    arguments = parse_and_validate_args()
    losses: list[float] = []
    log = megatron_training.training_log

    def training_log(loss_dict: dict[str, Any], *rest: Any, **named: Any) -> Any:
        losses.extend(float(loss) for loss in loss_dict.values())
        return log(loss_dict, *rest, **named)

    megatron_training.training_log = training_log
    corpora = Corpora(
        prefixes=[data],
        weights=[[1.0, 1.0, 1.0]],
        splits=[[1.0, 0.0, 0.0]],
        seed=1,
        cache=data.with_name("cache"),
        tokenizer=EndOfDocument(eod=0, vocab_size=model["hf_config"]["vocab_size"]),
    )
    container = pretrain_cfg_container_from_args(arguments, model_config(arguments))
    try:
        pretrain(container, dataset_provider(corpora), ModelType.encoder_or_decoder, forward_step)
    finally:
        megatron_training.training_log = log
        forget()
    return losses


def main() -> None:
    """All layouts; one that fails in the same way on every rank costs the others nothing."""
    from megaqwen.training import cpu_emulation

    cpu_emulation.install()  # before anything imports Megatron
    cpu_emulation.install_training()

    import torch

    from megaqwen.training.datasets import use_compiled_helpers

    use_compiled_helpers()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, dict[str, Any]] = {}
    layouts = (
        (model, name, options)
        for model, by_name in jobs["layouts"].items()
        for name, options in by_name.items()
    )
    for model, name, options in layouts:
        started = time.monotonic()
        try:
            losses: Any = train(jobs["models"][model], Path(jobs["data"]), options)
        except Exception:  # noqa: BLE001  told by the test
            losses = traceback.format_exc()
        found.setdefault(model, {})[name] = losses
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            print(f"{model} {name}: {time.monotonic() - started:.1f} s", flush=True)
            Path(jobs["losses"]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
