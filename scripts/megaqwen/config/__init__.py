"""A run's config: models, loading, validation, and what each stage reads of it."""

from megaqwen.config.loading import ConfigError, load_config, merge_overlay, validate_config
from megaqwen.config.sections import Config

__all__ = ["Config", "ConfigError", "load_config", "merge_overlay", "validate_config"]
