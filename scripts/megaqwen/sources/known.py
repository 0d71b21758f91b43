"""What is known of the model before its download: enough to check a config at once."""

from pathlib import Path
from typing import Any

from megaqwen.config.sections import PathModel, TinyModel
from megaqwen.config.tiny_shapes import tiny_hf_config
from megaqwen.layout import Layout
from megaqwen.sources.verify import read_json_object


def known_hf_config(layout: Layout) -> dict[str, Any] | None:
    """The model's config.json, or None where only the download will tell.

    Raises:
        InputError: It is no JSON object.
    """
    model = layout.config.model
    if isinstance(model, TinyModel):
        return tiny_hf_config(model.architecture)
    directory = layout.model / "hf"
    if isinstance(model, PathModel):
        directory = Path(model.path).expanduser()
    path = directory / "config.json"
    return read_json_object(path) if path.is_file() else None
