"""Everything that the parity stage measures, gate by gate.

Call `cpu_emulation.install` before this is imported.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megaqwen.architecture import megatron_options
from megaqwen.config import Config
from megaqwen.data.tokenization import tokenizer_digests
from megaqwen.parity import gates
from megaqwen.parity.affordable import parameters_met
from megaqwen.parity.gates import Gate
from megaqwen.parity.generation import continue_greedily
from megaqwen.parity.heldout import sequence_length
from megaqwen.parity.huggingface import HuggingFaceLayers
from megaqwen.parity.localization import table
from megaqwen.parity.megatron import MegatronLayers, recorded_options
from megaqwen.parity.on_all_ranks import FromRanks
from megaqwen.parity.perplexity import (
    Crossing,
    Perplexity,
    measure_perplexity,
    perplexity_gates,
)
from megaqwen.parity.rank_gates import RankGates, hold_against
from megaqwen.parity.texts import (
    cut_to_budget,
    operations_per_second,
    positions_in_memory,
    prompts,
    tokenized_texts,
    why_cut,
)
from megaqwen.parity.walk import EXACT, REFERENCE, Walk, walk
from megaqwen.weights import read_hf_tensors
from megaqwen.weights.bridge import checked_model
from megaqwen.words import duration

SECONDS_BETWEEN_LINES = 10
WALK_SHARE = 0.7
"""Of the time budget, for the walk through the texts; the rest is for the held-out samples."""

logger = logging.getLogger("megaqwen.parity")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The gates, and the figures that they rest on."""

    gates: list[Gate]
    walk: Walk
    perplexity: Perplexity | None
    """Over held-out samples; None where all documents are trained on."""
    continuations: dict[str, list[int]]
    """Token ids of prompts with what the Hugging Face model generated."""
    seconds: dict[str, float]
    """What each part took."""
    held: RankGates | None = None
    """What took ranks; None where they were not asked."""
    unmeasured: dict[str, str]
    """Gates, and texts of full length, that there are no figures of, and why."""

    @property
    def failed(self) -> list[Gate]:
        """The gates that did not pass."""
        return [gate for gate in self.gates if not gate.passed]

    def tables(self) -> Iterator[str]:
        """Lines for a person: the errors by layer, of one rank and of training's."""
        yield from table(self.walk.points)
        if self.held and self.held.points:
            yield f"over the {self.held.ranks.ranks} rank(s) of training's layout:"
            yield from table(self.held.points)

    def facts(self) -> dict[str, Any]:
        """For parity.json."""
        return {
            "verdict": "failed" if self.failed else "passed",
            "gates": [gate.facts() for gate in self.gates],
            "positions": sum(comparison.positions for comparison in self.walk.comparisons),
            "texts": [asdict(comparison) for comparison in self.walk.comparisons],
            "layers": [{**asdict(point), "ratio": point.ratio} for point in self.walk.points],
            "experts": [asdict(routing) for routing in self.walk.routing],
            "perplexity": asdict(self.perplexity) if self.perplexity else None,
            "continuations": self.continuations,
            **({"ranks": self.held.facts()} if self.held else {}),
            "unmeasured": self.unmeasured,
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
        }


def measure(
    *,
    model: Path,
    checkpoint: Path,
    data: Path,
    config: Config,
    rounded: bool,
    tokenizer: Mapping[str, str] | None = None,
    made: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
    ranks: FromRanks | None = None,
) -> Measured:
    """Hold a Megatron checkpoint against a Hugging Face model.

    Args:
        model: The Hugging Face directory.
        checkpoint: The directory with latest_checkpointed_iteration.txt.
        data: Preprocess's directory.
        config: The run's.
        rounded: The model was exported from the checkpoint, so that its dtypes may be narrower.
        tokenizer: SHA-256 by name of the tokenizer's files as they should be; None where nobody
            recorded them.
        made: The results in preprocess's manifest; without them no held-out samples are compared.
        trained: The results in training's manifest, after an export.
        ranks: What Megatron computed over training's ranks; None leaves out its gates.

    Raises:
        InputError: A directory is not what it should be.
    """
    seconds: dict[str, float] = {}

    def timed[Result](name: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        return result

    weights, transfers = checked_model(model)
    described = megatron_options(weights.config)
    del described["padded_vocab_size"]  # it depends on the layout, and pad rows are no tokens
    recorded = recorded_options(checkpoint, described)
    dtypes = weights.dtypes if rounded else None
    streamed = read_hf_tensors(checkpoint, weights.config, dtypes=dtypes)
    found = [gates.architecture_gate(recorded, described)]
    found.insert(0, timed("tensors", lambda: gates.tensors_gate(weights.read, streamed)))
    if tokenizer is not None:
        found.append(gates.tokenizer_gate(tokenizer, tokenizer_digests(model)))

    added = config.parity.generated_tokens
    limit = min(config.parity.max_tokens, weights.config["max_position_embeddings"])
    wanted = min(sequence_length(config), weights.config["max_position_embeddings"])
    full = min(wanted, positions_in_memory(weights.config["num_attention_heads"]))
    made_texts = tokenized_texts(model, data, config, limit, full)
    budget = (
        config.parity.minutes * 60 * operations_per_second() / (2 * parameters_met(weights.config))
    )
    texts = cut_to_budget(made_texts, WALK_SHARE * budget)
    unmeasured = why_cut(made_texts, texts, full, wanted)
    reference = HuggingFaceLayers(weights, torch.float32)
    continued = timed(
        "generation",
        lambda: continue_greedily(reference, prompts(texts), min(added, limit - 1)),
    )
    longest = max(len(ids) for ids in (*texts.values(), *continued.values()))
    stored = set(weights.dtypes.values()) if rounded else set()
    # With several dtypes nothing was rounded: the export refuses to.
    rounded_to = stored.pop() if len(stored) == 1 else torch.float32
    vocabulary = weights.config["vocab_size"]
    own = {EXACT: HuggingFaceLayers(weights, torch.float64), REFERENCE: reference}
    megatron = MegatronLayers(checkpoint, recorded, vocabulary, longest, rounded_to)
    tie = 2 * config.parity.max_logit_difference
    walked = timed("forward", lambda: walk(own, megatron, texts | continued, tie, Progress()))
    found += [
        gates.layers_gate(walked.points),
        *gates.forward_gates(walked.comparisons, config.parity.max_logit_difference),
    ]
    if continued:
        generated = [row for row in walked.comparisons if row.text in continued]
        found.append(gates.generation_gate(generated))
    if walked.routing:
        found.append(gates.routing_gate(walked.routing))
    perplexity = None
    if made is not None:
        crossing = Crossing(
            weights=weights,
            checkpoint=checkpoint,
            recorded=recorded,
            rounded_to=rounded_to,
            tie=tie,
            config=config,
            data=data,
            made=made,
            trained=trained or {},
            after_training=rounded,
        )
        share = (1 - WALK_SHARE) * budget
        perplexity, reasons = timed("perplexity", lambda: measure_perplexity(crossing, share))
        unmeasured |= reasons
        found += perplexity_gates(perplexity)
    held = None
    if ranks:
        held = timed("against ranks", lambda: hold_against(ranks, model, weights, transfers, tie))
        found += held.gates
        seconds |= ranks.seconds
        unmeasured |= ranks.unmeasured
    return Measured(
        gates=found,
        walk=walked,
        perplexity=perplexity,
        continuations=continued,
        seconds=seconds,
        held=held,
        unmeasured=unmeasured,
    )


class Progress:
    """Says now and then how far the walk is."""

    def __init__(self) -> None:
        self.started = self.said = time.monotonic()

    def __call__(self, layer: int, layers: int) -> None:
        """Told after each layer."""
        now = time.monotonic()
        if now - self.said > SECONDS_BETWEEN_LINES:
            self.said = now
            left = (now - self.started) / layer * (layers - layer)
            logger.info("  layer %d of %d, %s left", layer, layers, duration(left))
