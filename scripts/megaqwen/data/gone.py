"""Files of a corpus that are gone since it was tokenized: what was made of them stays."""

from collections.abc import Sequence
from pathlib import Path

from megaqwen.provenance import read_json


def with_those_gone(found: Sequence[Path], manifest: Path) -> list[Path]:
    """The files that a rule has as inputs: those that are there, or all that the data was made of.

    The latter where some of these are gone and the others are as they were: Snakemake then sees that
    inputs are gone, and keeps what it made. Given the others alone it would tokenize less, and training
    would begin anew.

    Args:
        found: What the config's patterns match now.
        manifest: Preprocess's; it may not be there.
    """
    if not manifest.is_file():
        return list(found)
    cards = read_json(manifest)["results"].get("corpora", {}).values()
    sources = {Path(each["path"]): each["bytes"] for card in cards for each in card["sources"]}
    left = set(found)
    as_they_were = all(sources.get(path) == path.stat().st_size for path in left)
    return list(sources) if left < sources.keys() and as_they_were else list(found)
