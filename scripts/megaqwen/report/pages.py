"""Tables of a report and the page around them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined

from megaqwen.slurm_job import accounted

Manifest = Mapping[str, Any]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .2rem .8rem
.2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } pre { background: #f6f6f6; padding: 1rem; overflow: auto; }
.passed { color: #126b2e; } .failed { color: #a11; font-weight: bold; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for heading, body in sections %}
<section><h2>{{ heading }}</h2>
{{ body | safe }}
</section>
{% endfor %}
</body>
</html>
"""
TABLE = """<table>
<tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td
{%- if cell in ("passed", "failed") %} class="{{ cell }}"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
"""
ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined)


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A self-contained page.

    Args:
        title: Its heading.
        sections: Pairs of heading and HTML.
    """
    return ENVIRONMENT.from_string(PAGE).render(title=title, sections=sections)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; the cells are escaped."""
    return ENVIRONMENT.from_string(TABLE).render(header=header, rows=list(rows))


def by_stage(manifests: Iterable[Manifest]) -> dict[str, Manifest]:
    """The manifests by their stages' names."""
    return {manifest["stage"]: manifest for manifest in manifests}


def summary_table(manifests: Sequence[Manifest]) -> str:
    """What was trained on what, with which loss, and the verdicts."""
    stages = by_stage(manifests)
    model, train = stages["download"]["results"], stages["train"]["results"]
    name = model.get("repo_id") or model.get("path") or f"tiny {model['architecture']}"
    revision = model.get("commit", "")
    corpora = stages["preprocess"]["results"]["corpora"]
    return table(
        ("", ""),
        [
            ("model", f"{name} {revision}".strip()),
            ("parameters", f"{model['parameters']:,}"),
            (
                "data",
                ", ".join(f"{key}: {item['tokens']:,} tokens" for key, item in corpora.items()),
            ),
            ("trained on", f"{trained_tokens(train)} in {train['iteration']} iterations"),
            ("ranks", train["world_size"]),
            ("loss", f"{train['first_loss']:.4f} at first, {train['last_loss']:.4f} at last"),
            ("validation loss", nats(train["validation_loss"])),
            ("test loss", nats(train["test_loss"])),
            ("unigram entropy", f"{train['unigram_entropy']:.4f} nats per token"),
            ("parity after convert", stages["parity_convert"]["results"]["verdict"]),
            ("parity after export", stages["parity_export"]["results"]["verdict"]),
        ],
    )


def trained_tokens(train: Mapping[str, Any]) -> str:
    """The tokens of a training, in SFT with those that counted in the loss."""
    tokens = f"{train['tokens']:,} tokens"
    targets = train.get("target_tokens")
    return tokens if targets is None else f"{tokens} ({targets:,} of them targets)"


def nats(loss: float | None) -> str:
    """A loss that may not have been measured."""
    return "not measured" if loss is None else f"{loss:.4f} nats per token"


def parity_tables(manifests: Sequence[Manifest]) -> str:
    """The gates of both crossings."""
    stages = by_stage(manifests)
    rows = []
    for crossing in ("parity_convert", "parity_export"):
        results = stages[crossing]["results"]
        for gate in results["gates"]:
            value, threshold = f"{gate['value']:.3g}", f"{gate['threshold']:g}"
            verdict = "passed" if gate["passed"] else "failed"
            rows.append(
                (results["crossing"], gate["name"], gate["statistic"], value, threshold, verdict)
            )
        for name, reason in results.get("unmeasured", {}).items():
            rows.append((results["crossing"], name, reason, "", "", "not measured"))
    return table(("after", "gate", "statistic", "value", "at most", "verdict"), rows)


def stages_table(manifests: Sequence[Manifest]) -> str:
    """When and where each stage ran, how long, and from which commit."""
    rows = [
        (
            manifest["stage"],
            manifest["started"],
            f"{manifest['seconds']:.1f} s",
            f"{manifest['peak_memory_bytes'] / 2**30:.2f} GiB",
            manifest["host"],
            ((manifest["git"] or {}).get("commit") or "")[:10],
            manifest["config_digest"],
        )
        for manifest in manifests
    ]
    header = ("stage", "started", "took", "peak memory", "host", "commit", "config digest")
    return table(header, rows)


def jobs_table(manifests: Sequence[Manifest]) -> str:
    """The Slurm job of each stage, by what sacct tells now that most have ended; empty without jobs."""
    known = {
        job["job_id"]: (manifest["stage"], job)
        for manifest in manifests
        if (job := manifest.get("slurm_job"))
    }
    if not known:
        return ""
    ended = accounted(list(known))
    names = ("state", "node_list", "allocated", "submitted", "started", "elapsed", "cpu_time")
    rows = [
        (stage, number, *((job | ended.get(number, {})).get(name) or "" for name in names))
        for number, (stage, job) in known.items()
    ]
    header = ("stage", "job", "state", "nodes", "allocated", "submitted", "started", "took", "CPU")
    return table(header, rows)


def versions_table(manifests: Sequence[Manifest]) -> str:
    """Every version that some stage ran with."""
    versions: dict[str, set[str]] = {}
    for manifest in manifests:
        for package, version in manifest["versions"].items():
            versions.setdefault(package, set()).add(version)
    rows = [(package, ", ".join(sorted(found))) for package, found in sorted(versions.items())]
    return table(("package", "version"), rows)
