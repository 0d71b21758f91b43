"""The data of a report: what each corpus has, what was left out of it, and how often it was read."""

from collections.abc import Mapping, Sequence
from typing import Any

from megaqwen.config.blends import PURPOSES
from megaqwen.config.sections import SPLITS
from megaqwen.report.pages import ENVIRONMENT, Manifest, by_stage, table

LEFT_OUT = ("empty", "short", "bad", "duplicate")
HISTOGRAM = """<h3>{{ name }}: documents by their tokens</h3>
<table class="lengths">
{% for label, documents, share in bars %}<tr><td>{{ label }}</td><td>{{ documents }}</td>
<td style="width: 60%"><div style="width: {{ share }}%; height: .8rem; background: #4a78b5"
></div></td></tr>
{% endfor %}</table>
"""
CONVERSATION = """<h3>{{ name }}: its first conversation, what is trained on marked</h3>
<pre>{% for piece in card.sample %}{% if piece.target %}<mark>{{ piece.text }}</mark>{% else -%}
{{ piece.text }}{% endif %}{% endfor %}</pre>
"""


def data_section(manifests: Sequence[Manifest]) -> str:
    """A table of the corpora, their documents' lengths, and the beginning of each corpus."""
    corpora = data_card(manifests)["corpora"]
    header = (
        *("corpus", "documents", "tokens", "bytes", "tokens per byte"),
        *("median document", "left out", "engine"),
    )
    counts = table(header, [row(name, card) for name, card in corpora.items()])
    drawn = table(
        ("corpus", "for", "documents", "tokens", "samples drawn", "epochs"),
        [
            (name, *split_row(split, facts))
            for name, card in corpora.items()
            for split, facts in card["drawn"].items()
        ],
    )
    packed = [
        (name, *packed_row(split, facts))
        for name, card in corpora.items()
        for split, facts in card["drawn"].items()
        if "packs" in facts
    ]
    if packed:
        columns = ("corpus", "for", "packs", "filled", "target tokens", "truncated", "left out")
        drawn += table(columns, packed)
    histograms = [
        histogram(name, card["length_histogram"])
        for name, card in corpora.items()
        if "length_histogram" in card
    ]
    samples = [
        (name, card["sample"])
        for name, card in corpora.items()
        if isinstance(card.get("sample"), str)
    ]
    beginnings = table(("corpus", "its first tokens, decoded"), samples) if samples else ""
    return counts + turns(corpora) + drawn + "".join(histograms) + beginnings


def turns(corpora: Mapping[str, Mapping[str, Any]]) -> str:
    """What of conversations is trained on, and the first one of each corpus with its targets marked."""
    chats = {name: card for name, card in corpora.items() if "target_tokens" in card}
    if not chats:
        return ""
    header = ("corpus", "turns", "of the assistant", "target tokens", "of all tokens")
    rows = [
        (
            name,
            f"{card['turns']:,}",
            f"{card['assistant_turns']:,}",
            f"{card['target_tokens']:,}",
            f"{card['target_tokens'] / card['tokens']:.1%}",
        )
        for name, card in chats.items()
    ]
    samples = [
        ENVIRONMENT.from_string(CONVERSATION).render(name=n, card=c) for n, c in chats.items()
    ]
    return table(header, rows) + "".join(samples)


def data_card(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """What preprocess wrote of each corpus, with what this run draws from it in each split."""
    stages = {name: manifest["results"] for name, manifest in by_stage(manifests).items()}
    card, drawn = stages["preprocess"], stages["train"]["data"]
    corpora = {name: {**facts, "drawn": drawn[name]} for name, facts in card["corpora"].items()}
    return {"tokenizer": card["tokenizer"], "corpora": corpora}


def split_row(split: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What is drawn from a corpus in one split."""
    purpose = dict(zip(SPLITS, PURPOSES, strict=True))[split]
    counts = (f"{facts[name]:,}" for name in ("documents", "tokens", "samples"))
    return (purpose, *counts, f"{facts['epochs']:.3g}")


def packed_row(split: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """How a corpus's conversations were packed for one split; left out are those that are too long."""
    purpose = dict(zip(SPLITS, PURPOSES, strict=True))[split]
    counts = (f"{facts[name]:,}" for name in ("target_tokens", "truncated", "dropped"))
    return (purpose, f"{facts['packs']:,}", f"{facts['packing_efficiency']:.2%}", *counts)


def row(name: str, card: Mapping[str, Any]) -> tuple[str, ...]:
    """A corpus in the table."""
    numbers = [(kind, card.get(f"{kind}_documents_skipped", 0)) for kind in LEFT_OUT]
    left_out = ", ".join(f"{number:,} {kind}" for kind, number in numbers if number)
    engine = card.get("engine") or {}
    return (
        name,
        f"{card['documents']:,}",
        f"{card['tokens']:,}",
        f"{card['bytes']:,}" if "bytes" in card else "",
        f"{card['tokens_per_byte']:.3f}" if "tokens_per_byte" in card else "",
        f"{card['median_document_tokens']:,g}" if "median_document_tokens" in card else "",
        left_out or "none",
        ": ".join(filter(None, (engine.get("name"), engine.get("reason")))),
    )


def histogram(name: str, parts: Sequence[Mapping[str, int]]) -> str:
    """How many documents have how many tokens, as bars."""
    most = max(part["documents"] for part in parts)
    bars = [
        (
            f"{part['from']:,} to {part['below'] - 1:,}",
            f"{part['documents']:,}",
            f"{100 * part['documents'] / most:.1f}",
        )
        for part in parts
    ]
    return ENVIRONMENT.from_string(HISTOGRAM).render(name=name, bars=bars)
