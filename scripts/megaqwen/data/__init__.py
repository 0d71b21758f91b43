"""From corpora of text to Megatron's .bin and .idx."""
